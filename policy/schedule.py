"""Noise levels of a sampling run, and the part of it that is stochastic and trained."""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from common.config import StrictConfig
from data.seeding import seed_for

Solver = Literal["euler", "dpm2m"]


class ScheduleConfig(StrictConfig):
    """The sequence of noise levels σ from 1 to 0."""

    steps: int = Field(10, ge=2)
    """Number of denoising steps N."""
    shift: float = Field(3.0, gt=0)
    """Time shift k: σ = k·u / (1 + (k − 1)u) over an even grid of u (the paper's code uses 3)."""
    solver: Solver = "euler"
    """ODE steps: first-order Euler, or the second-order multistep DPM-Solver++ (2M)."""

    def sigmas(self) -> list[float]:
        """N + 1 levels, 1 first and 0 last."""
        u = np.linspace(1.0, 0.0, self.steps + 1)
        return [float(value) for value in self.shift * u / (self.shift * u + (1 - u))]


class WindowConfig(StrictConfig):
    """Which steps are stochastic and trained; all others are ODE steps (MixGRPO, arXiv 2507.21802)."""

    size: int = Field(4, ge=1)
    """Number of trained steps."""
    start: int = Field(0, ge=0)
    """First trained step of a fixed window, and where a progressive one begins."""
    movement: Literal["fixed", "random", "progressive"] = "random"
    """``fixed``; ``random``: drawn per group from (seed, step, group); ``progressive``: moves on with training."""
    every: int = Field(10, ge=1)
    """Training steps that a progressive window stays before it moves by its size. It wraps round where the next one
    would not fit: eligible steps that are left over at the end are not trained."""


class SamplingConfig(StrictConfig):
    """Schedule and window of rollouts."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise levels."""
    window: WindowConfig = WindowConfig()
    """The stochastic, trained steps."""

    @model_validator(mode="after")
    def _window_fits(self) -> "SamplingConfig":
        eligible = self.schedule.steps - 1
        start = 0 if self.window.movement == "random" else self.window.start
        if start + self.window.size > eligible:
            raise ValueError(
                f"a window of {self.window.size} steps from step {start} does not fit: of {self.schedule.steps} "
                f"sampling steps the first {eligible} can be trained (the last one is an ODE step)"
            )
        return self

    def window_steps(self, seed: int, step: int, group: int) -> range:
        """Indices of the trained steps of one group. Never empty; a function of its arguments alone."""
        size, last_start = self.window.size, self.schedule.steps - 1 - self.window.size
        match self.window.movement:
            case "fixed":
                start = self.window.start
            case "random":
                start = int(np.random.default_rng(seed_for(seed, "window", step, group)).integers(0, last_start + 1))
            case "progressive":
                moves = (last_start - self.window.start) // size + 1
                start = self.window.start + size * ((step // self.window.every) % moves)
        return range(start, start + size)
