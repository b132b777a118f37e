"""Losses as pure functions of tensors. Sums are returned with their counts, so that whoever knows the global count
divides by it: a rank that holds fewer samples must not weigh them more."""

from dataclasses import dataclass

import torch

# Mean and mean square of ImageNet backgrounds per channel in [−1, 1] space (AlphaVAE, arXiv 2507.09308).
BACKGROUND_MEAN = (-0.0357, -0.0811, -0.1797)
BACKGROUND_MEAN_SQUARE = (0.3163, 0.3060, 0.3634)


@dataclass(frozen=True)
class ClippedLoss:
    """Per-sample clipped losses of one transition and what the step record wants to know about them."""

    losses_B: torch.Tensor
    ratios_B: torch.Tensor
    clipped_B: torch.Tensor
    """True where the clip took the gradient away."""


def clipped_loss(log_ratios_B: torch.Tensor, advantages_B: torch.Tensor, clip_range: float) -> ClippedLoss:
    """max(−A·r, −A·clip(r, 1 − ε, 1 + ε)) with r = exp(log ratio) (PPO; Flow-GRPO, arXiv 2505.05470)."""
    ratios = torch.exp(log_ratios_B)
    free = -advantages_B * ratios
    bounded = -advantages_B * ratios.clamp(1 - clip_range, 1 + clip_range)
    return ClippedLoss(torch.maximum(free, bounded), ratios.detach(), (bounded > free).detach())


def cells_like(values_BLhw: torch.Tensor, like_BMHW: torch.Tensor) -> torch.Tensor:
    """Values of coarse cells at the cells of ``like``: of one layer for all of them, or layer by layer."""
    values = torch.nn.functional.adaptive_avg_pool2d(values_BLhw, (like_BMHW.shape[-2], like_BMHW.shape[-1]))
    return values.expand(like_BMHW.shape)


def guarded_log_ratio(log_ratios_B: torch.Tensor, drift_B: torch.Tensor, scale: float) -> torch.Tensor:
    """(Δlog p + mean (Δμ)²/(2·scale²))·scale, the ratio of GRPO-Guard (arXiv 2510.22319).

    The expectation of Δlog p under the old policy is −mean (Δμ)²/(2·scale²): what the drift gives back. Multiplying by
    the step's noise scale makes all steps' ratios spread alike.

    Args:
        drift_B: the KL of the step from its old mean, :func:`policy.kernels.standard_kl`, with gradient.
    """
    return (log_ratios_B + drift_B) * scale


def nft_loss(
    velocity_BMCHW: torch.Tensor,
    old_velocity_BMCHW: torch.Tensor,
    noisy_BMCHW: torch.Tensor,
    clean_BMCHW: torch.Tensor,
    time: float,
    advantages_B: torch.Tensor,
    beta: float,
    advantage_max: float,
) -> torch.Tensor:
    """Forward-process loss of DiffusionNFT (arXiv 2509.16117), (B,).

    v⁺ = βv + (1−β)v_old and v⁻ = (1+β)v_old − βv predict x̂₀± = x_t − t·v±; a sample with advantage A pulls x̂₀⁺ to
    itself with weight r = clip(A/(2·A_max) + ½, 0, 1) and x̂₀⁻ with 1 − r:
    A_max·(r·L⁺ + (1−r)·L⁻)/β, L± = mean (x̂₀± − x₀)² / max(mean |x̂₀± − x₀|, 1e-5), the divisor without gradient.
    """
    old = old_velocity_BMCHW.detach()

    def part(mixed: torch.Tensor) -> torch.Tensor:
        error = (noisy_BMCHW - time * mixed - clean_BMCHW).flatten(1)
        return (error**2).mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)

    positive = part(beta * velocity_BMCHW + (1 - beta) * old)
    negative = part((1 + beta) * old - beta * velocity_BMCHW)
    weight = (advantages_B / (2 * advantage_max) + 0.5).clamp(0, 1)
    return advantage_max * (weight * positive + (1 - weight) * negative) / beta


def shifted_times(uniform_B: torch.Tensor, shift: float) -> torch.Tensor:
    """Training noise levels t = k·u / (1 + (k − 1)u): uniform for shift 1, more noise for larger ones."""
    return shift * uniform_B / (1 + (shift - 1) * uniform_B)


def flow_matching_pair(
    clean_BMCHW: torch.Tensor, noise_BMCHW: torch.Tensor, times_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rectified flow: Z_t = (1 − t)Z₀ + tZ₁ and its target velocity Z₁ − Z₀ (Eq. 3 of arXiv 2511.20211 v2)."""
    t = times_B.view(-1, 1, 1, 1, 1)
    return (1 - t) * clean_BMCHW + t * noise_BMCHW, noise_BMCHW - clean_BMCHW


def alpha_blend_mse(output_B4HW: torch.Tensor, target_B4HW: torch.Tensor) -> torch.Tensor:
    """Squared error of the blend over a random background, in expectation over backgrounds.

    With P = x̂_rgb·x̂_α − x_rgb·x_α and Δ = x̂_α − x_α the blends over b differ by P − Δ·b, so the expectation is
    ‖P‖² − 2Δ⟨E[b], P⟩ + Δ²E[b²] (Eq. 6–8 of AlphaVAE, arXiv 2507.09308). Inputs in [−1, 1], α taken to [0, 1].
    Returns the mean over pixels and channels.
    """
    mean = output_B4HW.new_tensor(BACKGROUND_MEAN).view(3, 1, 1)
    mean_square = output_B4HW.new_tensor(BACKGROUND_MEAN_SQUARE).view(3, 1, 1)
    alpha_out, alpha = (output_B4HW[:, 3:] + 1) / 2, (target_B4HW[:, 3:] + 1) / 2
    product = output_B4HW[:, :3] * alpha_out - target_B4HW[:, :3] * alpha
    delta = alpha_out - alpha
    return (product**2 - 2 * delta * mean * product + delta**2 * mean_square).mean()


def gaussian_kl(mean_BCHW: torch.Tensor, logvar_BCHW: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, var) ‖ N(0, I)), mean over all elements."""
    return 0.5 * (mean_BCHW**2 + logvar_BCHW.exp() - 1 - logvar_BCHW).mean()


def gaussian_kl_between(posterior_BCHW: torch.Tensor, reference_BCHW: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, var) ‖ N(reference's mean, var)), mean over all elements.

    Both are diffusers' moments: mean and log-variance stacked along the channels; log-variances are clamped to
    [−30, 20] as diffusers does.
    """
    mean, logvar = posterior_BCHW.chunk(2, dim=1)
    other_mean, other_logvar = reference_BCHW.chunk(2, dim=1)
    logvar, other_logvar = logvar.clamp(-30, 20), other_logvar.clamp(-30, 20)
    spread = (logvar - other_logvar).exp() + (mean - other_mean) ** 2 / other_logvar.exp()
    return 0.5 * (spread - 1 - logvar + other_logvar).mean()
