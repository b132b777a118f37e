"""Builds a dataset folder from fetched sources: prepare, split, draw scenes, write shards and a manifest."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import ConfigError, DataError, StorageError
from data.config import DataConfig
from data.library import Library, collect_foregrounds, collect_more, collect_photos, prepare, split_library, widened
from data.manifest import MANIFEST, Manifest, SourceInfo, file_sha256, read_manifest
from data.records import SPLITS, content_digest
from data.scenes import scene_records
from data.schema import SCHEMA_VERSION, Record, shard_name, storage_error, write_shard
from data.sources import MORE_SOURCES, SOURCES, Fetched, Progress, default_cache, fetch, locked

__all__ = ["DataConfig", "Manifest", "SourceInfo", "build_dataset", "read_manifest"]


def build_dataset(
    config: DataConfig,
    out: Path,
    cache: Path | None = None,
    progress: Progress = lambda _: None,
    fetcher: Callable[..., Fetched] = fetch,
) -> Manifest:
    """Builds the dataset at ``out``, or returns the manifest of the equal one that is already there.

    Work happens in ``<out>.tmp``, which is renamed when complete; a leftover of an interrupted build is removed.

    Args:
        config: what to build.
        out: the dataset folder.
        cache: folder of downloaded and prepared images, default :func:`data.sources.default_cache`.
        progress: called with one line of text now and then.
        fetcher: brings the sources; replaced in tests.

    Raises:
        ConfigError: ``out`` holds a dataset of another configuration.
        SourceError: no foreground or no photo source is left.
        DataError: the sources hold too little for a split, or ``out`` is something else than a dataset.
        StorageError: the file system refused.
    """
    cache = cache or default_cache()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent / f".{out.name}.lock", progress):
            if out.exists():
                return _existing(config, out, progress)
            fetched = fetcher(cache, progress, (*SOURCES, *(MORE_SOURCES if config.more_sources else ())))
            libraries = _prepare(config, fetched, cache, progress)
            temporary = out.with_name(out.name + ".tmp")
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()
            counts = _write_splits(config, libraries, temporary, progress)
            manifest = _describe(config, fetched, libraries, counts, temporary)
            (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            os.replace(temporary, out)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, out) from error
    progress(f"dataset {out}: {sum(sum(c.values()) for c in manifest.counts.values())} records")
    return manifest


def _existing(config: DataConfig, out: Path, progress: Progress) -> Manifest:
    manifest = read_manifest(out)
    wanted = config.identity()
    differing = [
        f"{key}: {json.dumps(manifest.config.get(key))} there, {json.dumps(wanted.get(key))} asked for"
        for key in sorted(wanted.keys() | manifest.config.keys())
        if manifest.config.get(key) != wanted.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{out}: holds a dataset of another configuration ({'; '.join(differing)}); "
            "name another folder or remove this one"
        )
    missing = [name for name in manifest.shards if not (out / name).is_file()]
    if missing:
        raise DataError(f"{out / missing[0]}: no such file; remove {out} and run `omnialpha data build`")
    progress(f"dataset {out}: already built with this configuration")
    return manifest


def _prepare(config: DataConfig, fetched: Fetched, cache: Path, progress: Progress) -> dict[str, Library]:
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".prepare.lock", progress):
        foregrounds = prepare(collect_foregrounds(fetched, config.max_foregrounds_per_source), fetched, cache, progress)
        photos = prepare(collect_photos(fetched), fetched, cache, progress)
        more = collect_more(fetched)
        added = Library(
            tuple(prepare(more.foregrounds, fetched, cache, progress)),
            tuple(prepare(more.photos, fetched, cache, progress)),
        )
    libraries = split_library(foregrounds, photos, config)
    libraries["train"] = widened(libraries, added)
    objects, pictures = len(foregrounds) + len(added.foregrounds), len(photos) + len(added.photos)
    progress(f"library: {objects} objects, {pictures} photos")
    return libraries


_worker_state: dict = {}


def _start_worker(config: DataConfig, libraries: dict[str, Library], of_pool: bool = True) -> None:
    if of_pool:  # Ctrl-C reaches every process of a terminal: the builder alone decides, and ends its workers
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_state.update(config=config, libraries=libraries)


def _draw(job: tuple[str, int]) -> list[Record]:
    split, number = job
    return scene_records(_worker_state["libraries"][split], _worker_state["config"], split, number)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Worker processes inherit one thread for numba and OpenMP: more of them fight for the cores (4 times slower)."""
    before = {name: os.environ.get(name) for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _write_splits(
    config: DataConfig, libraries: dict[str, Library], folder: Path, progress: Progress
) -> dict[str, dict[str, int]]:
    jobs = [(split, number) for split in SPLITS for number in range(config.scenes(split))]
    if config.workers == 1:
        _start_worker(config, libraries, of_pool=False)
        return _consume(config, map(_draw, jobs), folder, progress)
    # Spawned, not forked: the caller may hold threads and locks of torch or Ray.
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), context.Pool(config.workers, _start_worker, (config, libraries)) as pool:
        return _consume(config, pool.imap(_draw, jobs, chunksize=16), folder, progress)


def _consume(
    config: DataConfig, drawn: Iterator[list[Record]], folder: Path, progress: Progress
) -> dict[str, dict[str, int]]:
    """Writes scenes to shards as they arrive, in order. Returns the counts by split and task."""
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        scenes, tally = config.scenes(split), Counter[str]()
        total = -(-scenes // config.scenes_per_shard)
        for shard in range(total):
            records: list[Record] = []
            for _ in range(min(config.scenes_per_shard, scenes - shard * config.scenes_per_shard)):
                records += next(drawn)
            write_shard(folder / shard_name(split, shard, total), records)
            tally.update(record.task for record in records)
            progress(f"{split}: shard {shard + 1} of {total}, {sum(tally.values())} records")
        counts[split] = dict(sorted(tally.items()))
    return counts


def _describe(
    config: DataConfig, fetched: Fetched, libraries: dict[str, Library], counts: dict[str, dict[str, int]], folder: Path
) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        config=config.identity(),
        sources=[
            SourceInfo(name=s.name, kind=s.kind, version=s.version, licence=s.licence, checksum=s.checksum)
            for s in fetched.sources
        ],
        skipped_sources=fetched.skipped,
        counts=counts,
        foregrounds={split: len(library.foregrounds) for split, library in libraries.items()},
        photo_groups={split: sorted({p.group for p in library.photos}) for split, library in libraries.items()},
        object_groups={split: sorted({f.group for f in library.foregrounds}) for split, library in libraries.items()},
        shards={path.name: file_sha256(path) for path in sorted(folder.glob("*.parquet"))},
        content_digest=content_digest(folder),
    )
