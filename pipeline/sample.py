"""``omnialpha sample``: a trained policy, or a real base, on pictures of one's own, in this process."""

import argparse
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from common.errors import ConfigError, DataError
from pipeline.sample_files import Job, picture_role, plan_jobs, read_pictures, write_layers

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from data.images import Fit, Letterbox
    from data.tasks import Task

log = logging.getLogger("omnialpha")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("sample", help="apply a trained policy to pictures of yours")
    parser.add_argument(
        "--policy", type=Path, required=True, help="model folder, such as runs/demo/grpo/final/model, or a real base"
    )
    parser.add_argument("--task", required=True, help="what to do, such as automatic_matting or object_removal")
    parser.add_argument("--input", type=Path, help="the picture, or a folder of them, for tasks that take one")
    parser.add_argument("--mask", type=Path, help="white marks the object, for tasks that take a mask")
    parser.add_argument("--prompt", help="instruction; default: the task's own, where it names no object")
    parser.add_argument(
        "--out", type=Path, required=True, help=".png (several layers add their name) or .ora to write; or a folder"
    )
    parser.add_argument("--format", choices=("png", "ora"), default="png", help="of results in a folder")
    parser.add_argument("--colours", choices=("model", "input"), help="of foregrounds; default: input for matting")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--shift", type=float, help="time shift of the noise levels")
    parser.add_argument("--solver", choices=("euler", "dpm2m"), help="of the denoising steps")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    parser.add_argument("--negative", help="prompt that guidance leads away from")
    parser.add_argument("--seed", type=int, help="of the initial noise")
    parser.add_argument("--count", type=int, help="number of results, each from its own noise")
    parser.add_argument("--size", type=int, help="side of the model's square, or of a base's area; default: as trained")
    parser.set_defaults(handler=_sample)


Draw: TypeAlias = "Callable[[Task, dict[str, np.ndarray], str, str], tuple[Tensor, Fit | None]]"
"""(task, pixels by role, prompt, where) -> layers_GLCHW, and the way back to native size."""


@dataclass(frozen=True)
class Sampler:
    """How a kind of policy meets pictures."""

    count: int
    """Results per picture."""
    open: Callable[[], Draw]
    """Loads the policy."""


def _sample(options: argparse.Namespace) -> None:
    import torch
    import transformers

    from data.tasks import get_task
    from policy.base import is_base
    from policy.folder import named_policy

    folder = named_policy(options.policy)
    sampler = _of_base(folder, options) if is_base(folder) else _of_policy(folder, options)
    task = get_task(options.task)
    # Everything that can be wrong is checked before the policy loads.
    prompt = _prompt(task, options.prompt)
    from_input = _takes_input_colours(task, options.colours)
    jobs = plan_jobs(task, options, sampler.count)
    pixels = read_pictures(jobs[0]) if len(jobs) == 1 else None
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()  # of loading a text encoder that takes no time
    draw = sampler.open()

    def work(job: Job, pixels: "dict[str, np.ndarray]") -> None:
        start = time.perf_counter()
        layers_GLCHW, fit = draw(task, pixels, prompt, _where(task, job))
        for layers_LCHW, names in zip(layers_GLCHW, job.outputs, strict=True):
            layers = [
                _at_native_size(layer, fit, pixels["image"] if from_input and role == "foreground" else None)
                for layer, role in zip(layers_LCHW, task.targets, strict=True)
            ]
            write_layers(layers, task.targets, names)
        log.info("%d x %s in %.1f s: %r", sampler.count, task.name, time.perf_counter() - start, prompt)

    if pixels is not None:
        work(jobs[0], pixels)
    else:
        _work_through(jobs, work)


def _work_through(jobs: list[Job], work: "Callable[[Job, dict[str, np.ndarray]], None]") -> None:
    """One bad picture does not keep the others from their results."""
    failed: list[str] = []
    for number, job in enumerate(jobs, start=1):
        try:
            work(job, read_pictures(job))
        except DataError as error:
            failed.append(str(error))
            log.warning("picture %d of %d left out: %s", number, len(jobs), error)
        else:
            log.info("picture %d of %d", number, len(jobs))
    if failed:
        raise DataError(f"{len(failed)} of {len(jobs)} pictures were left out; first: {failed[0]}")


