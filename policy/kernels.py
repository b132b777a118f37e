"""One stochastic transition of a flow model and its log-density: the same code samples and replays.

Notation: x latent, v velocity, σ the noise level now, σ′ < σ the next one, dt = σ′ − σ < 0,
x̂₀ = x − σv, x̂₁ = x + (1 − σ)v. Everything here is computed in float32 (float64 stays float64), whatever the
model's dtype; the log-probability is the mean over all non-batch dimensions.

- ``flow_sde``: Flow-GRPO (arXiv 2505.05470), s = η √(σ / (1 − σ*)), σ* = σ except at σ = 1, where it is the
  schedule's next sigma; mean x(1 + s²dt/2σ) + v(1 + s²(1−σ)/2σ)dt, noise scale s√−dt.
- ``dance``: DanceGRPO (arXiv 2505.07818), the same mean with s = η.
- ``cps``: FlowCPS (arXiv 2509.05952), s = σ′ sin(ηπ/2), mean (1−σ′)x̂₀ + √(σ′²−s²) x̂₁, noise scale s, and the
  density without constants, −mean (x′−mean)²: it is not on the scale of the other two, unless ``density`` asks for
  the Gaussian one.

ODE steps are Euler's, or those of DPM-Solver++ (2M) (arXiv 2211.01095) for the flow α = 1 − σ.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator

from common.config import StrictConfig

KernelName = Literal["flow_sde", "dance", "cps"]
PUBLISHED_ETA = {"flow_sde": 0.7, "dance": 0.3, "cps": 0.8}


class KernelConfig(StrictConfig):
    """How noise enters a sampling step inside the window."""

    name: KernelName = "flow_sde"
    """``flow_sde``, ``dance`` or ``cps``."""
    eta: float = PUBLISHED_ETA["flow_sde"]
    """Noise level η > 0 (towards 0 it is the ODE); for ``cps`` at most 1. Left out, the kernel's published one."""
    density: Literal["published", "gaussian"] = "published"
    """Log-density of ``cps``: as published, −mean (x′−mean)², or the Gaussian one. The others are always Gaussian."""

    @property
    def gaussian(self) -> bool:
        """Whether log-probabilities are Gaussian log-densities."""
        return self.name != "cps" or self.density == "gaussian"

    @model_validator(mode="before")
    @classmethod
    def _eta_of_the_kernel(cls, values: Any) -> Any:
        if isinstance(values, dict) and "eta" not in values and values.get("name") in PUBLISHED_ETA:
            return {**values, "eta": PUBLISHED_ETA[values["name"]]}
        return values

    @model_validator(mode="after")
    def _eta_fits(self) -> "KernelConfig":
        if self.eta <= 0 or (self.name == "cps" and self.eta > 1):
            limits = "(0, 1]" if self.name == "cps" else "(0, ∞)"
            raise ValueError(f"eta {self.eta} does not fit {self.name}: it must lie in {limits}")
        return self


@dataclass(frozen=True)
class Transition:
    """A Gaussian step x → x′."""

    mean: torch.Tensor
    """Mean of x′, shape of x."""
    scale: float
    """The actual noise scale of x′ (for ``flow_sde`` s√−dt, not s)."""
    gaussian: bool
    """Whether the log-density carries the Gaussian scale and constants."""

    def log_prob(self, next_latents: torch.Tensor) -> torch.Tensor:
        """Log-density of x′ under this step, mean over non-batch dimensions, shape (B,)."""
        squared = (next_latents.to(self.mean.dtype) - self.mean) ** 2
        per_sample = squared.flatten(1).mean(1)
        if not self.gaussian:
            return -per_sample
        return -per_sample / (2 * self.scale**2) - math.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def cell_log_probs(self, next_latents_BMCHW: torch.Tensor) -> torch.Tensor:
        """Log-density of each cell of x′, mean over its channels, (B, M, H, W) without constants: for ratios."""
        squared = ((next_latents_BMCHW.to(self.mean.dtype) - self.mean) ** 2).mean(2)
        return -squared / (2 * self.scale**2) if self.gaussian else -squared


def transition(
    config: KernelConfig, latents: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float, sigma_1: float
) -> Transition:
    """The stochastic step from ``sigma`` to ``sigma_next``.

    Args:
        latents, velocity: (B, ...).
        sigma_1: the schedule's second sigma, which stands in for σ* at σ = 1.

    Raises:
        ValueError: the step ends at σ′ = 0, which is always an ODE step.
    """
    if not sigma_next > 0:
        raise ValueError("the last step of a schedule is an ODE step: it has no density")
    work = torch.promote_types(latents.dtype, torch.float32)
    x, v = latents.to(work), velocity.to(work)
    dt = sigma_next - sigma
    if config.name == "cps":
        scale = sigma_next * math.sin(config.eta * math.pi / 2)
        clean, noise = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - sigma_next) * clean + math.sqrt(max(sigma_next**2 - scale**2, 0.0)) * noise
        return Transition(mean, scale, gaussian=config.gaussian)
    if config.name == "dance":
        s = config.eta
    else:
        s = config.eta * math.sqrt(sigma / (1 - (sigma_1 if sigma >= 1 else sigma)))
    drift = s**2 / (2 * sigma) * dt
    mean = x * (1 + drift) + v * (dt + drift * (1 - sigma))
    return Transition(mean, s * math.sqrt(-dt), gaussian=True)


def standard_kl(mean: torch.Tensor, other: torch.Tensor, scale: float) -> torch.Tensor:
    """KL of two Gaussians of one scale, per dimension: mean (μ − μ′)² / (2·scale²) over non-batch dimensions, (B,)."""
    return ((mean - other) ** 2).flatten(1).mean(1) / (2 * scale**2)


def ode_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """Euler step of the probability-flow ODE, x + v·dt."""
    work = torch.promote_types(latents.dtype, torch.float32)
    return latents.to(work) + (sigma_next - sigma) * velocity.to(work)


def dpm_step(
    latents: torch.Tensor,
    clean: torch.Tensor,
    previous: torch.Tensor | None,
    sigmas: tuple[float | None, float, float],
) -> torch.Tensor:
    """Second-order multistep ODE step, DPM-Solver++ (2M) with data prediction (Algorithm 2 of arXiv 2211.01095).

    With λ = log((1 − σ)/σ), h = λ′ − λ and r the ratio of the previous h to this one,
    x′ = (σ′/σ)x + (1 − σ′/σ)D, D = x̂₀ + (x̂₀ − previous x̂₀)/(2r).

    Args:
        clean: x̂₀ predicted at this step.
        previous: x̂₀ predicted one step earlier; None on the first step.
        sigmas: (σ one step earlier, σ, σ′). From σ = 1 and to σ′ = 0 the step is of first order, which is Euler's.
    """
    before, sigma, sigma_next = sigmas
    work = torch.promote_types(latents.dtype, torch.float32)
    x, direction = latents.to(work), clean.to(work)
    if previous is not None and before is not None and before < 1 and sigma_next > 0:
        snr = [math.log((1 - value) / value) for value in (before, sigma, sigma_next)]
        ratio = (snr[1] - snr[0]) / (snr[2] - snr[1])
        direction = direction + (direction - previous.to(work)) / (2 * ratio)
    return x * (sigma_next / sigma) + (1 - sigma_next / sigma) * direction
