"""Brings other people's examples into a dataset folder of our records: OmniAlpha's JSONL and plain folders.

Two passes: the first reads texts and paths alone (:mod:`data.import_rows`), so that splits depend on all rows and cheap
faults show at once; the second reads one image at a time and writes shards of bounded size.
"""

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import ConfigError, DataError, StorageError
from data.images import Letterbox, marked, read_image
from data.import_rows import Row, Source, entries, parse_folder, parse_line
from data.manifest import MANIFEST, Manifest, SourceInfo, file_sha256
from data.records import SPLITS, content_digest
from data.schema import SCHEMA_VERSION, LayerImage, Record, shard_name, storage_error, write_shard
from data.seeding import seed_for
from data.sizes import within_budget
from data.sources import Progress, locked

SMALLEST = 8
"""Pixels that a side needs, native and scaled: one patch of the shipped models."""
SHARD_BYTES = 256 * 2**20
"""Encoded images in one shard at most, which bounds the memory of an import."""
GROUP_BYTES = 16 * 2**20
"""Encoded images in one row group about, which bounds the memory of reading."""
SHOWN_FAULTS = 5
PROGRESS_S = 30.0


@dataclass(frozen=True)
class ImportOptions:
    """How examples become records.

    Raises:
        ConfigError: a value out of its range.
    """

    size: int = 64
    """Side of all images in pixels, 16 to 1024. Every image is letterboxed into this square."""
    pixels: int | None = None
    """Pixels of all images of a record together, 4096 to 2^24: they keep their proportions, at one scale and with sides
    that are multiples of 32, instead of becoming squares of ``size``."""
    bad: Literal["fail", "skip"] = "fail"
    """Whether a bad row ends the import, or is left out and counted."""
    val_share: float = 0.1
    """Share of groups, among sources without a split, that go to val; 0 to 0.5."""
    test_share: float = 0.15
    """Share of groups, among sources without a split, that go to test; 0 to 0.5."""
    seed: int = 0
    """Of the draw of splits."""
    begin_with_bg: bool | None = None
    """Whether the first output is the background, for JSONL rows that do not say."""
    allow_outside: bool = False
    """Whether image paths may leave the folder of their JSONL file."""
    licence: str = "unknown"
    """Of rows that do not name theirs."""
    shard_rows: int = 512
    """Records in one shard at most."""

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 1024:
            raise ConfigError(f"size {self.size}: must be 16 to 1024 pixels")
        if self.pixels is not None and not 4096 <= self.pixels <= 2**24:
            raise ConfigError(f"pixels {self.pixels}: must be 4096 to {2**24}, over all images of a record")
        for name in ("val_share", "test_share"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise ConfigError(f"{name} {getattr(self, name)}: must be 0 to 0.5")
        if self.shard_rows < 1:
            raise ConfigError(f"shard_rows {self.shard_rows}: must be at least 1")

    def identity(self) -> dict[str, Any]:
        """The values that decide the records, as plain JSON values."""
        decisive = ("pixels" if self.pixels else "size", "val_share", "test_share", "seed", "begin_with_bg")
        return {name: getattr(self, name) for name in decisive}


def import_dataset(
    sources: Sequence[Source], out: Path, options: ImportOptions, progress: Progress = lambda _: None
) -> Manifest:
    """Writes the sources' examples to a new dataset folder. The same input gives the same content digest.

    Work happens in ``<out>.tmp``, which is renamed when complete.

    Args:
        progress: called with one line of text now and then.

    Raises:
        ConfigError: ``out`` exists.
        DataError: a bad row (with ``bad="fail"``), no usable row at all, or a group that would be in two splits.
        StorageError: the file system refused.
    """
    if not sources:
        raise ConfigError("no source to import; name a .jsonl file or a folder of records")
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent / f".{out.name}.lock", progress):
            if out.exists():
                raise ConfigError(f"{out}: exists; name another folder or remove this one")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                manifest = _import(sources, temporary, options, progress)
                (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
                os.replace(temporary, out)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, out) from error
    return manifest


@dataclass
class _Faults:
    """Ends the import at the first bad row, or counts bad rows by reason."""

    policy: str
    progress: Progress
    reasons: Counter[str] = field(default_factory=Counter)

    def note(self, error: DataError, where: str) -> None:
        if self.policy == "fail":
            raise DataError(f"{error} (or leave bad rows out with --bad skip)") from None
        if self.reasons.total() < SHOWN_FAULTS:
            self.progress(f"left out: {error}")
        self.reasons[_reason(str(error), where)] += 1


def _reason(message: str, where: str) -> str:
    """The message without file, row, remarks and particulars, so that equal faults count together."""
    text = message.replace(where, "").lstrip(" ,:").split(";")[0]
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\s*\([^()]*\)", "", re.sub(r"\[\d+\]", "", text))
    return re.sub(r"\d+", "N", text)


@dataclass(frozen=True)
class _Planned:
    """A row with all that the other rows decide: its final id, group and split."""

    row: Row
    id: str
    source: str
    group: str
    split: str


