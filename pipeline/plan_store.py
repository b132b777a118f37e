"""What GRPO keeps in Ray's object store, counted before anything is sampled."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.tasks import Task, get_task
from pipeline.config import RunConfig
from policy.dit import PATCH

FLOAT = 4
"""Bytes of a float32: what pixels, latents and weights travel in."""


@dataclass(frozen=True)
class StoreNeeds:
    """Bytes in the object store, over all nodes, for groups of the largest task of the mix."""

    pixels: int
    """Of one group's decoded layers, its truth and its inputs."""
    trajectory: int
    """Of what the learner gets of one group, at most: texts may be shorter."""
    weights: int
    """Of one published version."""
    groups: int
    """Alive at once."""
    versions: int
    """Alive at once."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.groups * (self.pixels + self.trajectory) + self.versions * self.weights


def store_needs(config: RunConfig, transformer: Mapping[str, Any], text_tokens: int, trained_bytes: int) -> StoreNeeds:
    """Counts for ``config.grpo``.

    Args:
        config: of the run.
        transformer: settings of the policy's transformer, as its config.json has them.
        text_tokens: longest text.
        trained_bytes: of what is trained in float32, which is what is published.
    """
    grpo, size = config.grpo, config.data.size
    side = size // config.vae.network.factor
    seen, drawn = transformer["in_channels"] // PATCH**2, transformer["out_channels"]
    text = text_tokens * transformer["joint_attention_dim"]

    def pixels(task: Task) -> int:
        images = (grpo.group + 1) * len(task.targets) + len(task.inputs)
        return FLOAT * 4 * size**2 * images

    def trajectory(task: Task) -> int:
        window = grpo.sampling.window.size if grpo.recording.window else 0
        states = 1 + (window + 1) + (window if grpo.recording.means else 0)  # the clean one, the window's, their means
        latents = side**2 * (len(task.inputs) * seen + grpo.group * states * len(task.targets) * drawn)
        return FLOAT * (latents + text + grpo.group * window)

    tasks = [get_task(name) for name, weight in grpo.tasks.items() if weight]
    # A step's groups go when the next one's are there; a version stays while a step that it sampled is under way.
    steps = grpo.max_staleness + 1
    return StoreNeeds(
        max(map(pixels, tasks)),
        max(map(trajectory, tasks)),
        trained_bytes,
        groups=grpo.prompts * steps,
        versions=0 if config.cluster.colocated else steps + 1,
    )
