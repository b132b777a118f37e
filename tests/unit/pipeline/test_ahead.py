"""Which version samples which step, and what becomes of steps that nobody takes: without any actor."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.rollout import Weights
from actors.waiting import Abandoned, Wait
from common.errors import ActorError
from pipeline.ahead import Ahead

STEPS = 7


class Learner:
    """Publishes its own version's name, and keeps what it was given to store by folder."""

    def __init__(self) -> None:
        self.version = 0
        self.stored: dict[Path, list[Weights]] = {}

    def publish(self) -> tuple[str, str, str]:
        return f"v{self.version}", "index", "buffer"

    def save(self, folder: Path) -> None:
        self.stored.setdefault(folder, [])

    def restore(self, folder: Path) -> None:
        self.version = int(folder.name)

    def store_weights(self, folder: Path, weights: list[Weights]) -> None:
        self.stored[folder] = weights

    def stored_weights(self, folder: Path) -> list[tuple]:
        return [(each.version, each.name, each.source, each.buffer) for each in self.stored[folder]]


class Rollouts:
    def publish(self, version: int, name: str, index: str, buffer: str) -> Weights:
        return Weights(version, name, index, buffer)


def name_of(step: int, weights: Weights) -> tuple[int, str]:
    return step, weights.name


def walk(ahead: Ahead, learner: Learner, steps: range, save_after: dict[int, Path] | None = None) -> list[tuple]:
    """Takes ``steps`` and trains on each; returns (step, name of who sampled it) for each."""
    taken = []
    for step in steps:
        weights, made = ahead.next()
        assert made == (step, weights.name)
        taken.append(made)
        learner.version = step + 1
        ahead.publish(step + 1)
        if folder := (save_after or {}).get(step + 1):
            ahead.save(folder)
    return taken


@pytest.fixture
def begin() -> Callable[..., tuple[Ahead, Learner]]:
    made: list[Ahead] = []

    def start(lag: int, make: Callable = name_of, learner: Learner | None = None) -> tuple[Ahead, Learner]:
        learner = learner or Learner()
        made.append(Ahead(learner, Rollouts(), make, lag, STEPS))
        return made[-1], learner

    yield start
    for ahead in made:
        ahead.close()


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 20])
def test_a_step_is_sampled_by_the_version_that_lags_by_exactly_the_bound_or_by_the_first(begin, lag):
    ahead, learner = begin(lag)
    ahead.begin(0)
    assert walk(ahead, learner, range(STEPS)) == [(step, f"v{max(0, step - lag)}") for step in range(STEPS)]


@pytest.mark.parametrize("lag", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_what_was_in_flight_at_a_commit_is_sampled_again_by_the_versions_that_had_sampled_it(begin, lag, stop):
    ahead, learner = begin(lag)
    ahead.begin(0)
    commit = Path(str(stop))
    walk(ahead, learner, range(stop), {stop: commit})
    assert [each.version for each in learner.stored[commit]] == sorted(
        {max(0, step - lag) for step in range(stop, min(STEPS, stop + lag))} - {stop}
    )
    resumed, _ = begin(lag, learner=learner)
    resumed.restore(commit)
    resumed.begin(stop)
    expected = [(step, f"v{max(0, step - lag)}") for step in range(stop, STEPS)]
    assert walk(resumed, learner, range(stop, STEPS)) == expected


def test_without_staleness_nothing_is_launched_before_the_loop_asks_for_it(begin):
    launched: list[int] = []
    ahead, learner = begin(0, lambda step, weights: launched.append(step) or name_of(step, weights))
    ahead.begin(0)
    assert launched == []
    walk(ahead, learner, range(2))
    assert launched == [0, 1]


def test_steps_ahead_are_made_while_the_loop_is_busy(begin):
    made = threading.Barrier(3)

    def meet(step: int, weights: Weights) -> tuple[int, str]:
        made.wait(timeout=60)  # three steps at the same time, without anyone asking for them
        return name_of(step, weights)

    ahead, _ = begin(2, meet)
    ahead.begin(0)
    assert ahead.next()[1] == (0, "v0")


def test_a_step_that_cannot_be_made_says_so_when_it_is_its_turn(begin):
    def fail_at_two(step: int, weights: Weights) -> tuple[int, str]:
        if step == 2:
            raise ActorError("no rollout actor is left")
        return name_of(step, weights)

    ahead, learner = begin(2, fail_at_two)
    ahead.begin(0)
    walk(ahead, learner, range(2))
    with pytest.raises(ActorError, match="no rollout actor"):
        ahead.next()


def test_closing_ends_the_waits_of_steps_that_were_launched(begin):
    ended: list[int] = []

    def wait_forever(step: int, weights: Weights) -> tuple[int, str]:
        wait = Wait("something that never comes", 1, 600)
        try:
            while True:
                time.sleep(min(0.01, wait.left(1)))
        except Abandoned:
            ended.append(step)
            raise

    ahead, _ = begin(2, wait_forever)
    ahead.begin(0)
    began = time.monotonic()
    ahead.close()
    assert sorted(ended) == [0, 1, 2]
    assert time.monotonic() - began < 5
