"""The record: one example of one task, its contract, and how it is laid out in parquet."""

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from common.errors import DataError, StorageError
from data.rgba import decode_image, encode_png, image_digest, stored_size, to_uint8_hwc
from data.tasks import TASKS

SCHEMA_VERSION = "1"
SCHEMA_KEY = b"omnialpha.schema_version"

_TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("photo_group", pa.string(), nullable=False),
        pa.field("object_groups", _TEXTS, nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("input_roles", _TEXTS, nullable=False),
        pa.field("input_digests", _TEXTS, nullable=False),
        pa.field("target_roles", _TEXTS, nullable=False),
        pa.field("target_digests", _TEXTS, nullable=False),
        pa.field("input_images", pa.list_(pa.binary()), nullable=False),
        pa.field("target_images", pa.list_(pa.binary()), nullable=False),
        pa.field("size", pa.list_(pa.int32()), nullable=False),
    ],
    metadata={SCHEMA_KEY: SCHEMA_VERSION.encode()},
)
IMAGE_COLUMNS = ("input_images", "target_images")
SIZE_COLUMN = "size"
"""[height, width] of all of a record's images; shards written before there was more than one size lack it."""
CHEAP_COLUMNS = tuple(name for name in SCHEMA.names if name not in (*IMAGE_COLUMNS, SIZE_COLUMN))


@dataclass(frozen=True)
class LayerImage:
    """One stored image with its role in the task."""

    role: str
    """``image`` or ``mask`` for inputs, ``background`` or ``foreground`` for targets."""
    png: bytes
    digest: str
    """:func:`data.rgba.image_digest` of the 8-bit RGBA pixels."""

    @classmethod
    def encode(cls, role: str, image: Tensor | np.ndarray) -> "LayerImage":
        """Stores an RGBA image (float CHW in [0, 1] or uint8 HWC) with its digest."""
        pixels = to_uint8_hwc(image)
        return cls(role, encode_png(pixels), image_digest(pixels))


@dataclass(frozen=True)
class Sample:
    """A decoded record."""

    inputs: list[Tensor]
    """Input images, each RGBA of shape (4, H, W) in [0, 1], in the task's order."""
    targets_LCHW: Tensor
    """Target layers, shape (L, 4, H, W), back to front."""


@dataclass(frozen=True)
class Record:
    """One example of one task."""

    id: str
    task: str
    prompt: str
    inputs: tuple[LayerImage, ...]
    targets: tuple[LayerImage, ...]
    """Target layers, back to front."""
    caption: str
    """Name of the object that the targets show."""
    photo_group: str
    """Group of the background photo, empty where there is none; no group crosses a split."""
    object_groups: tuple[str, ...]
    source: str
    licence: str
    where: str = field(default="", compare=False)
    """File and row that the record came from, for errors."""

    def decode(self) -> Sample:
        """Decodes all images and checks them.

        Raises:
            DataError: an image cannot be decoded, does not match its digest, differs in size from the others, or is
                a foreground without alpha. The message names file, row and field.
        """
        place = self.where or f"record {self.id}"
        inputs = [self._image(image, f"{place}, field input_images[{k}]") for k, image in enumerate(self.inputs)]
        targets = [self._image(image, f"{place}, field target_images[{k}]") for k, image in enumerate(self.targets)]
        sizes = {tuple(image.shape[1:]) for image in inputs + targets}
        if len(sizes) > 1:
            raise DataError(f"{place}: images differ in size ({sorted(sizes)}); resize all images of a record alike")
        return Sample(inputs, torch.stack(targets))

    def _image(self, image: LayerImage, where: str) -> Tensor:
        decoded = decode_image(image.png, where)
        if image_digest(to_uint8_hwc(decoded)) != image.digest:
            raise DataError(f"{where}: pixels do not match the stored digest; rebuild with `omnialpha data build`")
        if image.role == "foreground" and bool((decoded[3] == 1).all()):
            raise DataError(
                f"{where}: the foreground has no alpha (opaque everywhere); store it as RGBA with its transparency"
            )
        return decoded


