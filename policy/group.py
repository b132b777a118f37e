"""A rolled-out group as it crosses processes: numpy arrays, which Ray shares without copying.

A scorer's process reads groups too, and should not load the model code for it, which takes several times as long as
torch: that is imported where it is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from policy.sampling import Condition


@dataclass(frozen=True)
class GroupRequest:
    """What one group is: all of its randomness follows from (seed, step, group)."""

    step: int
    """Training step that asked for it, counted from 1."""
    group: int
    """Number of the group within the step."""
    index: int
    """Record index in the training split."""
    members: int
    """Group size G."""

    @property
    def name(self) -> str:
        """Unique name within a run's lineage."""
        return f"{self.step}.{self.group}"


@dataclass(frozen=True)
class Recording:
    """What the learner's objective wants a rollout to carry."""

    window: bool = True
    """Stochastic window steps with their states and log-probabilities; otherwise all steps are the ODE's."""
    means: bool = False
    """The sampling policy's mean of every window step."""
    times: int = 0
    """Schedule steps per group, drawn from its seed, at which a forward-process loss trains on the clean latents."""


@dataclass(frozen=True)
class GroupMeta:
    """The small part of a group, for the driver."""

    name: str
    task: str
    record: str
    version: int
    """Policy version that sampled the group."""
    steps: int
    """Window steps, each one backward call."""
    tokens: int
    """Sequence length times members times window steps: the learner's cost of the group."""
    seconds: float
    """Sampling time."""


@dataclass(frozen=True)
class GroupTrajectory:
    """What the learner needs to train on a group."""

    key: tuple[int, int, int]
    """(run seed, step, group): what all of the group's randomness follows from."""
    steps: tuple[int, ...]
    """Schedule indices of the trained steps."""
    inputs_NCHW: np.ndarray
    text_TD: np.ndarray
    window_GWMCHW: np.ndarray
    """W + 1 states of each member."""
    log_probs_GW: np.ndarray
    """Log-probabilities as the sampler computed them."""
    clean_GMCHW: np.ndarray
    """Final latents of each member."""
    means_GWMCHW: np.ndarray | None = None
    """Means of the window's transitions as the sampler computed them."""

    def condition(self) -> "Condition":
        """The group's condition, expanded to its members."""
        from policy.sampling import Condition

        single = Condition(torch.tensor(self.inputs_NCHW)[None], torch.tensor(self.text_TD)[None])
        return single.expand(len(self.clean_GMCHW))

    def states(self, place: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Window state ``place`` of every member, (G, M, C, H, W) float32."""
        return torch.tensor(self.window_GWMCHW[:, place]).float().to(device)


@dataclass(frozen=True)
class GroupPixels:
    """What scorers and pictures need: decoded layers, lossless."""

    name: str
    task: str
    prompt: str
    layers_GLCHW: np.ndarray
    """Decoded layers, float32 in [0, 1], straight alpha."""
    targets_LCHW: np.ndarray
    """True layers, float32 in [0, 1]."""
    inputs: tuple[np.ndarray, ...]
    """Input images (4, H, W), float32 in [0, 1]."""
