"""Shipped configurations: YAML only."""
