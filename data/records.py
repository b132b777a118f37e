"""Reading a folder of parquet shards: a cheap index in memory, images by row group on demand."""

import hashlib
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import ConfigError, DataError
from data.schema import (
    CHEAP_COLUMNS,
    SCHEMA,
    SCHEMA_KEY,
    SCHEMA_VERSION,
    SIZE_COLUMN,
    LayerImage,
    Record,
    Sample,
    check_contract,
    record_from_row,
    write_shard,
)

__all__ = [
    "LayerImage",
    "Record",
    "RecordDataset",
    "Sample",
    "content_digest",
    "present_splits",
    "verify",
    "write_shard",
]

SPLITS = ("train", "val", "test")
BadRowPolicy = Literal["fail", "skip"]

_REBUILD = "build it again with `omnialpha data build`"
_SHARD = re.compile(r"(?P<split>[a-z]+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.parquet")
_CACHED_ROW_GROUPS = 8


def find_shards(folder: Path, split: str) -> list[Path]:
    """Shards of a split in order.

    Raises:
        DataError: no folder, no shard of this split, or a shard of the announced number is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such dataset folder; {_REBUILD} or name another folder")
    found = [(path, match) for path in sorted(folder.iterdir()) if (match := _SHARD.fullmatch(path.name))]
    shards = [(path, match) for path, match in found if match["split"] == split]
    if not shards:
        present = ", ".join(sorted({match["split"] for _, match in found})) or "none"
        raise DataError(f"{folder}: no shard of split {split!r} (splits present: {present}); {_REBUILD}")
    totals = {int(match["total"]) for _, match in shards}
    if len(totals) > 1:
        raise DataError(f"{folder}: shards of split {split!r} come from different builds ({totals}); {_REBUILD}")
    (total,) = totals
    missing = sorted(set(range(total)) - {int(match["number"]) for _, match in shards})
    if missing:
        raise DataError(f"{folder}: shard {missing[0]} of {total} of split {split!r} is missing; {_REBUILD}")
    return [path for path, _ in shards]


def open_shard(path: Path) -> pq.ParquetFile:
    """Opens a shard and checks its schema.

    Raises:
        DataError: missing, not parquet, another schema version, or wrong columns.
    """
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_REBUILD}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); {_REBUILD}") from None
    version = (file.schema_arrow.metadata or {}).get(SCHEMA_KEY, b"none").decode(errors="replace")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; {_REBUILD}")
    for column in SCHEMA:
        if column.name == SIZE_COLUMN:
            continue
        position = file.schema_arrow.get_field_index(column.name)
        if position < 0 or file.schema_arrow.field(position).type != column.type:
            raise DataError(f"{path}, field {column.name}: missing or not of type {column.type}; {_REBUILD}")
    return file


def _read_row_group(path: Path, group: int, columns: list[str]) -> pa.Table:
    try:
        with open_shard(path) as file:
            return file.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: row group {group} is damaged ({str(error).splitlines()[0]}); {_REBUILD}") from None


def _row_groups(path: Path) -> list[int]:
    with open_shard(path) as file:
        return [file.metadata.row_group(k).num_rows for k in range(file.metadata.num_row_groups)]


class RecordDataset:
    """One split of a dataset folder.

    Opening reads the texts, roles and digests only. With ``on_bad_row="fail"`` opening checks those, and images are
    checked when a record is decoded (:func:`verify` checks all at once). With ``"skip"`` opening decodes every image,
    so that the index is the same however the dataset is read; bad rows are counted in :attr:`skipped`.

    Picklable; one instance serves one thread.
    """

    def __init__(self, folder: Path | str, split: str, on_bad_row: BadRowPolicy = "fail") -> None:
        """
        Raises:
            ConfigError: ``on_bad_row`` is neither fail nor skip.
            DataError: no such split, unreadable shards, or (with fail) a bad row, named by file, row and field.
        """
        if on_bad_row not in ("fail", "skip"):
            raise ConfigError(f"on_bad_row={on_bad_row!r}: must be 'fail' or 'skip'")
        self.folder, self.split = Path(folder), split
        self.skipped: dict[str, int] = {}
        """Number of skipped rows by reason."""
        self._shards = find_shards(self.folder, split)
        self._index: list[tuple[int, int, int, Record]] = []  # shard, row group, row in it, record without pixels
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._sizes: list[tuple[int, int] | None] = []
        reasons: Counter[str] = Counter()
        seen: set[str] = set()
        for shard, group, row, values, where in self._rows(images=on_bad_row == "skip"):
            try:
                record = record_from_row(values, where)
                check_contract(record)
                if record.id in seen:
                    raise DataError(f"{where}, field id: {record.id!r} occurs twice; ids must be unique in a split")
                if on_bad_row == "skip":
                    record.decode()
            except DataError as error:
                if on_bad_row == "fail":
                    raise
                reasons[_reason(str(error), where)] += 1
                continue
            seen.add(record.id)
            cheap = {name: values[name] for name in CHEAP_COLUMNS}
            self._index.append((shard, group, row, record_from_row(cheap, where)))
            self._sizes.append((size[0], size[1]) if (size := values.get(SIZE_COLUMN)) else None)
        self.skipped = dict(reasons)
        if not self._index:
            raise DataError(
                f"{self.folder}: split {split!r} has no usable record (skipped: {self.skipped}); {_REBUILD}"
            )
        tasks: dict[str, list[int]] = {}
        for position, (*_, record) in enumerate(self._index):
            tasks.setdefault(record.task, []).append(position)
        self._positions = {task: np.array(places, dtype=np.int64) for task, places in sorted(tasks.items())}

    def _rows(self, images: bool) -> Iterator[tuple[int, int, int, dict[str, Any], str]]:
        columns = SCHEMA.names if images else [*CHEAP_COLUMNS, SIZE_COLUMN]
        for shard, path in enumerate(self._shards):
            number = 0
            for group in range(len(_row_groups(path))):
                for row, values in enumerate(_read_row_group(path, group, columns).to_pylist()):
                    yield shard, group, row, values, f"{path} row {number}"
                    number += 1

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that have records, in alphabetical order."""
        return tuple(self._positions)

    @property
    def task_positions(self) -> dict[str, np.ndarray]:
        """Record indices of each task, what :class:`data.sampler.TaskSampler` takes."""
        return dict(self._positions)

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """(height, width) of every record's images; None where a shard does not say, as old ones do not."""
        return list(self._sizes)

    def positions(self, task: str) -> np.ndarray:
        """Record indices of ``task``, shape (n,), int64.

        Raises:
            DataError: the split has no record of this task.
        """
        if task not in self._positions:
            raise DataError(f"{self.folder}: split {self.split!r} has no record of task {task!r}; it has {self.tasks}")
        return self._positions[task]

    def cheap(self, index: int) -> Record:
        """The record at ``index`` without pixels: its images carry role and digest, and empty bytes."""
        return self._index[index][3]

    def prompt(self, index: int) -> str:
        """Instruction of the record at ``index``."""
        return self._index[index][3].prompt

    def digests(self, index: int) -> tuple[str, ...]:
        """Pixel digests of the record's inputs, then its targets."""
        record = self._index[index][3]
        return tuple(image.digest for image in record.inputs + record.targets)

    def record(self, index: int) -> Record:
        """Reads the record at ``index`` with its encoded images; ``.decode()`` gives tensors and checks them.

        Raises:
            DataError: the file disappeared or is damaged, or the row no longer keeps the schema.
            IndexError: no such index.
        """
        shard, group, row, cheap = self._index[index]
        key = (shard, group)
        if key not in self._cache:
            self._cache[key] = _read_row_group(self._shards[shard], group, SCHEMA.names)
            while len(self._cache) > _CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return record_from_row(self._cache[key].slice(row, 1).to_pylist()[0], cheap.where)


