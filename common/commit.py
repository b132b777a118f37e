"""Atomic commits on a file system: a folder is either complete and verifiable, or it is not there.

Writers fill a temporary folder; :func:`commit` adds ``manifest.json`` (size and checksum of every file, caller's
facts), makes all of it durable and renames the folder into place. Readers believe only folders whose manifest
verifies, so a crash at any moment leaves the last complete commit as the truth.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"
FORMAT = 1
FOREIGN = "written in format"
"""Part of the message about an intact commit of another version, which is never removed."""


@dataclass(frozen=True)
class Commit:
    """A folder whose manifest verified."""

    path: Path
    facts: dict[str, Any]
    """What the writer recorded: step, policy version, sampler position, config hash."""

    @property
    def step(self) -> int:
        return int(self.facts["step"])


def step_folder(root: Path, step: int) -> Path:
    """Where the commit of ``step`` lies under ``root``."""
    return root / f"step-{step:08d}"


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
REFUSAL_TEXTS = ("No space left", "os error 28", "file write failed", "inline_container.cc")
"""How safetensors and torch, which raise their own exceptions, report a full disk."""


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turns a refusal of the file system into one message that says what to do."""
    try:
        yield
    except Exception as error:
        refused = isinstance(error, OSError) and error.errno in REFUSALS
        if isinstance(error, StorageError) or not (refused or any(text in str(error) for text in REFUSAL_TEXTS)):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"{where}: cannot write ({reason}, {free_mib(where)} MiB free); "
            "free space or choose another run_dir, then run the same command again: the last commit is intact"
        ) from error


def free_mib(path: Path) -> int:
    """Free space in MiB on the file system that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 2**20


def begin(final: Path) -> Path:
    """An empty temporary folder beside ``final``; what an interrupted writer left there is removed."""
    temporary = final.with_name(f".tmp-{final.name}")
    with storage_errors(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, final: Path, facts: dict[str, Any]) -> Commit:
    """Makes ``temporary`` durable under the name ``final``.

    An older folder of that name is replaced; it stays until the new one is complete.

    Raises:
        StorageError: the file system refused; the older commit is untouched.
    """
    with storage_errors(final):
        files = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "blake2b": file_checksum(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": FORMAT, "facts": facts, "files": files}
        manifest["blake2b"] = _manifest_checksum(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for path in temporary.rglob("*"):
            _fsync(path)
        _fsync(temporary)
        aside = _aside(final)
        if final.exists():
            # A folder cannot be renamed over a non-empty one: the old one steps aside first, and comes back if the
            # writer dies before the next line (see _recover).
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        try:
            temporary.rename(final)
        except OSError:
            _recover(final)
            raise
        _fsync(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
    return Commit(final, facts)


def verify(path: Path) -> Commit:
    """Reads a commit and checks every file against the manifest.

    Raises:
        CheckpointError: there is no commit, or a file is missing, truncated or altered; names the file.
    """
    _recover(path)
    commit_, files = _read_manifest(path)
    for name, expected in files.items():
        if file_checksum(path / name) != expected["blake2b"]:
            raise CheckpointError(f"{path}: {name} does not match its checksum")
    return commit_


def _read_manifest(path: Path) -> tuple[Commit, dict[str, Any]]:
    """The manifest's facts and files, with everything checked but the files' content."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        written = manifest["format"]
        if written != FORMAT:
            raise CheckpointError(f"{path}: {FOREIGN} {written}, this version reads {FORMAT}")
        checksum, files, facts = manifest.pop("blake2b"), manifest["files"], manifest["facts"]
        sizes = {name: (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in files.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no complete commit here (no {MANIFEST})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({error!r})") from None
    if checksum != _manifest_checksum(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} does not match its checksum")
    for name, (size, _) in sizes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes, not {size}")
    return Commit(path, facts), files


def latest(root: Path, skipped: Callable[[str], None]) -> Commit | None:
    """The newest commit under ``root`` that verifies; ``skipped`` hears why newer ones were passed over."""
    _recover_all(root)
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            return verify(path)
        except CheckpointError as error:
            skipped(str(error))
    return None


def retain(root: Path, keep: int, every: int = 0) -> None:
    """Removes all but the newest ``keep`` complete commits, and whatever interrupted writers left.

    Commits whose step is a multiple of ``every`` stay, too; 0 keeps none for that reason.

    Completeness is judged by manifest and sizes, which is cheap; a damaged folder never counts as one to keep.
    """
    _recover_all(root)
    kept = 0
    for path in sorted(root.glob("step-*"), reverse=True):
        try:
            found, _ = _read_manifest(path)
            kept += 1
        except CheckpointError as error:
            if FOREIGN not in str(error):
                _remove(path)
            continue
        if kept > keep and not (every and found.step % every == 0):
            _remove(path)
    for path in [*root.glob(".tmp-*"), *root.glob(".old-*")]:
        _remove(path)


def _aside(final: Path) -> Path:
    return final.with_name(f".old-{final.name}")


def _recover(final: Path) -> None:
    """Brings back a commit that had stepped aside for one that never arrived."""
    if not final.exists() and _aside(final).exists():
        _aside(final).rename(final)


def _recover_all(root: Path) -> None:
    for path in root.glob(".old-*"):
        _recover(path.with_name(path.name.removeprefix(".old-")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Replaces one small file so that readers see the old text or the new one."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text(text)
        _fsync(temporary)
        temporary.replace(path)


def file_checksum(path: Path) -> str:
    """Hex blake2b-128 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
