"""Steps whose groups are sampled and scored while the learner still works on earlier ones.

    version v published ──▶ launches step v + max_staleness (version 0: every step up to that one)
    launched step       ──▶ a thread: rollout actors, reward actors as soon as a group exists, replacements
    step s of the loop  ──▶ waits for its own groups alone

Staleness is bounded by admission: nothing is sampled that would have to be thrown away. Step s is sampled by version
max(0, s − max_staleness) and no other, so the outcome of a run does not depend on how long anything took. A resumed run
samples what was in flight again, with the very same weights: a commit holds the older versions that launched steps
still need.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from actors.learner import LearnerGroup
from actors.rollout import Rollouts, Weights
from actors.waiting import in_background

Made = TypeVar("Made")

CLOSE_S = 10.0
"""Longest wait for threads that nobody wants any more; they look up twice a second."""


@dataclass(frozen=True)
class Launched(Generic[Made]):
    """A step whose groups are being made."""

    weights: Weights
    """The policy that samples them."""
    groups: Future[Made]


class Ahead(Generic[Made]):
    """Publishes versions, and launches and hands over steps in order."""

    def __init__(
        self,
        learner: LearnerGroup,
        rollouts: Rollouts,
        make: Callable[[int, Weights], Made],
        staleness: int,
        steps: int,
    ) -> None:
        """
        Args:
            learner: publishes weights.
            rollouts: receives them.
            make: makes the groups of a step (from 0) with a policy's weights; called in a thread of its own.
            staleness: versions by which the policy that samples a step may be older than the one that is trained on it.
            steps: how many there are.
        """
        self._learner, self._rollouts, self._make = learner, rollouts, make
        self._staleness, self._steps = staleness, steps
        self._launched: deque[Launched[Made]] = deque()
        self._older: list[tuple] = []
        self._latest: Weights | None = None
        self._next = 0
        self._unwanted = threading.Event()

    def restore(self, folder: Path) -> None:
        """Restores the learner, and the older weights that steps in flight were sampled with."""
        self._learner.restore(folder)
        self._older = self._learner.stored_weights(folder)

    def save(self, folder: Path) -> None:
        """Writes what :meth:`restore` reads."""
        self._learner.save(folder)
        named = {each.weights.version: each.weights for each in self._launched if each.weights is not self._latest}
        self._learner.store_weights(folder, list(named.values()))

    def begin(self, start: int) -> None:
        """Launches again what was in flight before step ``start`` (from 0)."""
        self._next = start
        for published in self._older:
            self._admit(self._rollouts.publish(*published))
        self._older = []  # the launched steps alone keep old weights in memory
        self.publish(start)

    def publish(self, version: int) -> None:
        """Publishes the learner's weights as ``version`` and launches what they are to sample."""
        self._latest = self._rollouts.publish(version, *self._learner.publish())
        if self._staleness:  # otherwise steps take turns with whatever else the loop does: commits, pictures, looks
            self._admit(self._latest)

    def next(self) -> tuple[Weights, Made]:
        """The next step's groups, and the policy that sampled them; waits for them.

        Raises:
            OmniAlphaError: they could not be made.
        """
        assert self._latest is not None
        self._admit(self._latest)
        launched = self._launched.popleft()
        return launched.weights, launched.groups.result()

    def close(self) -> None:
        """Ends the threads of steps that were launched and not taken."""
        self._unwanted.set()
        wait([each.groups for each in self._launched], timeout=CLOSE_S)
        self._launched.clear()

    def _admit(self, weights: Weights) -> None:
        while self._next < self._steps and self._next - self._staleness <= weights.version:
            make = functools.partial(self._make, self._next, weights)
            groups = in_background(make, f"step {self._next + 1}", self._unwanted)
            self._launched.append(Launched(weights, groups))
            self._next += 1