def _import(sources: Sequence[Source], folder: Path, options: ImportOptions, progress: Progress) -> Manifest:
    faults = _Faults(options.bad, progress)
    names = _names(sources)
    planned = _plan(sources, names, options, faults)
    progress(f"import: {len(planned)} rows with sound texts and paths")
    writer = _Writer(folder, options.shard_rows, progress)
    used: dict[str, set[str]] = {split: set() for split in SPLITS}
    said = time.monotonic()
    for number, plan in enumerate(planned):
        if time.monotonic() - said >= PROGRESS_S:
            said = time.monotonic()
            progress(f"import: {number} of {len(planned)} rows read")
        try:
            record = _record(plan, options)
        except DataError as error:
            faults.note(error, plan.row.where)
            continue
        writer.add(plan.split, record)
        used[plan.split].add(plan.group)
    counts = writer.finish()
    if not counts:
        raise DataError(f"{sources[0].path}: no usable row ({dict(faults.reasons)}); mend the rows and import again")
    for reason, number in faults.reasons.most_common():
        progress(f"left out {number}: {reason}")
    for split, tasks in counts.items():
        progress(f"{split}: {', '.join(f'{number} {task}' for task, number in tasks.items())}")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        config={**options.identity(), "sources": [[n, s.task, s.split] for n, s in zip(names, sources, strict=True)]},
        sources=[
            SourceInfo(name=n, kind=f"import-{s.kind}", version="", licence=options.licence, checksum=_checksum(s))
            for n, s in zip(names, sources, strict=True)
        ],
        skipped_sources={},
        counts=counts,
        foregrounds={split: len(groups) for split, groups in used.items() if groups},
        photo_groups={},
        object_groups={split: sorted(groups) for split, groups in used.items() if groups},
        shards={path.name: file_sha256(path) for path in sorted(folder.glob("*.parquet"))},
        content_digest=content_digest(folder),
        skipped_rows=dict(sorted(faults.reasons.items())),
    )


def _checksum(source: Source) -> str:
    """Of the JSONL file; of a folder nothing, as its pixels and texts are in the dataset's own digest."""
    return "" if source.kind == "folder" else f"sha256:{file_sha256(source.path)}"


def _names(sources: Sequence[Source]) -> list[str]:
    """A name for each source: its file's or folder's, numbered where two are alike."""
    stems = [source.path.resolve().stem for source in sources]
    return [s if stems.count(s) == 1 else f"{s}-{stems[: k + 1].count(s)}" for k, s in enumerate(stems)]


def _plan(sources: Sequence[Source], names: Sequence[str], options: ImportOptions, faults: _Faults) -> list[_Planned]:
    """Reads all rows' texts and gives each an id, a group and a split.

    Raises:
        DataError: a bad row where the policy is to fail, or a group in two splits.
    """
    rows: list[tuple[str, str, Row, str | None]] = []  # final id, source, row, its source's split
    seen: dict[str, str] = {}
    for source, name in zip(sources, names, strict=True):
        for where, entry in entries(source):
            try:
                if isinstance(entry, Path):
                    row = parse_folder(where, entry, source)
                else:
                    row = parse_line(where, entry, source, options.begin_with_bg, options.allow_outside)
                final = row.id if len(sources) == 1 else f"{name}/{row.id}"
                if final in seen:
                    raise DataError(f"{where}, field id: {row.id!r} is also the id of {seen[final]}; ids must differ")
            except DataError as error:
                faults.note(error, where)
                continue
            seen[final] = where
            rows.append((final, name, row, source.split))
    groups = _groups((final, row) for final, _, row, _ in rows)
    splits: dict[str, tuple[str, str]] = {}  # group -> split and the row that fixes it
    for group, (_, _, row, split) in zip(groups, rows, strict=True):
        there = splits.setdefault(group, (split, row.where)) if split else None
        if there and there[0] != split:
            raise DataError(
                f"{row.where} is in split {split} and {there[1]} in split {there[0]}, but both belong to group "
                f"{group!r} (same `group`, or a shared image file); give both files one split, or each row its `group`"
            )
    free = sorted({group for group in groups if group not in splits})
    drawn = draw_splits(free, options.val_share, options.test_share, options.seed)
    return [
        _Planned(row, final, name, group, splits[group][0] if group in splits else drawn[group])
        for group, (final, name, row, _) in zip(groups, rows, strict=True)
    ]


