"""``omnialpha sample``: a trained policy on a picture of one's own, in this process."""

import argparse
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data.images import Letterbox
    from data.tasks import Task

log = logging.getLogger("omnialpha")

OPTIONS = {"image": "--input", "foreground": "--input", "background": "--input", "mask": "--mask"}
"""The option that brings each input role of the task table."""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("sample", help="apply a trained policy to a picture of yours")
    parser.add_argument("--policy", type=Path, required=True, help="model folder, such as runs/demo/grpo/final/model")
    parser.add_argument("--task", required=True, help="what to do, such as automatic_matting or object_removal")
    parser.add_argument("--input", type=Path, help="the picture, for tasks that take one")
    parser.add_argument("--mask", type=Path, help="white marks the object, for tasks that take a mask")
    parser.add_argument("--prompt", help="instruction; default: the task's own, where it names no object")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write; several layers add their name to it")
    parser.add_argument("--colours", choices=("model", "input"), help="of foregrounds; default: input for matting")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--shift", type=float, help="time shift of the noise levels")
    parser.add_argument("--solver", choices=("euler", "dpm2m"), help="of the denoising steps")
    parser.add_argument("--seed", type=int, help="of the initial noise")
    parser.add_argument("--count", type=int, help="number of results, each from its own noise")
    parser.add_argument("--size", type=int, help="side of the model's square: the policy's training size")
    parser.set_defaults(handler=_sample)


