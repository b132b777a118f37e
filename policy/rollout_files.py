"""Stored rollouts: groups with their decoded layers, truth and inputs, as parquet, to be scored again by any reward.

Layers are stored as 8-bit PNGs, so a value read back differs by at most 1/510 from the one that was scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from common.errors import DataError
from data.rgba import decode_image, encode_png
from policy.group import GroupPixels

FORMAT = b"1"
_PNG = pa.binary()
SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("step", pa.int64()),
        ("record", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("layers", pa.list_(pa.list_(_PNG))),
        ("targets", pa.list_(_PNG)),
        ("inputs", pa.list_(_PNG)),
    ],
    metadata={b"omnialpha.rollouts": FORMAT},
)


@dataclass(frozen=True)
class StoredGroup:
    """One group of a training step."""

    group: str
    """Name within its run, ``step.number``."""
    step: int
    pixels: GroupPixels


def write_rollouts(path: Path, step: int, names: Sequence[str], groups: Sequence[GroupPixels]) -> None:
    """Writes one step's groups; the file appears whole or not at all."""
    rows = [
        {
            "group": name,
            "step": step,
            "record": group.name,
            "task": group.task,
            "prompt": group.prompt,
            "layers": [[encode_png(layer) for layer in member] for member in group.layers_GLCHW],
            "targets": [encode_png(layer) for layer in group.targets_LCHW],
            "inputs": [encode_png(image) for image in group.inputs],
        }
        for name, group in zip(names, groups, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # PNG is compressed already.
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, compression="none")
    temporary.replace(path)


def read_rollouts(source: Path) -> Iterator[StoredGroup]:
    """The groups of a file, or of all ``*.parquet`` in a folder in the order of their names.

    Raises:
        DataError: nothing there, not stored rollouts, or a row that cannot be decoded; names file and row.
    """
    paths = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not paths or not paths[0].is_file():
        raise DataError(f"{source}: no stored rollouts here; a run keeps some with grpo.keep_rollouts=10")
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            if (file.schema_arrow.metadata or {}).get(b"omnialpha.rollouts") != FORMAT:
                raise DataError(f"{path}: not a file of stored rollouts of this version")
            for number, row in enumerate(row for batch in file.iter_batches(16) for row in batch.to_pylist()):
                yield _group(row, f"{path}, row {number}")
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _group(row: dict, where: str) -> StoredGroup:
    def images(field: str, pngs: Sequence[bytes]) -> list[torch.Tensor]:
        return [decode_image(png, f"{where}, {field}") for png in pngs]

    layers = torch.stack([torch.stack(images("layers", member)) for member in row["layers"]])
    pixels = GroupPixels(
        name=row["record"],
        task=row["task"],
        prompt=row["prompt"],
        layers_GLCHW=layers.numpy(),
        targets_LCHW=torch.stack(images("targets", row["targets"])).numpy(),
        inputs=tuple(np.asarray(image) for image in images("inputs", row["inputs"])),
    )
    return StoredGroup(row["group"], row["step"], pixels)
