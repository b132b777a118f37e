"""Deterministic multi-task sampling: what to draw is a pure function of the position, so a resume replays nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from common.errors import ConfigError, DataError
from data.seeding import seed_for

CYCLE = 60
"""Draws after which the schedule of tasks repeats: divisible by 2 to 6, so common weights come out exact."""

_CACHED_PERMUTATIONS = 16

Shape: TypeAlias = tuple[int, int]
"""(height, width) of a record's images."""


@dataclass(frozen=True)
class Draw:
    """What one position of the training stream asks for."""

    task: str
    indices: np.ndarray
    """Record indices, shape (count,), int64, into the dataset that gave the task positions."""
    shape: Shape | None = None
    """(height, width) of the records' images, where :class:`TaskSampler` was told."""


@dataclass(frozen=True)
class _Bucket:
    """Records of one task and one shape."""

    shape: Shape | None
    seed: tuple[str, ...]
    """What its permutations are seeded with besides the task."""
    records_N: np.ndarray


class _Buckets:
    """A task's records by shape, and which of them each of the task's draws takes.

    Draws go round the buckets in a fixed order of as many places as there are records (divided by what their counts
    have in common), each bucket's places evenly spread: records of all shapes come equally often, and the number of
    earlier draws of a bucket is arithmetic.
    """

    def __init__(self, records_N: np.ndarray, shapes: Sequence[Shape | None] | None) -> None:
        by_shape: dict[Shape | None, list[int]] = {}
        for index in records_N.tolist():
            by_shape.setdefault(shapes[index] if shapes is not None else None, []).append(index)
        # Of one shape the stream is the one that it is without shapes.
        named = len(by_shape) > 1
        self.all = [
            _Bucket(shape, (repr(shape),) if named else (), np.array(indices, dtype=np.int64))
            for shape, indices in by_shape.items()
        ]
        sizes = [len(bucket.records_N) for bucket in self.all]
        self._places = [size // math.gcd(*sizes) for size in sizes]
        spread = np.concatenate([(np.arange(n) + 0.5) / n for n in self._places])
        order = np.argsort(spread, kind="stable")
        self._bucket_P = np.repeat(np.arange(len(sizes)), self._places)[order]
        self._earlier_P = np.concatenate([np.arange(n) for n in self._places])[order]

    def at(self, number: int) -> tuple[_Bucket, int]:
        """The bucket of the task's draw ``number`` (from 0), and how many draws it had before."""
        cycles, place = divmod(number, len(self._bucket_P))
        bucket = int(self._bucket_P[place])
        return self.all[bucket], cycles * self._places[bucket] + int(self._earlier_P[place])


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

    Records of different shapes are never drawn together, as they do not fit one batch: those of one shape have epochs
    of their own, and all shapes go through theirs at the same pace.
    """

    def __init__(
        self,
        task_positions: Mapping[str, np.ndarray],
        weights: Mapping[str, float],
        seed: int,
        shapes: Sequence[Shape | None] | None = None,
    ) -> None:
        """
        Args:
            task_positions: for each task, the indices of its records, shape (n,).
            weights: for each task to draw, its relative weight, at least 0. A task left out is not drawn.
            seed: seed of the permutations.
            shapes: of each record of the dataset; None, or None for each, where all are alike.

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
        self._buckets = {t: _Buckets(np.asarray(task_positions[t], dtype=np.int64), shapes) for t in drawn}
        self._seed = seed
        self.schedule = build_schedule(weights)
        self._places = {t: [k for k, name in enumerate(self.schedule) if name == t] for t in drawn}
        self._permutations: dict[tuple[str, tuple[str, ...], int], np.ndarray] = {}
        buckets = sum(len(each.all) for each in self._buckets.values())
        self._kept = max(_CACHED_PERMUTATIONS, 2 * buckets)  # a draw may reach into its bucket's next epoch

    def task_at(self, position: int) -> str:
        """The task that ``position`` draws."""
        return self.schedule[self._check(position) % len(self.schedule)]

    def draws_before(self, position: int, task: str) -> int:
        """How many positions before ``position`` draw ``task``."""
        cycles, place = divmod(self._check(position), len(self.schedule))
        places = self._places[task]
        return cycles * len(places) + sum(1 for k in places if k < place)

    def draw(self, position: int, count: int) -> Draw:
        """The task of ``position`` and ``count`` of its records, of one shape.

        Raises:
            ValueError: ``position`` is negative or ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        task = self.task_at(position)
        bucket, earlier = self._buckets[task].at(self.draws_before(position, task))
        size, start = len(bucket.records_N), earlier * count
        parts, left = [], count
        while left:
            epoch, offset = divmod(start, size)
            part = self._permutation(task, bucket, epoch)[offset : offset + left]
            parts.append(part)
            start += len(part)
            left -= len(part)
        return Draw(task, np.concatenate(parts), bucket.shape)

    def _check(self, position: int) -> int:
        if position < 0:
            raise ValueError(f"position must be at least 0, got {position}")
        return position

    def _permutation(self, task: str, bucket: _Bucket, epoch: int) -> np.ndarray:
        key = (task, bucket.seed, epoch)
        if key not in self._permutations:
            if len(self._permutations) >= self._kept:
                self._permutations.pop(next(iter(self._permutations)))
            seed = seed_for(self._seed, "epoch", task, *bucket.seed, epoch)
            generator = np.random.Generator(np.random.PCG64(seed))
            self._permutations[key] = generator.permutation(bucket.records_N)
        return self._permutations[key]
