"""The sequence-to-sequence DiT over stacks of RGBA latents: diffusers' own QwenImageTransformer2DModel.

The sequence lists the m target layers first (back to front), then the n inputs. diffusers gives list entry k the
frame index k, so targets sit at 0…m−1 and inputs at m…m+n−1: the paper's bidirectional layer axis (targets −m…−1,
inputs 0…n−1) shifted by m, which rotary embeddings do not see. Text starts at max(h//2, w//2) on all axes, as in
the stock model.
"""

import torch
from diffusers import QwenImageTransformer2DModel
from pydantic import Field, model_validator

from common.config import StrictConfig

PATCH = 2


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
            in_channels=latent_channels * PATCH**2,
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


def velocity(
    model: torch.nn.Module,
    latents_BMCHW: torch.Tensor,
    sigma_B: torch.Tensor,
    inputs_BNCHW: torch.Tensor,
    text_BTD: torch.Tensor,
    text_mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Velocity of every target latent, shape of ``latents_BMCHW``.

    Args:
        model: the transformer, or an engine that forwards to it.
        sigma_B: noise level of each sample in (0, 1]; also the model's timestep.
        inputs_BNCHW: clean latents of the condition images, N may be 0.
        text_mask_BT: True where a text token is real; None when none is padding.
    """
    b, m, _, h, w = latents_BMCHW.shape
    sequence = to_tokens(torch.cat([latents_BMCHW, inputs_BNCHW.to(latents_BMCHW.dtype)], dim=1))
    shape = (1, h // PATCH, w // PATCH)
    (output,) = model(
        hidden_states=sequence,
        encoder_hidden_states=text_BTD,
        encoder_hidden_states_mask=text_mask_BT,
        timestep=sigma_B,
        img_shapes=[[shape] * (m + inputs_BNCHW.shape[1])] * b,
        return_dict=False,
    )
    return from_tokens(output[:, : m * shape[1] * shape[2]], m, h, w)
