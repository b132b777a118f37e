"""LoRA as diffusers' pipelines exchange it, and OmniAlpha's released folder (``rgba_vae/``, ``lora/``).

A file holds ``transformer.<layer>.lora_A.weight`` (rank × in) and ``…lora_B.weight`` (out × rank). What is written here
has its scale folded into the second factor, so alpha equals the rank, which is what every reader takes where nothing
else is said. Only safetensors are read.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import CheckpointError
from policy.adapters import POLICY, UNUSUAL, LoraConfig, inject, save_adapter
from policy.base import carry_over, check_base, link
from policy.foreign import load_rgb_vae
from policy.vae import image_channels

LORA, RELEASED_VAE = "lora", "rgba_vae"
FILE = "pytorch_lora_weights.safetensors"
PREFIX, METADATA = "transformer.", "lora_adapter_metadata"


@dataclass(frozen=True)
class Lora:
    """An adapter that was read and fits nothing yet."""

    source: Path
    rank: int
    alpha: int
    factors: dict[str, torch.Tensor]
    """``<layer>.lora_A`` and ``<layer>.lora_B`` -> factor."""

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers that it adapts."""
        return sorted({name.rpartition(".")[0] for name in self.factors})


def save_lora(folder: Path, model: torch.nn.Module, adapter: str = POLICY) -> Path:
    """Writes one adapter of a transformer as ``pytorch_lora_weights.safetensors``; stock pipelines read it with
    ``load_lora_weights(folder)``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, module in _adapted(model).items():
        scaled = module.lora_B[adapter].weight * (module.lora_alpha[adapter] / module.r[adapter])
        for part, value in (("lora_A", module.lora_A[adapter].weight), ("lora_B", scaled)):
            state[f"{PREFIX}{name}.{part}.weight"] = value.detach().cpu().contiguous()
    save_file(state, folder / FILE, metadata={"format": "pt"})
    return folder / FILE


def read_lora(path: Path) -> Lora:
    """Reads a LoRA of diffusers' layout.

    Args:
        path: the file, the folder it lies in, or one with that folder as ``lora/``.

    Raises:
        CheckpointError: no such file, a pickle, a damaged file, names of another layout, a factor without its other
            half, or layers of several ranks.
    """
    candidates = [path / LORA / FILE, path / FILE] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), candidates[-1])
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: not a .safetensors file; pickled weights can run any code and are not read")
    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            settings = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[0]}); fetch it again") from None
    factors = {}
    for name, value in state.items():
        layer, _, part = name.removesuffix(".weight").removeprefix(PREFIX).rpartition(".")
        if not name.startswith(PREFIX) or not name.endswith(".weight") or part not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"{file}: {name!r} is not {PREFIX}<layer>.lora_A.weight or .lora_B.weight; save it from diffusers with "
                "save_lora_weights"
            )
        factors[f"{layer}.{part}"] = value
    return _checked(file, factors, {key.removeprefix(PREFIX): value for key, value in settings.items()})


def load_lora(model: torch.nn.Module, lora: Lora, adapter: str = POLICY) -> None:
    """Injects a LoRA under a name of its own; several of them lie side by side, see :func:`activate`.

    Raises:
        CheckpointError: a layer that the transformer lacks, or one of another width; the model is as before.
    """
    check_fit(model, lora)
    inject(model, lora.rank, lora.alpha, lora.layers, adapter)
    with torch.no_grad():
        for name, module in _adapted(model).items():
            if adapter in module.lora_A:
                module.lora_A[adapter].weight.copy_(lora.factors[f"{name}.lora_A"])
                module.lora_B[adapter].weight.copy_(lora.factors[f"{name}.lora_B"])


def check_fit(model: torch.nn.Module, lora: Lora) -> None:
    """Compares a LoRA with the layers of a transformer, which may lie on the meta device.

    Raises:
        CheckpointError: names the first layer that does not fit.
    """
    linear = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for layer in lora.layers:
        if layer not in linear:
            raise CheckpointError(f"{lora.source}: the transformer has no linear layer {layer!r}; is it of this base?")
        module = linear[layer]
        wanted = {"lora_A": (lora.rank, module.in_features), "lora_B": (module.out_features, lora.rank)}
        for part, shape in wanted.items():
            found = tuple(lora.factors[f"{layer}.{part}"].shape)
            if found != shape:
                raise CheckpointError(
                    f"{lora.source}: {layer}.{part} is {found}, the transformer and rank {lora.rank} ask for {shape}; "
                    "it was trained on a base of another width"
                )


def activate(model: torch.nn.Module, strengths: Mapping[str, float]) -> None:
    """Makes adapters act together, each update multiplied by its strength; all others rest."""
    for module in _adapted(model).values():
        module.set_adapter([name for name in strengths if name in module.lora_A])
        for name, strength in strengths.items():
            if name in module.lora_A:
                module.set_scale(name, strength)


@contextlib.contextmanager
def merged(model: torch.nn.Module) -> Iterator[None]:
    """The active adapters inside the base weights, for faster forward passes; afterwards beside them again, where the
    base weights are as before up to the rounding of one addition and one subtraction."""
    layers = _adapted(model).values()
    for module in layers:
        module.merge()
    try:
        yield
    finally:
        for module in layers:
            module.unmerge()


def adopt_release(base: Path, release: Path, target: Path) -> Lora:
    """Writes a policy folder from a base and OmniAlpha's released parts, without reading the base's weights.

    Args:
        base: a folder of Qwen-Image-Edit-2509; its large files are linked where the file system can.
        release: folder with ``rgba_vae/`` and ``lora/pytorch_lora_weights.safetensors``.

    Raises:
        CheckpointError: a part is missing, damaged or does not fit.
    """
    if channels := image_channels(load_rgb_vae(release / RELEASED_VAE)) - 4:
        raise CheckpointError(f"{release / RELEASED_VAE}: has {channels + 4} image channels, layers need 4 (RGBA)")
    lora = read_lora(release)
    with torch.device("meta"):
        settings = QwenImageTransformer2DModel.load_config(base / "transformer", local_files_only=True)
        check_fit(QwenImageTransformer2DModel.from_config(settings), lora)
    shutil.copytree(release / RELEASED_VAE, target / "vae", copy_function=link)
    shutil.copytree(base / "transformer", target / "transformer", copy_function=link)
    carry_over(base, target)
    check_base(target)
    state = {f"{name}.{POLICY}.weight": value for name, value in lora.factors.items()}
    save_adapter(target, state, LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=tuple(lora.layers)))
    return lora


def _checked(file: Path, factors: dict[str, torch.Tensor], settings: dict) -> Lora:
    if not factors:
        raise CheckpointError(f"{file}: holds no tensors; fetch it again")
    for name in factors:
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in factors:
            raise CheckpointError(f"{file}: {name} is there without {other}; fetch it again")
    if unusual := [key for key in UNUSUAL if settings.get(key)]:
        raise CheckpointError(f"{file}: {', '.join(unusual)} is set, which is not supported here; merge it with PEFT")
    ranks = {int(value.shape[0]) for name, value in factors.items() if name.endswith("lora_A")}
    if len(ranks) > 1:
        raise CheckpointError(f"{file}: layers of ranks {sorted(ranks)}; one rank is supported, merge it with PEFT")
    rank = ranks.pop()
    return Lora(file, rank, int(settings.get("lora_alpha", rank)), factors)


def _adapted(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
