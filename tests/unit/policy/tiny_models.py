"""Networks small enough for the tests, with weights at which every path matters."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor, nn

from policy.dit import DitConfig, build_dit
from policy.group import GroupTrajectory
from policy.sampling import Condition, Trajectory
from policy.vae import VaeConfig, build_vae, set_latent_statistics

CHANNELS, TEXT = 4, 16
DIT = DitConfig(layers=2, heads=2, head_dim=12, rope_axes=(4, 4, 4))
VAE = VaeConfig(channels=(8, 16), latent_channels=CHANNELS, norm_groups=4)


def live_dit(seed: int = 0, text_dim: int = TEXT, channels: int = CHANNELS) -> nn.Module:
    """A transformer away from its initialisation, which would give zero velocity."""
    model = build_dit(DIT, channels, text_dim, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def measured_vae(seed: int = 0) -> nn.Module:
    """A VAE with latent statistics."""
    vae = build_vae(VAE, seed)
    set_latent_statistics(vae, torch.linspace(-0.5, 0.5, CHANNELS), torch.linspace(0.5, 2.0, CHANNELS))
    return vae


def qwen_vae(channels: int = 3, seed: int = 5, latents: int = CHANNELS) -> AutoencoderKLQwenImage:
    """The class of Qwen-Image's VAE with random weights, f8 as the real one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=latents,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            input_channels=channels,
            latents_mean=[0.1 * (k + 1) for k in range(latents)],
            latents_std=[1.0 + k for k in range(latents)],
        )
    return vae.eval().requires_grad_(False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_condition(batch: int, inputs: int = 1, size: int = 4, tokens: int = 5, seed: int = 90) -> Condition:
    """Random condition images and text."""
    return Condition(normal(batch, inputs, CHANNELS, size, size, seed=seed), normal(batch, tokens, TEXT, seed=seed + 1))


def make_group(condition: Condition, result: Trajectory, steps: Iterable[int]) -> GroupTrajectory:
    """What a learner is handed of a sampled group; ``condition`` is the batch of one that its members share."""
    return GroupTrajectory(
        key=(0, 1, 2),
        steps=tuple(steps),
        inputs_NCHW=condition.inputs_BNCHW[0].numpy(),
        text_TD=condition.text_BTD[0].numpy(),
        window_GWMCHW=result.window_BWMCHW.numpy(),
        log_probs_GW=result.log_probs_BW.numpy(),
        clean_GMCHW=result.latents_BMCHW.numpy(),
        means_GWMCHW=result.means_BWMCHW.numpy(),
    )
