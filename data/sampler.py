"""Deterministic multi-task sampling: what to draw is a pure function of the position, so a resume replays nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError, DataError
from data.seeding import seed_for

CYCLE = 60
"""Draws after which the schedule of tasks repeats: divisible by 2 to 6, so common weights come out exact."""

_CACHED_PERMUTATIONS = 16


@dataclass(frozen=True)
class Draw:
    """What one position of the training stream asks for."""

    task: str
    indices: np.ndarray
    """Record indices, shape (count,), int64, into the dataset that gave the task positions."""


def build_schedule(weights: Mapping[str, float], cycle: int = CYCLE) -> tuple[str, ...]:
    """Repeating order of tasks whose counts follow ``weights`` by largest remainder, evenly interleaved.

    Every task with a positive weight gets at least one place, and the cycle grows to the number of tasks if need be.
    """
    names = sorted(name for name, weight in weights.items() if weight > 0)
    cycle = max(cycle, len(names))
    total = sum(weights[name] for name in names)
    # One place is set aside for each task, so that a rare task is rare but not absent.
    quota = {name: max(weights[name] / total * cycle, 1.0) for name in names}
    counts = {name: int(quota[name]) for name in names}
    by_remainder = sorted(names, key=lambda name: (counts[name] - quota[name], name))
    for k in range(max(cycle - sum(counts.values()), 0)):
        counts[by_remainder[k % len(names)]] += 1
    while sum(counts.values()) > cycle:
        spare = [name for name in names if counts[name] > 1]
        counts[max(spare, key=lambda name: (counts[name] - weights[name] / total * cycle, name))] -= 1
    places = [((k + 0.5) / counts[name], name) for name in names for k in range(counts[name])]
    return tuple(name for _, name in sorted(places))


class TaskSampler:
    """Maps a position of the stream to a task and record indices.

    Position ``p`` is one draw of ``count`` records of one task. Tasks follow a fixed repeating schedule, so the number
    of earlier draws of a task is arithmetic; within a task, records follow one permutation per epoch, seeded by
    (seed, task, epoch), so each record comes once per epoch. ``count`` must stay the same over a run: the place in
    the epoch is the number of earlier draws times ``count``.
    """

    def __init__(self, task_positions: Mapping[str, np.ndarray], weights: Mapping[str, float], seed: int) -> None:
        """
        Args:
            task_positions: for each task, the indices of its records, shape (n,).
            weights: for each task to draw, its relative weight, at least 0. A task left out is not drawn.
            seed: seed of the permutations.

        Raises:
            ConfigError: a weight is negative or not finite, or none is positive.
            DataError: a task with a positive weight has no records.
        """
        for task, weight in weights.items():
            if not np.isfinite(weight) or weight < 0:
                raise ConfigError(f"task weight {task}={weight}: must be a finite number >= 0")
        drawn = [task for task, weight in weights.items() if weight > 0]
        if not drawn:
            raise ConfigError("task weights: none is positive; give at least one task a weight above 0")
        for task in drawn:
            if task not in task_positions:
                known = ", ".join(sorted(task_positions)) or "none"
                raise ConfigError(
                    f"task weight {task}={weights[task]}: the dataset has no such task (it has: {known}); "
                    "set the weight to 0 or build the dataset with this task"
                )
            if len(task_positions[task]) == 0:
                raise DataError(f"task {task!r} has a weight but no usable records; set its weight to 0 or add records")
        self._positions = {task: np.asarray(task_positions[task], dtype=np.int64) for task in drawn}
        self._seed = seed
        self.schedule = build_schedule(weights)
        self._places = {t: [k for k, name in enumerate(self.schedule) if name == t] for t in drawn}
        self._permutations: dict[tuple[str, int], np.ndarray] = {}

    def task_at(self, position: int) -> str:
        """The task that ``position`` draws."""
        return self.schedule[self._check(position) % len(self.schedule)]

    def draws_before(self, position: int, task: str) -> int:
        """How many positions before ``position`` draw ``task``."""
        cycles, place = divmod(self._check(position), len(self.schedule))
        places = self._places[task]
        return cycles * len(places) + sum(1 for k in places if k < place)

    def draw(self, position: int, count: int) -> Draw:
        """The task of ``position`` and ``count`` of its records.

        Raises:
            ValueError: ``position`` is negative or ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        task = self.task_at(position)
        size = len(self._positions[task])
        start = self.draws_before(position, task) * count
        parts, left = [], count
        while left:
            epoch, offset = divmod(start, size)
            part = self._permutation(task, epoch)[offset : offset + left]
            parts.append(part)
            start += len(part)
            left -= len(part)
        return Draw(task, np.concatenate(parts))

    def _check(self, position: int) -> int:
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        return position

    def _permutation(self, task: str, epoch: int) -> np.ndarray:
        key = (task, epoch)
        if key not in self._permutations:
            if len(self._permutations) >= _CACHED_PERMUTATIONS:
                self._permutations.pop(next(iter(self._permutations)))
            generator = np.random.Generator(np.random.PCG64(seed_for(self._seed, "epoch", task, epoch)))
            self._permutations[key] = generator.permutation(self._positions[task])
        return self._permutations[key]
