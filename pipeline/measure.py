"""Held-out records, sampled and measured with the policy that whoever samples holds: for evaluation and the gaming
watch."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.reward import Measured, RewardPool
from actors.rollout import Rollouts
from common.errors import DataError
from data.records import Record, RecordDataset
from pipeline.config import RunConfig
from rewards.combine import scalar_rewards

log = logging.getLogger("omnialpha")


@dataclass(frozen=True)
class HeldOut:
    """Fixed records of a split, in chunks of one task that are sampled together."""

    split: str
    chunks: tuple[tuple[str, tuple[int, ...]], ...]
    """(task, record indices)."""
    records: tuple[Record, ...]
    """All of them without pixels, in the chunks' order."""

    @classmethod
    def choose(cls, config: RunConfig, split: str, tasks: Sequence[str] | None, most: int) -> "HeldOut":
        """The first ``most`` records of each task that the split has, and of ``tasks`` where they are given.

        Raises:
            DataError: the split has none.
        """
        data, size = RecordDataset(config.dataset_folder, split), config.evaluate.batch
        present = [task for task in data.tasks if tasks is None or task in tasks]
        if not present:
            raise DataError(
                f"{config.dataset_folder}: split {split!r} has no record of {', '.join(tasks or ())}; it has "
                f"{', '.join(data.tasks)}: take a dataset with such records, or set grpo.watch.every=0"
            )
        chosen = {task: [int(i) for i in data.positions(task)[:most]] for task in present}
        sizes = data.sizes
        chunks = tuple(
            (task, tuple(alike[k : k + size]))
            for task, indices in chosen.items()
            for alike in _of_one_size(indices, sizes)
            for k in range(0, len(alike), size)
        )
        return cls(split, chunks, tuple(data.cheap(index) for _, indices in chunks for index in indices))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for task, _ in self.chunks))

    def first(self, task: str) -> int:
        """Number of a task's first chunk."""
        return next(number for number, (name, _) in enumerate(self.chunks) if name == task)


def _of_one_size(indices: Sequence[int], sizes: Sequence[tuple[int, int] | None]) -> list[list[int]]:
    """Records that can be sampled together, in the order in which their sizes come up."""
    found: dict[tuple[int, int] | None, list[int]] = {}
    for index in indices:
        found.setdefault(sizes[index], []).append(index)
    return list(found.values())


def measure(
    config: RunConfig,
    rollouts: Rollouts,
    rewards: RewardPool,
    held: HeldOut,
    what: str,
    features: bool = False,
) -> tuple[list[Measured], list[Any]]:
    """One deterministic sample per record from the actors' current policy: (measurements in the records' order, each
    chunk's pixels by reference); with ``features`` also what distances of whole sets need."""
    results = rollouts.generate(held.split, [indices for _, indices in held.chunks], config.evaluate.schedule)
    scores, pixels = [], []
    for (task, _), (count, groups) in zip(held.chunks, results, strict=True):  # as they come into being
        scores.append(rewards.measure(task, count, groups, features))
        pixels.append(groups)
    measured = rewards.measured(scores, what)
    if reasons := Counter(reason for entry in measured for reason in entry.reasons):
        log.warning("%s: %d scores are missing: %s", what, reasons.total(), reasons.most_common(3))
    return measured, pixels


def quantity(config: RunConfig, entry: Measured, label: str) -> float:
    """One number of a measured record by its label: ``reward`` (weighted mean of the raw terms), ``term/<name>`` or a
    metric's name. NaN where the record has none."""
    if label.startswith("term/"):
        return entry.terms.get(label.removeprefix("term/"), float("nan"))
    if label != "reward":
        return entry.metrics.get(label, float("nan"))
    if not entry.terms:
        return float("nan")
    weights = {term.name: term.weight for term in config.rewards.terms}
    scores_T1 = np.array([[value] for value in entry.terms.values()])
    return float(scalar_rewards(scores_T1, [weights[name] for name in entry.terms])[0])
