"""Actors that work while the cluster has room for them: those that cannot, and those that others need the room of."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

import actors.judge
from actors.crew import Crew
from actors.health import GUEST_PAUSE_S
from actors.judge import ActorWatch
from actors.room import room
from tests.faults import worker
from tests.faults.worker import Worker

ray.cloudpickle.register_pickle_by_value(worker)  # actors cannot import the tests

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def crew(clock) -> Iterator[Any]:
    """Starts a crew of one with one guest, whose actors are made by ``guest``."""
    made: list[Crew] = []

    def start(guest: Callable[[], Any] | None = None) -> Crew:
        makers = iter([ray.remote(num_cpus=0.1)(Worker).remote])

        def make() -> Any:
            return next(makers, guest or ray.remote(num_cpus=0.1)(Worker).remote)()

        crew = Crew("rollout", make, 1, replacements=3, deadline_s=240.0, guests=1, clock=clock)
        made.append(crew)
        crew.begin()
        crew.invite_guests()
        return crew

    with room.kept([], 0.0):
        yield start
    for each in made:
        for actor in each.actors:
            ray.kill(actor)


def work(crew: Crew, seconds: float = 0.3) -> int:
    """Which process did it."""
    ((_, process),) = crew.wait([crew.ask(lambda actor: actor.work.remote(seconds, 0), number=0)], "work")
    return process


def work_until(crew: Crew, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        work(crew)


def test_a_guest_that_cannot_start_is_mentioned_once_and_asked_in_again_ever_more_rarely(crew, clock, caplog):
    begun = list[float]()

    class NoDisk:
        def __init__(self) -> None:
            raise OSError("no disk here")

    def guest() -> Any:
        begun.append(clock.now)
        return ray.remote(num_cpus=0.1)(NoDisk).remote()

    crew = crew(guest)
    for attempt in range(3):
        work_until(crew, lambda begins=attempt + 1: len(begun) == begins and not crew._starting)
        clock.now += GUEST_PAUSE_S * 2**attempt - 1
        work(crew)
        assert len(begun) == attempt + 1
        clock.now += 1
    assert crew.serving == [0]
    said = [record.message for record in caplog.records if "does not join" in record.message]
    assert len(said) == 1
    assert "no disk here" in said[0]
    assert "rollout actor 1 does not join" in said[0]


def test_guests_stay_away_until_everybody_who_is_lost_has_a_place(crew, clock):
    crew = crew()
    room.welcome(crew.send_guests_away)
    work_until(crew, lambda: crew.serving == [0, 1])
    room.make("judge-actor-0")
    assert crew.serving == [0]
    clock.now += 10 * GUEST_PAUSE_S
    work(crew)
    assert not crew._starting, "the judge has no place yet"
    room.placed("judge-actor-0")
    work_until(crew, lambda: crew.serving == [0, 1])


def test_a_lost_actor_of_a_crew_sends_guests_away_until_its_replacement_works(crew, clock):
    crew = crew()
    room.welcome(crew.send_guests_away)
    work_until(crew, lambda: crew.serving == [0, 1])
    ray.kill(crew.actors[0])
    clock.now += 1
    work(crew, 0.0)
    assert crew.serving == [0]
    assert not room.short
    clock.now += GUEST_PAUSE_S
    work_until(crew, lambda: crew.serving == [0, 1])


def test_a_crew_that_is_gone_is_not_asked_to_send_its_guests_away():
    class Guests:
        def send_away(self) -> None:
            raise AssertionError

    with room.kept([], 0.0):
        room.welcome(Guests().send_away)
        room.make("learner")
        assert room.short
    assert not room.short, "the next run begins with nobody missing"


def test_room_is_made_for_a_judges_actor_until_ray_has_started_it_again_or_gives_it_up(monkeypatch):
    monkeypatch.setattr(actors.judge, "LOOK_AT_ACTORS_EVERY_S", 0.05)
    actor = ray.remote(num_cpus=0.1, max_restarts=1)(Worker).remote()
    ray.get(actor.__ray_ready__.remote())
    seen = list[bool]()

    def wait_for(short: bool) -> None:
        deadline = time.monotonic() + 60
        while room.short is not short:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        seen.append(short)

    with room.kept([], 0.0):
        watch = ActorWatch({"judge-actor-0": actor})
        try:
            ray.kill(actor, no_restart=False)
            wait_for(True)
            wait_for(False)
            assert ray.get(actor.work.remote(0.0, 5))[0] == 5
            ray.kill(actor)
            watch._thread.join(timeout=60)
            assert not watch._thread.is_alive(), "there is nobody left to look at"
            assert not room.short
        finally:
            watch.close()
    assert seen == [True, False]
