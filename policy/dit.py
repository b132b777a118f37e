"""The sequence-to-sequence DiT over stacks of RGBA latents: diffusers' own QwenImageTransformer2DModel.

The sequence lists the m target layers first (back to front), then the n inputs. diffusers gives list entry k the
frame index k, so targets sit at 0…m−1 and inputs at m…m+n−1: the paper's bidirectional layer axis (targets −m…−1,
inputs 0…n−1) shifted by m, which rotary embeddings do not see. Text starts at max(h//2, w//2) on all axes, as in
the stock model.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from pydantic import Field, model_validator

from common.config import StrictConfig
from common.errors import ConfigError

PATCH = 2
SIGHT_CHANNELS = 40 + 112 + 320
"""Channels that :mod:`policy.sight` adds to the latents of an input image."""
AXIS = 4096
"""Places on each axis of the stock position embedding."""

Stack: TypeAlias = torch.Tensor | Sequence[torch.Tensor]
"""K images: (B, K, C, H, W), or K of (B, C, H, W) whose sizes may differ."""


class DitConfig(StrictConfig):
    """Size of a freshly initialised transformer."""

    layers: int = Field(4, ge=1)
    """Number of dual-stream blocks."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    head_dim: int = Field(48, ge=6)
    """Width of a head; model width is heads × head_dim."""
    rope_axes: tuple[int, int, int] = (8, 20, 20)
    """Rotary dimensions of the layer, height and width axes; even numbers that sum to head_dim."""
    sight: bool = False
    """Whether input images also bring what an ImageNet network sees in them (policy/sight.py)."""

    @model_validator(mode="after")
    def _axes_fit(self) -> "DitConfig":
        if sum(self.rope_axes) != self.head_dim or any(axis % 2 for axis in self.rope_axes):
            raise ValueError(f"rope_axes {self.rope_axes} must be even and sum to head_dim {self.head_dim}")
        return self


