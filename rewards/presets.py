"""Shipped sets of reward terms: what ``presets.yaml`` beside this file holds."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml


@lru_cache(maxsize=1)
def presets() -> dict[str, list[dict[str, Any]]]:
    """Terms of every preset as plain values with the keys of :class:`rewards.combine.TermConfig`; not to be changed."""
    return yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
