"""Sampling stacks of RGBA latents from the DiT: ODE steps outside the window, recorded SDE steps inside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from data.seeding import seed_for
from policy.dit import Stack, guided, velocity
from policy.kernels import KernelConfig, dpm_step, ode_step, transition
from policy.schedule import Solver

GroupNoise = Literal["independent", "shared", "mirrored"]
"""How the noises of a group's members belong together: ``independent``; ``shared``: all members start from one noise;
``mirrored``: members 2k and 2k + 1 start from one noise, and in the window the second has the first's noise negated."""


@dataclass(frozen=True)
class Condition:
    """What a batch of samples is conditioned on."""

    inputs_BNCHW: Stack
    """Normalised latents of the input images; N tensors (B, C, H, W) where their sizes differ."""
    text_BTD: torch.Tensor
    """Text states."""
    text_mask_BT: torch.Tensor | None = None
    """True where a text token is real; None where none is padding."""

    def expand(self, count: int) -> "Condition":
        """Repeats a batch of one for every member of a group."""
        mask = None if self.text_mask_BT is None else self.text_mask_BT.expand(count, -1)
        inputs: Stack
        if isinstance(self.inputs_BNCHW, torch.Tensor):
            inputs = self.inputs_BNCHW.expand(count, -1, -1, -1, -1)
        else:
            inputs = [image.expand(count, -1, -1, -1) for image in self.inputs_BNCHW]
        return Condition(inputs, self.text_BTD.expand(count, -1, -1), mask)

    def to(self, device: torch.device) -> "Condition":
        """The same on another device."""
        mask = None if self.text_mask_BT is None else self.text_mask_BT.to(device)
        inputs: Stack
        if isinstance(self.inputs_BNCHW, torch.Tensor):
            inputs = self.inputs_BNCHW.to(device)
        else:
            inputs = [image.to(device) for image in self.inputs_BNCHW]
        return Condition(inputs, self.text_BTD.to(device), mask)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: away from another condition."""

    negative: Condition
    """Same inputs, the text to move away from."""
    scale: float
    """1 is no guidance; see :func:`policy.dit.guided`."""


@dataclass(frozen=True)
class Trajectory:
    """A sampled batch and the transitions inside its window."""

    latents_BMCHW: torch.Tensor
    """Clean latents at σ = 0."""
    window_BWMCHW: torch.Tensor
    """The window's W + 1 states: entry w is the state before window step w, entry w + 1 the one after."""
    log_probs_BW: torch.Tensor
    """Log-density of each window step under the sampling policy."""
    means_BWMCHW: torch.Tensor
    """Mean of each window step under the sampling policy."""


def member_noise(shape: Sequence[int], seed: int, step: int, group: int, member: int, name: str) -> torch.Tensor:
    """Standard normal noise of one group member: a function of its arguments alone, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed_for(seed, "noise", step, group, member, name))
    return torch.randn(tuple(shape), generator=generator)


def initial_noise(shape: Sequence[int], key: tuple[int, int, int], members: int, kind: GroupNoise) -> torch.Tensor:
    """(members, *shape) that a group's members start from; ``key`` is seed, step and group."""
    source = {"independent": range(members), "shared": [0] * members, "mirrored": [g - g % 2 for g in range(members)]}
    return torch.stack([member_noise(shape, *key, g, "initial") for g in source[kind]])


def step_noise(
    shape: Sequence[int], key: tuple[int, int, int], members: int, kind: GroupNoise, step: int
) -> torch.Tensor:
    """(members, *shape) for the stochastic sampling step number ``step``."""
    odd = 1 if kind == "mirrored" else 0
    drawn = [member_noise(shape, *key, g - odd * (g % 2), f"step {step}") for g in range(members)]
    return torch.stack([-drawn[g] if odd * (g % 2) else drawn[g] for g in range(members)])


@torch.no_grad()
def denoise(
    model: torch.nn.Module,
    condition: Condition,
    initial_BMCHW: torch.Tensor,
    sigmas: Sequence[float],
    window: range = range(0),
    kernel: KernelConfig | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
    storage: torch.dtype = torch.float32,
    solver: Solver = "euler",
    guidance: Guidance | None = None,
) -> Trajectory:
    """Integrates from noise at σ = 1 to clean latents.

    Args:
        initial_BMCHW: standard normal latents. They, the condition and the model lie on one device.
        sigmas: N + 1 noise levels, falling to 0.
        window: steps taken by ``kernel`` with ``noise(step)`` (B, M, C, H, W) from any device
            instead of the ODE.
        storage: dtype in which window states are kept. States are rounded to it before their density is computed,
            so a replay of the stored states meets exactly the same numbers.
        solver: of the ODE steps. A step after a stochastic one is of first order: the noise broke the history.
        guidance: doubles the work of a step.
    """

    def predict(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        sigma_B = torch.full((len(latents),), sigma, dtype=latents.dtype, device=latents.device)
        conditions = [condition] if guidance is None else [condition, guidance.negative]
        found = [velocity(model, latents, sigma_B, c.inputs_BNCHW, c.text_BTD, c.text_mask_BT) for c in conditions]
        return found[0] if guidance is None else guided(found[0], found[1], guidance.scale)

    latents, previous = initial_BMCHW, None
    states: list[torch.Tensor] = []
    log_probs: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    for step in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        if step in window:
            latents = latents.to(storage).to(initial_BMCHW.dtype)
            states.append(latents.to(storage))
        v = predict(latents, sigma).to(latents.dtype)
        if step in window:
            assert kernel is not None
            assert noise is not None
            move = transition(kernel, latents, v, sigma, sigma_next, sigmas[1])
            latents = (move.mean + move.scale * noise(step).to(move.mean)).to(storage).to(initial_BMCHW.dtype)
            log_probs.append(move.log_prob(latents))
            means.append(move.mean)
            previous = None
            if step == window[-1]:
                states.append(latents.to(storage))
        elif solver == "dpm2m":
            clean = latents - sigma * v
            before = sigmas[step - 1] if step else None
            latents = dpm_step(latents, clean, previous, (before, sigma, sigma_next)).to(initial_BMCHW.dtype)
            previous = clean
        else:
            latents = ode_step(latents, v, sigma, sigma_next).to(initial_BMCHW.dtype)
    empty = initial_BMCHW.new_zeros(len(initial_BMCHW), 0)
    return Trajectory(
        latents_BMCHW=latents,
        window_BWMCHW=torch.stack(states, 1) if states else empty,
        log_probs_BW=torch.stack(log_probs, 1) if log_probs else empty,
        means_BWMCHW=torch.stack(means, 1) if means else empty,
    )