def _reason(message: str, where: str) -> str:
    """The message without file and row and without remarks in brackets, so that equal faults count together."""
    text = message.replace(where, "").lstrip(" ,:")
    return re.sub(r"\s*\(.*\)", "", text).split(";")[0]


def present_splits(folder: Path) -> list[str]:
    """Splits that have shards in the folder, in the order train, val, test."""
    return [split for split in SPLITS if any(folder.glob(f"{split}-*.parquet"))]


def content_digest(folder: Path | str) -> str:
    """64 hex characters over ids, tasks, prompts, roles and pixel digests of all splits.

    Pixels enter by their digests, so other PNG or parquet compression does not change it; :func:`verify` checks that
    the stored digests are true.
    """
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=32)
    for split in present_splits(folder):
        dataset = RecordDataset(folder, split)
        for index in range(len(dataset)):
            record = dataset.cheap(index)
            roles = [image.role for image in record.inputs + record.targets]
            digest.update(repr((split, record.id, record.task, record.prompt, roles, dataset.digests(index))).encode())
    return digest.hexdigest()


def verify(folder: Path | str, limit: int = 20) -> list[str]:
    """Decodes every row of every split. Returns the problems found, at most ``limit``, empty if all is well."""
    folder = Path(folder)
    problems: list[str] = []
    splits = present_splits(folder)
    if not splits:
        return [f"{folder}: no shards; {_REBUILD}"]
    for split in splits:
        try:
            shards = find_shards(folder, split)
        except DataError as error:
            problems.append(str(error))
            continue
        for path in shards:
            problems += _verify_shard(path, limit - len(problems))
    return problems[:limit]


def _verify_shard(path: Path, limit: int) -> list[str]:
    problems: list[str] = []
    number = 0
    try:
        for group in range(len(_row_groups(path))):
            for values in _read_row_group(path, group, SCHEMA.names).to_pylist():
                try:
                    record = record_from_row(values, f"{path} row {number}")
                    check_contract(record)
                    record.decode()
                except DataError as error:
                    problems.append(str(error))
                    if len(problems) >= limit:
                        return problems
                number += 1
    except DataError as error:
        problems.append(str(error))
    return problems
