"""LoRA adapters with PEFT on the transformer: injected, never merged while it trains, saved in PEFT's own format.

The trained adapter is called ``policy``. Where an objective wants the policy that training started from, a frozen
copy called ``reference`` lies beside it, over the same base weights.
"""

import contextlib
import difflib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.config import StrictConfig
from common.errors import CheckpointError, ConfigError
from policy.dit import DitConfig, build_dit
from policy.precision import Precision

POLICY, REFERENCE = "policy", "reference"
FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
UNUSUAL = (
    "use_rslora",
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)
"""PEFT options that change what an adapter computes and that are not carried over."""

ATTENTION = tuple(
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class LoraConfig(StrictConfig):
    """Low-rank adapters (arXiv 2106.09685); only they are trained and published."""

    rank: int = Field(16, ge=1)
    """Rank of every adapter."""
    alpha: int | None = Field(None, ge=1)
    """The update is scaled by alpha / rank; None takes the rank, so by 1."""
    targets: tuple[str, ...] = Field(ATTENTION + MLP, min_length=1)
    """Ends of the names of the linear layers that get one: attention and MLP of the image and the text stream."""
    base_dtype: Precision = "float32"
    """In which the frozen weights are kept; ``bfloat16`` takes half the memory and wants the stage's ``precision`` to
    be bfloat16 as well. The adapter is float32 in both."""


def base_dtype(config: LoraConfig | None) -> Precision:
    """In which the weights that an adapter lies on are kept; float32 where there is none."""
    return config.base_dtype if config else "float32"


def check_targets(config: LoraConfig) -> None:
    """Compares the targets with the transformer's layers, whose names do not depend on its size, but for the number of
    their block, which is left to :func:`add_lora`.

    Raises:
        ConfigError: a target matches no layer; names the nearest that would.
    """
    anywhere = tuple(re.sub(r"(^|transformer_blocks\.)\d+\.", r"\g<1>0.", target) for target in config.targets)
    with torch.device("meta"):
        _matched(build_dit(DitConfig(layers=1), 1, 8, seed=0), config.model_copy(update={"targets": anywhere}))


def add_lora(model: torch.nn.Module, config: LoraConfig, seed: int) -> None:
    """Injects a fresh adapter; the base is frozen. The update starts at zero; its first factor is drawn from ``seed``.

    Raises:
        ConfigError: a target matches no layer.
    """
    _inject(model, _peft_config(config.rank, config.alpha or config.rank, _matched(model, config)), POLICY, seed)


def inject(model: torch.nn.Module, rank: int, alpha: int, layers: list[str], adapter: str) -> None:
    """Puts an adapter with a name of its own on exactly these layers; its update is zero."""
    _inject(model, _peft_config(rank, alpha, layers), adapter)


def keep_in_float32(model: torch.nn.Module) -> None:
    """Brings adapters to float32 that came to lie on a base of fewer bits, whose dtype PEFT gives them."""
    for name, parameter in model.named_parameters():
        if any(f".{adapter}." in name for adapter in (POLICY, REFERENCE)):
            parameter.data = parameter.data.float()


def has_lora(model: torch.nn.Module) -> bool:
    """Whether an adapter was injected."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def trained(state: Mapping[str, torch.Tensor], lora: bool) -> dict[str, torch.Tensor]:
    """The part of a state dict that training changes: all of it, or the adapter named ``policy``."""
    return {name: value for name, value in state.items() if not lora or f".{POLICY}." in name}


def add_reference(model: torch.nn.Module) -> None:
    """Puts a frozen copy of the adapter beside it."""
    state = model.state_dict()
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    first, names = next(iter(layers.values())), list(layers)
    rank, alpha = first.r[POLICY], first.lora_alpha[POLICY]
    _inject(model, _peft_config(rank, alpha, names), REFERENCE)
    keep_in_float32(model)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if f".{REFERENCE}." in name:
                value.copy_(state[name.replace(f".{REFERENCE}.", f".{POLICY}.")])
    _activate(model, POLICY)


@contextlib.contextmanager
def reference_active(model: torch.nn.Module) -> Iterator[None]:
    """The model as training found it, for forward passes without gradient."""
    _activate(model, REFERENCE)
    try:
        yield
    finally:
        _activate(model, POLICY)


def save_adapter(folder: Path, state: Mapping[str, torch.Tensor], config: LoraConfig) -> None:
    """Writes ``adapter/`` in PEFT's format; ``state`` holds the tensors that :func:`trained` names."""
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    plain = {
        PEFT_PREFIX + name.replace(f".{POLICY}.", "."): value.detach().cpu().contiguous()
        for name, value in state.items()
    }
    save_file(plain, target / WEIGHTS)
    _peft_config(config.rank, config.alpha or config.rank, _layers(plain)).save_pretrained(str(target))
    # PEFT keeps the targets as a set: the same adapter should give the same bytes.
    written = json.loads((target / CONFIG).read_text())
    written["target_modules"] = sorted(written["target_modules"])
    (target / CONFIG).write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


def load_adapter(model: torch.nn.Module, folder: Path, config: LoraConfig | None = None) -> None:
    """Injects the adapter of a policy folder, to be trained further or as it is.

    Raises:
        CheckpointError: the adapter cannot be read or does not fit the model.
        ConfigError: it was made with another rank, alpha or other targets than ``config`` asks for.
    """
    source = folder / FOLDER
    try:
        theirs = json.loads((source / CONFIG).read_text())
        rank, alpha = int(theirs["r"]), theirs["lora_alpha"]
        unusual = [key for key in UNUSUAL if theirs.get(key)]
        state = load_file(source / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{source}: cannot be loaded ({str(error).splitlines()[0]})") from None
    if unusual:
        raise CheckpointError(f"{source}: {', '.join(unusual)} is set, which is not supported here; merge it with PEFT")
    if config is not None:
        wanted = (config.rank, config.alpha or config.rank, sorted(_matched(model, config)))
        held = (rank, alpha, _layers(state))
        for what, ours, there in zip(("rank", "alpha", "targets"), wanted, held, strict=True):
            if ours != there:
                shown = f"{there}, the config asks for {ours}" if what != "targets" else "not the config's layers"
                raise ConfigError(
                    f"{source} has another lora.{what} ({shown}); train it on with its own settings, or "
                    "take lora out of the config to merge it and train all weights"
                )
    try:
        _inject(model, _peft_config(rank, alpha, theirs.get("target_modules")), POLICY)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{source}: the adapter does not fit the transformer beside it ({reason})") from None
    slots = trained(model.state_dict(), lora=True)
    plain = {PEFT_PREFIX + name.replace(f".{POLICY}.", "."): value for name, value in slots.items()}
    if plain.keys() != state.keys() or any(plain[name].shape != state[name].shape for name in plain):
        raise CheckpointError(f"{source}: the adapter does not fit the transformer beside it")
    with torch.no_grad():
        for name, value in plain.items():
            value.copy_(state[name])


def merge(model: torch.nn.Module) -> None:
    """Adds the adapter to the base weights and removes it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    model.requires_grad_(True)


def _matched(model: torch.nn.Module, config: LoraConfig) -> list[str]:
    linear = [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    found: list[str] = []
    for target in config.targets:
        hits = [name for name in linear if name == target or name.endswith("." + target)]
        if not hits:
            ends = sorted({name.partition("transformer_blocks.")[2].partition(".")[2] or name for name in linear})
            near = difflib.get_close_matches(target, ends, n=3, cutoff=0.3)
            raise ConfigError(f"lora.targets: {target!r} matches no linear layer of the transformer; near: {near}")
        found += hits
    return list(dict.fromkeys(found))


def _layers(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the layers that an adapter's tensors belong to."""
    return sorted({name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in state})


def _peft_config(rank: int, alpha: int, targets: list[str] | str) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")


def _inject(model: torch.nn.Module, config: peft.LoraConfig, name: str, seed: int = 0) -> None:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # a second adapter, as intended
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, name)


def _activate(model: torch.nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)