def _groups(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """Group of each row: the one it names, or one for all rows that share image files, named after their first."""
    parents: dict[tuple[str, str], tuple[str, str]] = {}
    labels: dict[tuple[str, str], tuple[int, str]] = {}  # of roots: number and name of the first row
    keys = []

    def root(key: tuple[str, str]) -> tuple[str, str]:
        parents.setdefault(key, key)
        while parents[key] != key:
            parents[key] = parents[parents[key]]
            key = parents[key]
        return key

    for number, (final, row) in enumerate(rows):
        shared = [("group", row.group)] if row.group else [("file", str(path)) for _, path in row.images]
        roots = list(dict.fromkeys(root(key) for key in shared))
        parents.update(dict.fromkeys(roots[1:], roots[0]))
        labels[roots[0]] = min([labels[key] for key in roots if key in labels] + [(number, row.group or final)])
        keys.append(roots[0])
    return [labels[root(key)][1] for key in keys]


def draw_splits(groups: Sequence[str], val_share: float, test_share: float, seed: int) -> dict[str, str]:
    """Split of each group; depends on the set of groups and ``seed`` alone.

    A split with a share above 0 gets at least one group where there are three or more; train always gets one.
    """
    ranked = sorted(groups, key=lambda group: (seed_for(seed, "import split", group), group))
    splits = dict.fromkeys(ranked, "train")
    taken = 0
    for split, share in (("test", test_share), ("val", val_share)):
        wanted = max(round(share * len(ranked)), 1 if share > 0 and len(ranked) >= 3 else 0)
        wanted = min(wanted, max(len(ranked) - taken - 1, 0))
        splits.update(dict.fromkeys(ranked[taken : taken + wanted], split))
        taken += wanted
    return splits


def _record(plan: _Planned, options: ImportOptions) -> Record:
    """Reads and fits a row's images, one at a time.

    Raises:
        DataError: an image that cannot be read or breaks the record's contract; names row, field and file.
    """
    row, sizes, layers = plan.row, {}, []
    for role, (name, path) in zip(row.task.inputs + row.task.targets, row.images, strict=True):
        where = f"{row.where}, field {name}" if not name.startswith("file ") else f"{row.where}, {name}"
        try:
            pixels_HW4 = read_image(path)
        except DataError as error:
            raise DataError(f"{where}: {str(error).removeprefix(f'{path}: ')}") from None
        height, width = pixels_HW4.shape[:2]
        sizes[name] = (width, height)
        box = _box((height, width), len(row.images), options, where)
        if role == "mask" and not marked(pixels_HW4).any():
            raise DataError(
                f"{where}: the mask marks nothing (no pixel is brighter than half); mark the object in white"
            )
        if role == "image":
            fitted = LayerImage.encode(role, box.image(pixels_HW4))
        elif role == "mask":
            fitted = LayerImage.encode(role, box.mask(pixels_HW4))
        else:
            layer = box.layer(pixels_HW4)
            if role == "foreground" and (layer[..., 3] == 255).all():
                raise DataError(
                    f"{where}: the foreground has no alpha (opaque everywhere); store it as RGBA with transparency, "
                    "or set begin_with_bg if this is the background"
                )
            fitted = LayerImage.encode(role, layer)
        layers.append(fitted)
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {width}x{height}" for name, (width, height) in sizes.items())
        raise DataError(f"{row.where}: images differ in size ({listed}); bring all images of a row to one size")
    inputs = len(row.task.inputs)
    return Record(
        id=plan.id,
        task=row.task.name,
        prompt=row.prompt,
        inputs=tuple(layers[:inputs]),
        targets=tuple(layers[inputs:]),
        caption=row.caption,
        photo_group="",
        object_groups=(plan.group,),
        source=plan.source,
        licence=row.licence or options.licence,
    )


def _box(size: tuple[int, int], images: int, options: ImportOptions, where: str) -> Letterbox:
    """Where an image of a record with that many images of one size lies in what the model sees.

    Raises:
        DataError: it is too narrow.
    """
    if options.pixels is None:
        return Letterbox.fit(*size, options.size, SMALLEST, where)
    canvas, *_ = within_budget([size] * images, options.pixels, where=where)
    return Letterbox(size, canvas, canvas)


class _Writer:
    """Gathers the records of each split and writes a shard whenever enough are there."""

    def __init__(self, folder: Path, shard_rows: int, progress: Progress) -> None:
        self._folder, self._shard_rows, self._progress = folder, shard_rows, progress
        self._records: dict[str, list[Record]] = {split: [] for split in SPLITS}
        self._shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
        self._counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._bytes: Counter[str] = Counter()

    def add(self, split: str, record: Record) -> None:
        self._records[split].append(record)
        self._bytes[split] += sum(len(image.png) for image in record.inputs + record.targets)
        if len(self._records[split]) >= self._shard_rows:
            self._write(split)
        elif self._bytes.total() >= SHARD_BYTES:
            self._write(self._bytes.most_common(1)[0][0])

    def _write(self, split: str) -> None:
        records, stored = self._records[split], self._bytes[split]
        path = self._folder / f".{split}-{len(self._shards[split])}.part"
        write_shard(path, records, row_group_size=max(1, min(64, GROUP_BYTES * len(records) // max(stored, 1))))
        self._shards[split].append(path)
        self._counts[split].update(record.task for record in records)
        self._records[split], self._bytes[split] = [], 0
        self._progress(f"{split}: {self._counts[split].total()} records written")

    def finish(self) -> dict[str, dict[str, int]]:
        """Writes what is left, names the shards now that their number is known; counts by split and task."""
        for split in SPLITS:
            if self._records[split]:
                self._write(split)
            for number, path in enumerate(self._shards[split]):
                path.rename(self._folder / shard_name(split, number, len(self._shards[split])))
        return {split: dict(sorted(tally.items())) for split, tally in self._counts.items() if tally}