def check_contract(record: Record) -> None:
    """Checks everything that needs no pixels against the task table.

    Raises:
        DataError: an unknown task, wrong roles or an empty text. The message names file, row and field.
    """
    place = record.where or f"record {record.id}"
    if not record.id:
        raise DataError(f"{place}, field id: empty; every record needs an id")
    if record.task not in TASKS:
        raise DataError(f"{place}, field task: unknown task {record.task!r}; known tasks: {', '.join(TASKS)}")
    task = TASKS[record.task]
    for name, images, roles in (("input", record.inputs, task.inputs), ("target", record.targets, task.targets)):
        found = tuple(image.role for image in images)
        if found != roles:
            raise DataError(f"{place}, field {name}_roles: task {task.name} needs {list(roles)}, found {list(found)}")
    if not record.prompt.strip():
        raise DataError(f"{place}, field prompt: empty; every record needs an instruction")


def write_shard(path: Path, records: Sequence[Record], row_group_size: int = 64) -> None:
    """Writes one parquet shard (zstd) under a temporary name, then renames it into place.

    Raises:
        DataError: a record breaks its task's contract.
        StorageError: the file system refused.
    """
    for record in records:
        check_contract(record)
    table = pa.table([pa.array([_column(r, f.name) for r in records], type=f.type) for f in SCHEMA], schema=SCHEMA)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(table, temporary, row_group_size=row_group_size, compression="zstd")
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turns a refusal of the file system into a message that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: no space left; free space there or choose another folder, then run again")
    return StorageError(f"{path}: cannot be written ({error.strerror or error}); choose a folder you can write to")


def _column(record: Record, name: str) -> object:
    if name == SIZE_COLUMN:
        return list(stored_size(record.targets[0].png) or ())  # a damaged image is named when it is decoded
    if name.startswith(("input_", "target_")):
        images = record.inputs if name.startswith("input_") else record.targets
        attribute = {"roles": "role", "digests": "digest", "images": "png"}[name.split("_")[1]]
        return [getattr(image, attribute) for image in images]
    value = getattr(record, name)
    return list(value) if isinstance(value, tuple) else value


def record_from_row(row: dict, where: str) -> Record:
    """Builds a record from one parquet row (a dict of plain values).

    A row without the image columns gives a record with empty images, enough for :func:`check_contract`.

    Raises:
        DataError: a missing value, or unequal numbers of roles, digests and images. Names file, row and field.
    """
    for name, value in row.items():
        if value is None or (isinstance(value, list) and any(item is None for item in value)):
            raise DataError(f"{where}, field {name}: holds a null; every field needs a value")
    layers = {}
    for side in ("input", "target"):
        roles, digests = row[f"{side}_roles"], row[f"{side}_digests"]
        images = row.get(f"{side}_images", [b""] * len(roles))
        if len(digests) != len(roles):
            raise DataError(f"{where}, field {side}_digests: {len(digests)} digests for {len(roles)} roles")
        if len(images) != len(roles):
            raise DataError(f"{where}, field {side}_images: {len(images)} images for {len(roles)} roles")
        layers[side] = tuple(LayerImage(*parts) for parts in zip(roles, images, digests, strict=True))
    return Record(
        id=row["id"],
        task=row["task"],
        prompt=row["prompt"],
        inputs=layers["input"],
        targets=layers["target"],
        caption=row["caption"],
        photo_group=row["photo_group"],
        object_groups=tuple(row["object_groups"]),
        source=row["source"],
        licence=row["licence"],
        where=where,
    )


def records_by_shard(records: Iterable[Record], shard_size: int) -> list[list[Record]]:
    """Splits records into shards of at most ``shard_size``; at least one shard, which may be empty."""
    everything = list(records)
    return [everything[k : k + shard_size] for k in range(0, max(len(everything), 1), shard_size)]


def shard_name(split: str, number: int, total: int) -> str:
    """File name of a shard, for example ``train-00000-of-00003.parquet``."""
    return f"{split}-{number:05d}-of-{total:05d}.parquet"
