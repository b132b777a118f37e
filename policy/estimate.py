"""What training a transformer holds in memory and computes, counted without allocating it.

Two and three blocks are run under ``FakeTensorMode``, which knows shapes and computes nothing; all but the first,
whose inputs may need no gradient, are alike, so every number is linear in their count. Attention counts as fused
(no score matrix is kept), which is what runs on GPUs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from policy.adapters import LoraConfig, add_lora
from policy.dit import PATCH, velocity

ADAM_BYTES = 8
"""Two float32 moments of a trained weight."""


@dataclass(frozen=True)
class Footprint:
    """One training step of one micro-batch on one rank, before ZeRO shares anything."""

    base_bytes: int
    """Weights that are not trained."""
    trained_bytes: int
    """Weights that are trained; their gradients take as much."""
    optimiser_bytes: int
    """Moments of AdamW."""
    activation_bytes: int
    """What the forward pass keeps for the backward pass; with recomputation also what one block keeps while it is
    computed again."""
    latent_bytes: int
    """Latents and text states of the micro-batch."""
    forward_flops: int
    """Multiplications and additions of a forward pass."""
    trained: int
    """Number of trained weights."""
    recomputed: bool = False
    """Whether the backward pass computes the blocks' activations again."""

    def per_rank(self, zero_stage: int, ranks: int) -> int:
        """Bytes on each rank: ZeRO 1 shares the optimiser's state, 2 the gradients too, 3 the weights too."""
        share = [ranks if zero_stage >= stage else 1 for stage in (1, 2, 3)]
        weights = (self.base_bytes + self.trained_bytes) // share[2]
        shared = weights + self.trained_bytes // share[1] + self.optimiser_bytes // share[0]
        return shared + self.activation_bytes + self.latent_bytes

    def step_flops(self, micro_batches: int) -> int:
        """Operations of an optimiser step: a backward pass costs twice its forward pass, once where the weights it
        passes through are frozen; recomputation is one more forward pass."""
        return micro_batches * self.forward_flops * ((3 if not self.base_bytes else 2) + self.recomputed)


def footprint(
    settings: Mapping[str, Any],
    lora: LoraConfig | None,
    batch: int,
    images: int,
    side: int,
    text_tokens: int,
    base_dtype: torch.dtype = torch.float32,
    recomputed: bool = False,
) -> Footprint:
    """Counts for a transformer of diffusers' ``settings`` (its config.json).

    Args:
        lora: the adapter that is trained, in float32, on a frozen base; None trains all weights.
        batch: samples of a micro-batch.
        images: targets and inputs of a sample; one of them is a target.
        side: of the latents.
        base_dtype: of the frozen weights, or of all where all are trained.
        recomputed: with gradient checkpointing.
    """
    layers, sizes = int(settings["num_layers"]), (batch, images, side, text_tokens)
    two, three = (_counted(settings, lora, n, sizes, base_dtype, recomputed) for n in (2, 3))
    whole: list[Any] = [a + (b - a) * (layers - 2) for a, b in zip(two, three, strict=True)]
    return replace(Footprint(*whole), recomputed=recomputed)


def _counted(settings, lora, layers, sizes, dtype, recomputed) -> tuple[int, ...]:
    batch, images, side, text_tokens = sizes
    with torch.device("meta"):
        model = QwenImageTransformer2DModel.from_config({**settings, "num_layers": layers})
        if lora is not None:
            add_lora(model, lora, 0)
        if recomputed:
            model.enable_gradient_checkpointing()
    with FakeTensorMode():
        _put_on_cpu(model, dtype)
        channels = model.config.in_channels // PATCH**2
        latents = torch.zeros(batch, images, channels, side, side, dtype=dtype)
        text = torch.zeros(batch, text_tokens, model.config.joint_attention_dim, dtype=dtype)
        kept, flops = _forward(model, latents, text, recomputed)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    held = _bytes(latents) + _bytes(text)
    count = sum(p.numel() for p in trained)
    trained_bytes = sum(p.numel() * (4 if lora else p.element_size()) for p in trained)
    return sum(map(_bytes, frozen)), trained_bytes, ADAM_BYTES * count, kept, held, flops, count


def _put_on_cpu(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives a model on the meta device fakes of tensors on the CPU, where attention is fused; on meta it is not."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
    positions = model.pos_embed  # diffusers keeps its tables as plain attributes
    for name in ("pos_freqs", "neg_freqs"):
        table = getattr(positions, name)
        setattr(positions, name, torch.empty(table.shape, dtype=table.dtype))


def _forward(model: torch.nn.Module, latents: torch.Tensor, text: torch.Tensor, recomputed: bool) -> tuple[int, int]:
    """(bytes kept for the backward pass, operations) of a forward pass."""
    own = {p.untyped_storage()._cdata: None for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:  # a storage that several operations keep is held once, and alive so that its
            kept[storage._cdata] = (storage.nbytes(), tensor)  # address is not given to another
        return tensor

    flops = 0

    def count(module: torch.nn.Linear, args: Any, output: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * output.numel() * module.in_features

    given: list[Any] = []
    block: Any = list(model.get_submodule("transformer_blocks").children())[-1]
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    hooks.append(block.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        velocity(model, latents[:, :1], torch.ones(len(latents), dtype=latents.dtype), latents[:, 1:], text)
    for hook in hooks:
        hook.remove()
    if recomputed:  # one block at a time is computed again, and then keeps what it would have kept
        args, kwargs = given[0]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(*args, **kwargs)
    tokens = latents.shape[1] * (latents.shape[-1] // PATCH) ** 2 + text.shape[1]
    settings: Any = model.config
    width = settings.num_attention_heads * settings.attention_head_dim
    # Scores and their product with the values: two products of tokens x tokens x width.
    attention = 4 * len(latents) * tokens**2 * width * settings.num_layers
    return sum(size for size, _ in kept.values()), flops + attention


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
