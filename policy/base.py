"""A real base on disk: a folder in the layout of diffusers' QwenImageEditPlusPipeline (Qwen-Image-Edit-2509).

What can be wrong with it is looked for in its JSON files before sixty gigabytes of weights are read.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from common.errors import CheckpointError
from policy.adapters import FOLDER, load_adapter
from policy.dit import PATCH
from policy.foreign import WEIGHTS, load_model, weight_files

INDEX = "model_index.json"
PIPELINE = "QwenImageEditPlusPipeline"
TEXT_WIDTH = 3584
"""Width of the states of the Qwen2.5-VL in Qwen-Image-Edit-2509."""
TEXT_WEIGHTS = "model.safetensors"
SETTINGS = {
    "scheduler": ("scheduler_config.json",),
    "vae": ("config.json",),
    "transformer": ("config.json",),
    "text_encoder": ("config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Part of the folder -> the files of which one describes it."""
CLASSES = {
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "vae": "AutoencoderKLQwenImage",
    "transformer": "QwenImageTransformer2DModel",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
}
VARIANTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Switches of the transformer's class that other models of the family use. ``zero_cond_t`` (Edit-2511) takes every
image but the first for an input, so it does not fit several targets."""


def is_base(folder: Path) -> bool:
    """Whether a policy folder is a pipeline of diffusers, and not one that a stage of ours wrote."""
    try:
        return bool(_read(folder / INDEX).get("_class_name") != "OmniAlpha")
    except CheckpointError:
        return (folder / "text_encoder").is_dir()


@dataclass(frozen=True)
class Base:
    """The loaded parts that sampling calls itself; the condition encoder reads its own."""

    transformer: QwenImageTransformer2DModel
    vae: AutoencoderKLQwenImage
    scheduler: FlowMatchEulerDiscreteScheduler


def load_base(folder: Path, device: torch.device) -> Base:
    """Loads transformer (with the adapter beside it, where there is one), VAE and scheduler as they are stored.

    Raises:
        CheckpointError: what :func:`check_base` finds, or weights that do not fit.
    """
    check_base(folder)
    transformer = load_model(QwenImageTransformer2DModel, folder / "transformer")
    if (folder / FOLDER).is_dir():
        load_adapter(transformer, folder)
    vae = load_model(AutoencoderKLQwenImage, folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    return Base(transformer.requires_grad_(False).to(device), vae.requires_grad_(False).to(device), scheduler)


def carry_over(start: Path, folder: Path) -> None:
    """Completes a folder with a trained VAE and transformer by the index and the other parts of the base ``start``.

    Files are linked where the file system can, since the text encoder alone is 16 GB; nobody writes into them.
    """
    for part in SETTINGS:
        if part not in ("vae", "transformer"):
            shutil.copytree(start / part, folder / part, copy_function=link)
    shutil.copyfile(start / INDEX, folder / INDEX)


def link(source: str, target: str) -> None:
    """A hard link to a file, or a copy of it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def check_base(folder: Path) -> None:
    """Checks that a folder is a whole base for RGBA layers, reading no weights.

    Raises:
        CheckpointError: another pipeline, a part that is missing or of another class, pickled weights, an RGB VAE, or
            parts that do not fit each other.
    """
    pipeline = _read(folder / INDEX).get("_class_name")
    if pipeline != PIPELINE:
        raise CheckpointError(f"{folder}: a {pipeline}; give a folder of a {PIPELINE}, such as Qwen-Image-Edit-2509")
    if absent := [part for part in SETTINGS if not (folder / part).is_dir()]:
        raise CheckpointError(f"{folder}: no {', '.join(absent)} in it; fetch the whole folder again")
    settings = {part: _read(*(folder / part / name for name in names)) for part, names in SETTINGS.items()}
    for part, kind in CLASSES.items():
        found = settings[part].get("_class_name") or ", ".join(settings[part].get("architectures") or ["?"])
        if found != kind:
            raise CheckpointError(f"{folder / part}: of class {found}, not {kind}; take the part of the base")
    for part in ("vae", "transformer", "text_encoder"):
        weight_files(folder / part, TEXT_WEIGHTS if part == "text_encoder" else WEIGHTS)
    _check_fit(folder, settings)


def _check_fit(folder: Path, settings: dict[str, dict[str, Any]]) -> None:
    vae, transformer, text = (settings[part] for part in ("vae", "transformer", "text_encoder"))
    channels = vae.get("input_channels", 3)
    if channels != 4:
        raise CheckpointError(
            f"{folder / 'vae'}: an RGB VAE ({channels} channels), layers need RGBA; convert it with `omnialpha "
            f"vae-convert {folder} OUT` and put OUT/vae in its place, or take an RGBA VAE that was trained"
        )
    if unusual := [name for name in VARIANTS if transformer.get(name)]:
        raise CheckpointError(
            f"{folder / 'transformer'}: {', '.join(unusual)} is set, as in another model of the family; take the "
            "transformer of Qwen-Image-Edit-2509"
        )
    latents = vae.get("z_dim", 16)
    _agree(folder, "transformer in_channels", transformer.get("in_channels"), "vae z_dim x 4", latents * PATCH**2)
    width = (text.get("text_config") or text).get("hidden_size")
    _agree(folder, "transformer joint_attention_dim", transformer.get("joint_attention_dim"), "text width", width)


def _agree(folder: Path, name: str, value: Any, other_name: str, other: Any) -> None:
    if value != other:
        raise CheckpointError(
            f"{folder}: {name} is {value}, {other_name} is {other}: parts of different models; fetch them together"
        )


def _read(*candidates: Path) -> dict[str, Any]:
    """The first of the JSON files that is there."""
    path: Path = next((path for path in candidates if path.is_file()), candidates[0])
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give a whole diffusers folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no settings; fetch it again")
    return content
