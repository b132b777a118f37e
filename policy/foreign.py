"""Reading VAEs that others trained: diffusers folders with an RGB VAE."""

import json
from pathlib import Path

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
    dtype = _stored_dtype(_weight_files(place))
    try:
        model, report = getattr(diffusers, kind).from_pretrained(
            place, local_files_only=True, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
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


def _weight_files(place: Path) -> list[Path]:
    """The safetensors files that diffusers would load.

    Raises:
        CheckpointError: there are none.
    """
    if (place / WEIGHTS).is_file():
        return [place / WEIGHTS]
    index = place / f"{WEIGHTS}.index.json"
    if index.is_file():
        return sorted(place.glob(f"{WEIGHTS.removesuffix('.safetensors')}-*.safetensors"))
    present = sorted(path.name for path in place.iterdir() if path.suffix in (*PICKLES, ".safetensors"))
    if any(name.endswith(PICKLES) for name in present):
        raise CheckpointError(
            f"{place}: holds pickled weights ({', '.join(present)}), which can run any code when read; take the "
            f"safetensors form of this model, or load it where you trust it and `save_pretrained(…, "
            f"safe_serialization=True)`"
        )
    raise CheckpointError(f"{place}: no {WEIGHTS} here (found: {', '.join(present) or 'no weights'}); fetch it again")


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