def _sample(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    import torch
    import transformers

    from common.config import validate
    from data.images import Letterbox, read_image
    from data.tasks import get_task
    from policy.folder import named_policy, trained_size
    from policy.infer import InferConfig, Policy

    folder = named_policy(options.policy)
    given = {"schedule": _given(options, "steps", "shift", "solver"), **_given(options, "seed", "count", "size")}
    if recorded := trained_size(folder):
        given.setdefault("size", recorded)
    config = validate(InferConfig, given, "sample")
    task = get_task(options.task)
    # Everything that can be wrong is checked before the policy loads.
    prompt = _prompt(task, options.prompt)
    paths = _inputs(task, options)
    from_input = _takes_input_colours(task, options.colours)
    outputs = _outputs(task, options.out, config.count, list(paths.values()))
    pixels = {role: read_image(path) for role, path in paths.items()}
    _check_mask(pixels, paths)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()  # of loading a text encoder that takes no time
    policy = Policy(folder)
    policy.check_size(config.size)
    box = None
    if picture := _picture(task):
        height, width = pixels[picture].shape[:2]
        box = Letterbox.fit(height, width, config.size, policy.patch, str(paths[picture]))
    layers_GLCHW = policy.infer(task, _conditions(task, box, pixels), prompt, config)
    for layers_LCHW, names in zip(layers_GLCHW, outputs, strict=True):
        layers = [
            _at_native_size(layer, box, pixels["image"] if from_input and role == "foreground" else None)
            for layer, role in zip(layers_LCHW, task.targets, strict=True)
        ]
        _write(layers, names)
    log.info("%d x %s in %.1f s: %r", config.count, task.name, time.perf_counter() - start, prompt)


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What the person set; everything else keeps its default from the config class."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _prompt(task: "Task", given: str | None) -> str:
    if given is not None and given.strip():
        return given
    template = task.instructions[0]
    if "{caption}" in template or given is not None:
        raise ConfigError(f"{task.name} wants --prompt, for example {template.format(caption='a red apple')!r}")
    return template


def _inputs(task: "Task", options: argparse.Namespace) -> dict[str, Path]:
    """Role -> file, exactly as the task table wants it."""
    # Of the roles that share --input the task has at most one; "image" stands for them where it has none.
    roles = {"--input": _picture(task) or "image", "--mask": "mask"}
    given = {role: path for option, role in roles.items() if (path := getattr(options, option.strip("-"))) is not None}
    if given.keys() != set(task.inputs):
        wanted = " and ".join(OPTIONS[role] for role in task.inputs) or "no pictures, only --prompt"
        missing = [OPTIONS[role] for role in task.inputs if role not in given]
        superfluous = [OPTIONS[role] for role in given if role not in task.inputs]
        remedy = [f"add {' and '.join(missing)}"] * bool(missing)
        remedy += [f"leave out {' and '.join(superfluous)}"] * bool(superfluous)
        raise ConfigError(f"{task.name} takes {wanted}; {', '.join(remedy)}")
    return {role: given[role] for role in task.inputs}


def _takes_input_colours(task: "Task", choice: str | None) -> bool:
    """Whether foregrounds show the input's colours. Matting cuts them out of it; other tasks paint what it hides."""
    if choice == "input" and not ("image" in task.inputs and task.foregrounds):
        raise ConfigError(f"{task.name} cuts no foreground out of an input; leave out --colours input")
    return choice == "input" or (choice is None and bool(task.inputs and task.foregrounds) and not task.backgrounds)


def _picture(task: "Task") -> str | None:
    """The role of the input that is no mask."""
    return next((role for role in task.inputs if role != "mask"), None)


def _outputs(task: "Task", out: Path, count: int, inputs: list[Path]) -> list[list[Path]]:
    """Files of each sample: one layer is one file, several are numbered back to front and followed by the preview.

    Makes the folder, so that one that cannot be written is known before the work.
    """
    from data.schema import storage_error

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} must end in .png, which keeps layers and alpha without loss")
    stems = [f"{out.stem}-{k + 1:0{len(str(count))}d}" for k in range(count)] if count > 1 else [out.stem]
    parts = [f"-{k}-{role}" for k, role in enumerate(task.targets)] + ["-preview"] if len(task.targets) > 1 else [""]
    files = [[out.with_name(f"{stem}{part}{out.suffix}") for part in parts] for stem in stems]
    if taken := {path.resolve() for path in inputs} & {path.resolve() for names in files for path in names}:
        raise ConfigError(f"--out would overwrite {taken.pop()}, which is an input; name another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, out.parent) from error
    return files


def _check_mask(pixels: "dict[str, np.ndarray]", paths: dict[str, Path]) -> None:
    from common.errors import DataError
    from data.images import marked

    if "mask" not in pixels:
        return
    sizes = {role: f"{image.shape[1]}x{image.shape[0]}" for role, image in pixels.items()}
    if sizes["mask"] != sizes["image"]:
        raise DataError(
            f"{paths['mask']}: {sizes['mask']} pixels, but {paths['image']} has {sizes['image']}; a mask has its "
            "picture's size"
        )
    if not marked(pixels["mask"]).any():
        raise DataError(f"{paths['mask']}: marks nothing; paint the object white on black")


def _conditions(task: "Task", box: "Letterbox | None", pixels: "dict[str, np.ndarray]") -> "list[Tensor]":
    if box is None:
        return []
    import torch

    def condition(role: str) -> "Tensor":
        if role == "foreground":
            return torch.from_numpy(box.layer(pixels[role])).permute(2, 0, 1) / 255
        return box.mask(pixels[role]) if role == "mask" else box.image(pixels[role])

    return [condition(role) for role in task.inputs]


def _at_native_size(layer: "Tensor", box: "Letterbox | None", photo: "np.ndarray | None") -> "np.ndarray":
    from data.images import cut_out, native_layer
    from data.rgba import to_uint8_hwc

    if box is None:
        return to_uint8_hwc(layer)
    return native_layer(layer, box) if photo is None else cut_out(layer, box, photo)


def _write(layers: "list[np.ndarray]", names: list[Path]) -> None:
    from data.images import preview
    from data.rgba import encode_png
    from data.schema import storage_error

    pictures = [*layers, preview(layers)] if len(layers) > 1 else layers
    for picture, path in zip(pictures, names, strict=True):
        temporary = path.with_name(f".{path.name}.tmp")  # a full disk leaves no half picture
        try:
            temporary.write_bytes(encode_png(picture))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise storage_error(error, path) from error
        log.info("wrote %s", path)