def _of_policy(folder: Path, options: argparse.Namespace) -> Sampler:
    """A policy that a stage wrote: it works on squares, in which pictures are letterboxed."""
    from common.config import validate
    from data.images import Letterbox
    from policy.folder import trained_size
    from policy.infer import InferConfig, Policy

    given: dict[str, Any] = {"schedule": _given(options, "steps", "shift", "solver")}
    given |= _given(options, "guidance", "negative", "seed", "count", "size")
    if recorded := trained_size(folder):
        given.setdefault("size", recorded)
    config = validate(InferConfig, given, "sample")

    def load() -> Draw:
        policy = Policy(folder)
        policy.check_size(config.size)

        def draw(task: "Task", pixels: "dict[str, np.ndarray]", prompt: str, where: str) -> "tuple[Tensor, Fit | None]":
            box = None
            if picture := picture_role(task):
                height, width = pixels[picture].shape[:2]
                box = Letterbox.fit(height, width, config.size, policy.patch, where)
            inputs = [] if box is None else [_in_square(role, box, pixels[role]) for role in task.inputs]
            return policy.infer(task, inputs, prompt, config), box

        return draw

    return Sampler(config.count, load)


def _of_base(folder: Path, options: argparse.Namespace) -> Sampler:
    """A real base: it takes pictures of any size and scales them itself."""
    import torch

    from common.config import validate
    from data.images import Stretch, native_mask
    from policy.base import check_base
    from policy.edit import EditConfig, EditPolicy, canvas

    names = ("steps", "shift", "solver", "guidance", "negative", "seed", "count", "size")
    config = validate(EditConfig, _given(options, *names), "sample")
    check_base(folder)

    def load() -> Draw:
        policy = EditPolicy(folder, "cuda" if torch.cuda.is_available() else "cpu")

        def draw(task: "Task", pixels: "dict[str, np.ndarray]", prompt: str, where: str) -> "tuple[Tensor, Fit | None]":
            fit = None
            if picture := picture_role(task):
                height, width = pixels[picture].shape[:2]
                fit = Stretch((height, width), canvas(height, width, config.size, where))
            inputs = [
                native_mask(image) if role == "mask" else torch.from_numpy(image).permute(2, 0, 1) / 255
                for role, image in pixels.items()
            ]
            return policy.infer(task, inputs, prompt, config), fit

        return draw

    return Sampler(config.count, load)


def _where(task: "Task", job: Job) -> str:
    """The picture's file, for errors."""
    role = picture_role(task)
    return str(job.inputs[role]) if role else ""


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


def _takes_input_colours(task: "Task", choice: str | None) -> bool:
    """Whether foregrounds show the input's colours. Matting cuts them out of it; other tasks paint what it hides."""
    if choice == "input" and not ("image" in task.inputs and task.foregrounds):
        raise ConfigError(f"{task.name} cuts no foreground out of an input; leave out --colours input")
    return choice == "input" or (choice is None and bool(task.inputs and task.foregrounds) and not task.backgrounds)


def _in_square(role: str, box: "Letterbox", pixels: "np.ndarray") -> "Tensor":
    import torch

    if role == "foreground":
        return torch.from_numpy(box.layer(pixels)).permute(2, 0, 1) / 255
    return box.mask(pixels) if role == "mask" else box.image(pixels)


def _at_native_size(layer: "Tensor", fit: "Fit | None", photo: "np.ndarray | None") -> "np.ndarray":
    from data.images import cut_out, native_layer
    from data.rgba import to_uint8_hwc

    if fit is None:
        return to_uint8_hwc(layer)
    return native_layer(layer, fit) if photo is None else cut_out(layer, fit, photo)
