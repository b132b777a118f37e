"""Reading models that others trained: diffusers folders, safetensors only."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from common.errors import CheckpointError
from policy.vae import IMAGE_CHANNELS, ImageVae

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def load_rgb_vae(folder: Path) -> ImageVae:
    """Loads the VAE of a diffusers folder, in the dtype it is stored in.

    Args:
        folder: a model folder with a ``vae/`` in it, or the VAE's own folder.

    Raises:
        CheckpointError: no VAE there, a class that is not in :data:`policy.vae.IMAGE_CHANNELS`, weights missing,
            damaged, or stored as pickles.
    """
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no vae/config.json or config.json here; give a diffusers model folder or its vae folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place / 'config.json'}: cannot be read ({error}); fetch the folder again") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in IMAGE_CHANNELS:
        raise CheckpointError(f"{place}: a {kind}, not a VAE that is known; give one of {', '.join(IMAGE_CHANNELS)}")
    return load_model(getattr(diffusers, kind), place)


def load_model(kind: Any, place: Path, weights: str = WEIGHTS) -> Any:
    """Loads a model of diffusers or transformers for inference, in the dtype it is stored in.

    Args:
        kind: the model's class.
        place: its folder, with ``config.json`` in it.
        weights: name of the unsharded weights file.

    Raises:
        CheckpointError: weights missing, damaged, stored as pickles, or not those of ``config.json``.
    """
    dtype = _stored_dtype(weight_files(place, weights))
    name = "torch_dtype" if weights == WEIGHTS else "dtype"  # what diffusers and transformers call it
    try:
        model, report = kind.from_pretrained(
            place, local_files_only=True, use_safetensors=True, output_loading_info=True, **{name: dtype}
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{place}: weights and config.json do not fit ({str(error).splitlines()[0]}); fetch the folder again"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{place}: {len(missing)} weights are missing, among them {missing[0]}; fetch the folder again"
        )
    return model.eval()


def weight_files(place: Path, weights: str = WEIGHTS) -> list[Path]:
    """The safetensors files that a model is loaded from: ``weights``, or the shards that its index lists.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    if (place / weights).is_file():
        return [place / weights]
    index = place / f"{weights}.index.json"
    if index.is_file():
        return _shards(index)
    present = sorted(path.name for path in place.iterdir() if path.suffix in (*PICKLES, ".safetensors"))
    if any(name.endswith(PICKLES) for name in present):
        raise CheckpointError(
            f"{place}: holds pickled weights ({', '.join(present)}), which can run any code when read; take the "
            f"safetensors form of this model, or load it where you trust it and `save_pretrained(…, "
            f"safe_serialization=True)`"
        )
    raise CheckpointError(f"{place}: no {weights} here (found: {', '.join(present) or 'no weights'}); fetch it again")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error}); fetch it again") from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(names)} weight files are missing, among them {missing[0]}; "
            "fetch them"
        )
    return [index.parent / name for name in names]


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The dtype of all weights, or float32, which holds them all, where they differ."""
    dtypes = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); fetch it again") from None
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return known.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32
