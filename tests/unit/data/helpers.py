"""Small records and shards for the tests."""

from pathlib import Path

import torch
from torch import Tensor

from data.rgba import over
from data.schema import LayerImage, Record, shard_name, write_shard
from data.tasks import TASKS


def disc(size: int = 16, level: float = 0.8) -> Tensor:
    """A soft disc on transparency, (4, size, size)."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    alpha = ((0.8 - (axis[:, None] ** 2 + axis[None] ** 2).sqrt()) * 8).clamp(0, 1)
    return torch.cat([torch.full((3, size, size), level), alpha[None]])


def photo(size: int = 16, level: float = 0.3) -> Tensor:
    """An opaque gradient, (4, size, size)."""
    ramp = torch.linspace(0, level, size).expand(3, size, size)
    return torch.cat([ramp, torch.ones(1, size, size)])


def make_record(task: str = "automatic_matting", number: int = 0, size: int = 16) -> Record:
    """A record that keeps the contract of ``task``."""
    front, back = disc(size, 0.5 + 0.01 * (number % 40)), photo(size)
    images = {"foreground": front, "background": back, "image": over(torch.stack([back, front])), "mask": photo(size)}
    return Record(
        id=f"train-{number:06d}-{task}",
        task=task,
        prompt="Cut out the disc.",
        inputs=tuple(LayerImage.encode(role, images[role]) for role in TASKS[task].inputs),
        targets=tuple(LayerImage.encode(role, images[role]) for role in TASKS[task].targets),
        caption="a disc",
        photo_group="photo-1",
        object_groups=("disc",),
        source="test",
        licence="CC0",
    )


def write_dataset(folder: Path, records: list[Record], split: str = "train", shards: int = 1) -> Path:
    """Writes the records to ``shards`` shards of ``split``."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(shards):
        write_shard(folder / shard_name(split, k, shards), records[k::shards], row_group_size=4)
    return folder