def build_dit(config: DitConfig, latent_channels: int, text_dim: int, seed: int) -> QwenImageTransformer2DModel:
    """A transformer with weights drawn from ``seed``; its output starts at zero velocity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QwenImageTransformer2DModel(
            patch_size=PATCH,
            in_channels=(latent_channels + config.sight * SIGHT_CHANNELS) * PATCH**2,
            out_channels=latent_channels,
            num_layers=config.layers,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=text_dim,
            axes_dims_rope=config.rope_axes,
        )
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
        for block in model.transformer_blocks:  # adaLN-Zero (arXiv 2212.09748): blocks start as the identity
            for modulation in (block.img_mod[-1], block.txt_mod[-1]):
                torch.nn.init.zeros_(modulation.weight)
                torch.nn.init.zeros_(modulation.bias)
    return model


def to_tokens(latents_BKCHW: torch.Tensor) -> torch.Tensor:
    """(B, K, C, H, W) → (B, K·H/2·W/2, 4C), the patch order of diffusers' Qwen-Image pipelines."""
    b, k, c, h, w = latents_BKCHW.shape
    patches = latents_BKCHW.reshape(b, k, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, k * (h // PATCH) * (w // PATCH), c * PATCH**2)


def from_tokens(tokens_BTC: torch.Tensor, k: int, h: int, w: int) -> torch.Tensor:
    """Inverse of :func:`to_tokens` for latents of ``h`` × ``w``."""
    b, _, channels = tokens_BTC.shape
    patches = tokens_BTC.reshape(b, k, h // PATCH, w // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, k, channels // PATCH**2, h, w)


def check_axis(sizes: Sequence[tuple[int, int]], text: int) -> None:
    """Checks that a sequence has a place on the axes of the position embedding.

    Args:
        sizes: (height, width) of each image's latents, targets first.
        text: number of text tokens.

    Raises:
        ConfigError: more layers, larger images or more text than the axes hold. The stock model would take them and
            fail on the shape of a rotation, or not at all.
    """
    longest = max(max(size) for size in sizes) // PATCH
    if len(sizes) > AXIS:
        raise ConfigError(f"{len(sizes)} layers and inputs: the layer axis holds {AXIS}; ask for fewer layers")
    if (longest + 1) // 2 + text > AXIS:  # images are centred on their axes, and text follows the longest half side
        raise ConfigError(
            f"images of {longest} patches a side with {text} text tokens: the model's axes hold {AXIS} places; "
            "take smaller images or a shorter prompt"
        )


def velocities(
    model: torch.nn.Module,
    latents: Sequence[torch.Tensor],
    sigma_B: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    text_BTD: torch.Tensor,
    text_mask_BT: torch.Tensor | None = None,
    channels: int = 0,
) -> list[torch.Tensor]:
    """Velocity of every target latent, each of its target's shape; images may differ in size.

    Args:
        model: the transformer, or an engine that forwards to it.
        latents: of the M targets, back to front, each (B, C, H, W).
        sigma_B: noise level of each sample in (0, 1]; also the model's timestep.
        inputs: clean latents of the N condition images, each (B, C, H, W); N may be 0.
        text_mask_BT: True where a text token is real; None where none is padding.
        channels: least number that the model takes in. Inputs may bring more than latents have (:mod:`policy.sight`);
            what has fewer is zero there.

    Raises:
        ConfigError: the sequence does not fit the model's axes.
    """
    images = [*latents, *(image.to(latents[0].dtype) for image in inputs)]
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    check_axis(sizes, text_BTD.shape[1])
    tokens = [to_tokens(image[:, None]) for image in images]
    wide = max(channels * PATCH**2, *(token.shape[-1] for token in tokens))
    (output,) = model(
        hidden_states=torch.cat([F.pad(token, (0, wide - token.shape[-1])) for token in tokens], dim=1),
        encoder_hidden_states=text_BTD,
        encoder_hidden_states_mask=text_mask_BT,
        # The stock pipelines count time in thousands and divide again; the model multiplies it by 1000 and shows even
        # the last bit that this rounds.
        timestep=sigma_B * 1000 / 1000,
        img_shapes=[[(1, h // PATCH, w // PATCH) for h, w in sizes]] * len(images[0]),
        return_dict=False,
    )
    targets = sizes[: len(latents)]
    lengths = [(h // PATCH) * (w // PATCH) for h, w in targets]
    parts = output[:, : sum(lengths)].split(lengths, dim=1)
    return [from_tokens(part, 1, h, w)[:, 0] for part, (h, w) in zip(parts, targets, strict=True)]


def velocity(
    model: torch.nn.Module,
    latents_BMCHW: torch.Tensor,
    sigma_B: torch.Tensor,
    inputs: Stack,
    text_BTD: torch.Tensor,
    text_mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`velocities` of targets of one size, shape of ``latents_BMCHW``; inputs may have other sizes."""
    if isinstance(inputs, torch.Tensor):
        images, channels = inputs.unbind(1), inputs.shape[2]  # the channels are known even where there is no input
    else:
        images, channels = tuple(inputs), 0
    targets = latents_BMCHW.unbind(1)
    return torch.stack(velocities(model, targets, sigma_B, images, text_BTD, text_mask_BT, channels), dim=1)


def guided(velocity_BMCHW: torch.Tensor, negative_BMCHW: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance with rescaling: negative + scale·(velocity − negative), every token at the length that
    it has without guidance. What ``true_cfg_scale`` does in diffusers' Qwen-Image pipelines."""
    m, _, h, w = velocity_BMCHW.shape[1:]
    tokens, negative = to_tokens(velocity_BMCHW), to_tokens(negative_BMCHW)
    combined = negative + scale * (tokens - negative)
    length, combined_length = (torch.norm(value, dim=-1, keepdim=True) for value in (tokens, combined))
    tiny = torch.finfo(combined.dtype).tiny  # a still model has no direction to rescale
    return from_tokens(combined * (length / combined_length.clamp_min(tiny)), m, h, w)
