"""Tasks, RGBA operations, parquet records, deterministic sampling and the dataset builder."""
