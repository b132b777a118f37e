"""The files of ``omnialpha sample``: which pictures it reads, which it writes, one by one or a folder at a time."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from data.tasks import Task

log = logging.getLogger("omnialpha")

OPTIONS = {"image": "--input", "foreground": "--input", "background": "--input", "mask": "--mask"}
"""The option that brings each input role of the task table."""
LAYERED = ".ora"
FORMATS = (".png", LAYERED)
"""What results are written as: a PNG per layer, or one OpenRaster file with all of them."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2")
"""What is taken for a picture in a folder."""


@dataclass(frozen=True)
class Job:
    """The files of one picture."""

    inputs: dict[str, Path]
    """Role -> file, in the order of the task's inputs."""
    outputs: list[list[Path]]
    """Files of each result: one, or one per layer back to front and a preview."""


def plan_jobs(task: "Task", options: argparse.Namespace, count: int) -> list[Job]:
    """One job for a picture, or one for each picture of a folder. Makes the output folder, so that one that cannot be
    written is known before the work.

    Raises:
        ConfigError: the options do not fit the task, or results would overwrite inputs or each other.
        DataError: a folder without pictures, or a picture without its mask.
    """
    given = _inputs(task, options)
    folders = {role: path for role, path in given.items() if path.is_dir()}
    if not folders:
        _check_format(options.out)
        jobs = [Job(given, _outputs(task, options.out, count))]
    elif len(folders) < len(given):
        lone = next(path for role, path in given.items() if role not in folders)
        raise ConfigError(f"{lone} is no folder, but {next(iter(folders.values()))} is; give pictures or folders alike")
    else:
        jobs = _batch(task, given, options, count)
    read = {path.resolve() for job in jobs for path in job.inputs.values()}
    written = [path for job in jobs for names in job.outputs for path in names]
    if taken := read & {path.resolve() for path in written}:
        raise ConfigError(f"--out would overwrite {taken.pop()}, which is an input; name another file or folder")
    _make_folder(written[0].parent)
    return jobs


def _inputs(task: "Task", options: argparse.Namespace) -> dict[str, Path]:
    """Role -> file or folder, exactly as the task table wants it."""
    # Of the roles that share --input the task has at most one; "image" stands for them where it has none.
    roles = {"--input": picture_role(task) or "image", "--mask": "mask"}
    given = {role: path for option, role in roles.items() if (path := getattr(options, option.strip("-"))) is not None}
    if given.keys() != set(task.inputs):
        wanted = " and ".join(OPTIONS[role] for role in task.inputs) or "no pictures, only --prompt"
        missing = [OPTIONS[role] for role in task.inputs if role not in given]
        superfluous = [OPTIONS[role] for role in given if role not in task.inputs]
        remedy = [f"add {' and '.join(missing)}"] * bool(missing)
        remedy += [f"leave out {' and '.join(superfluous)}"] * bool(superfluous)
        raise ConfigError(f"{task.name} takes {wanted}; {', '.join(remedy)}")
    return {role: given[role] for role in task.inputs}


def picture_role(task: "Task") -> str | None:
    """The role of the input that is no mask."""
    return next((role for role in task.inputs if role != "mask"), None)


def _check_format(out: Path) -> None:
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--out {out} must end in .png or {LAYERED}, which keep layers and alpha without loss; only with a folder "
            "as --input is it a folder"
        )


def _batch(task: "Task", folders: dict[str, Path], options: argparse.Namespace, count: int) -> list[Job]:
    """A job per picture of the first input's folder; the others have a picture of the same name, but for its ending."""
    by_stem = {role: _pictures(folder) for role, folder in folders.items()}
    first, *others = folders
    jobs = []
    for stem, path in by_stem[first].items():
        if missing := [folders[role] for role in others if stem not in by_stem[role]]:
            raise DataError(f"{path}: no picture named {stem} in {missing[0]}; add it or take the picture out")
        inputs = {role: by_stem[role][stem] for role in folders}
        jobs.append(Job(inputs, _outputs(task, options.out / f"{stem}.{options.format}", count)))
    return jobs


def _pictures(folder: Path) -> dict[str, Path]:
    """Stem -> picture, by name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURES or not path.is_file():
            continue
        if path.stem in found:
            raise DataError(f"{path}: {found[path.stem].name} has the same name but for its ending; rename one of them")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder}: no pictures in it ({', '.join(PICTURES)})")
    return found


def _outputs(task: "Task", out: Path, count: int) -> list[list[Path]]:
    """Files of each result. Several results are numbered; so are several layers, back to front, before the preview."""
    stems = [f"{out.stem}-{k + 1:0{len(str(count))}d}" for k in range(count)] if count > 1 else [out.stem]
    parts = [""]
    if len(task.targets) > 1 and out.suffix.lower() != LAYERED:
        parts = [f"-{k}-{role}" for k, role in enumerate(task.targets)] + ["-preview"]
    return [[out.with_name(f"{stem}{part}{out.suffix}") for part in parts] for stem in stems]


def _make_folder(folder: Path) -> None:
    from data.schema import storage_error

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


def read_pictures(job: Job) -> "dict[str, np.ndarray]":
    """Role -> pixels (H, W, 4) of a job's inputs.

    Raises:
        DataError: a picture cannot be read, or a mask marks nothing or has not its picture's size.
    """
    from data.images import marked, read_image

    pixels = {role: read_image(path) for role, path in job.inputs.items()}
    if "mask" in pixels:
        sizes = {role: f"{image.shape[1]}x{image.shape[0]}" for role, image in pixels.items()}
        if sizes["mask"] != sizes["image"]:
            raise DataError(
                f"{job.inputs['mask']}: {sizes['mask']} pixels, but {job.inputs['image']} has {sizes['image']}; a mask "
                "has its picture's size"
            )
        if not marked(pixels["mask"]).any():
            raise DataError(f"{job.inputs['mask']}: marks nothing; paint the object white on black")
    return pixels


def write_layers(layers: "Sequence[np.ndarray]", roles: Sequence[str], names: Sequence[Path]) -> None:
    """Writes one result, layers (H, W, 4) back to front, to its files.

    Raises:
        StorageError: the file system refused; a file is whole or not there.
    """
    from data.images import preview
    from data.openraster import encode_openraster
    from data.rgba import encode_png
    from data.schema import storage_error

    if names[0].suffix.lower() == LAYERED:
        contents = [encode_openraster(layers, roles)]
    else:
        contents = [encode_png(picture) for picture in [*layers, *[preview(layers)] * (len(layers) > 1)]]
    for content, path in zip(contents, names, strict=True):
        temporary = path.with_name(f".{path.name}.tmp")  # a full disk leaves no half picture
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise storage_error(error, path) from error
        log.info("wrote %s", path)
