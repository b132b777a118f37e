"""What a dataset folder holds and where it came from: ``manifest.json`` beside the shards."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import DataError

MANIFEST = "manifest.json"


class SourceInfo(BaseModel):
    """One source that a dataset was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    version: str
    licence: str
    checksum: str


class Manifest(BaseModel):
    """What a dataset folder holds and where it came from; stored as ``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: str
    config: dict
    sources: list[SourceInfo]
    skipped_sources: dict[str, str]
    """Source -> why it was not used."""
    counts: dict[str, dict[str, int]]
    """Split -> task -> records."""
    foregrounds: dict[str, int]
    """Split -> objects."""
    photo_groups: dict[str, list[str]]
    """Split -> photo groups; no group is in two splits."""
    object_groups: dict[str, list[str]]
    """Split -> object groups; no group is in two splits."""
    shards: dict[str, str]
    """File name -> sha256."""
    content_digest: str
    """See :func:`data.records.content_digest`."""
    skipped_rows: dict[str, int] = {}
    """Why rows of an imported source were left out -> how many."""


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a dataset folder.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; build the dataset with `omnialpha data build`") from None
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: damaged ({first}); remove {folder} and run `omnialpha data build`") from None


def file_sha256(path: Path) -> str:
    """64 hex characters over the bytes of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
