"""Who may serve, who is replaced and when: the rules of a role's health, with a clock that only the test moves."""

import itertools

import pytest

from actors.health import GUEST_PAUSE_S, LONGEST_GUEST_PAUSE_S, LONGEST_PAUSE_S, Health, State


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def serving(clock: Clock, count: int = 2, replacements: int = 3, spares: int = 0) -> Health:
    health = Health("rollout", count, replacements, clock, spares=spares)
    for number in range(count + spares):
        health.started(number)
    return health


def test_a_lost_actor_serves_again_only_by_way_of_a_new_start(clock):
    health = serving(clock)
    health.lost(0, "killed")
    with pytest.raises(ValueError, match="rollout actor 0 is lost: it cannot be serving"):
        health.started(0)
    health.restarting(0)
    assert health.having(State.SERVING) == [1]
    health.started(0)
    assert health.having(State.SERVING) == [0, 1]


def test_nothing_but_a_start_leads_to_serving(clock):
    moves = ("started", "restarting", "lost")
    for path in itertools.product(moves, repeat=4):
        health = Health("rollout", 1, 9, clock)
        before = health.state(0)
        for move in path:
            try:
                getattr(health, move)(*{"lost": (0, "x")}.get(move, (0,)))
            except ValueError:
                continue
            if health.state(0) is State.SERVING and before is not State.SERVING:
                assert (move, before) == ("started", State.STARTING)
            before = health.state(0)


def test_the_first_loss_is_replaced_at_once_and_later_ones_after_a_pause_that_doubles(clock):
    health = serving(clock, 1, replacements=20)
    pauses = []
    for _ in range(9):
        health.lost(0, "killed")
        began = clock.now
        while health.due() == []:
            clock.now += 0.5
        pauses.append(clock.now - began)
        health.restarting(0)
    assert pauses == [0, 1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_an_answer_from_anyone_starts_the_count_anew(clock):
    health = serving(clock, 2, replacements=1)
    for _ in range(5):
        health.lost(0, "killed")
        assert health.given_up is None
        health.restarting(0)
        health.started(0)
        health.answered()


def test_giving_up_names_the_role_and_the_first_cause_of_the_row(clock):
    health = serving(clock, 2, replacements=2)
    health.lost(0, "an old story")
    health.answered()
    health.lost(1, "out of memory")
    health.restarting(1)
    health.lost(1, "no room for it")
    assert health.given_up is None
    health.restarting(1)
    health.lost(1, "no room for it")
    assert health.given_up == "rollout actors were lost 3 times in a row, the first time because out of memory"


def test_a_node_lost_with_many_actors_is_one_loss_of_each_and_all_are_replaced_at_once(clock):
    health = serving(clock, 8, replacements=1)
    for number in range(8):
        health.lost(number, "its node is gone")
    assert health.given_up is None
    assert health.due() == list(range(8))
    for number in range(8):
        health.restarting(number)
    health.lost(5, "no room for it")
    assert health.given_up == "rollout actors were lost 9 times in a row, the first time because its node is gone"


def test_without_replacements_the_first_loss_is_the_end(clock):
    health = serving(clock, 1, replacements=0)
    health.lost(0, "killed")
    assert health.given_up == "a rollout actor was lost because killed"


def test_who_starts_while_all_places_are_taken_is_a_spare(clock):
    health = Health("rollout", 2, 3, clock, spares=1)
    for number in (2, 0, 1):  # whoever is there first serves
        health.started(number)
    assert health.having(State.SERVING) == [0, 2]
    assert health.having(State.SPARE) == [1]


def test_a_spare_takes_the_place_of_a_lost_actor_at_once_whose_successor_becomes_the_spare(clock):
    health = serving(clock, 2, spares=1)
    assert health.lost(0, "killed") == 2
    assert health.having(State.SERVING) == [1, 2]
    assert health.due() == [0], "the new one is started in the background"
    health.restarting(0)
    assert health.having(State.SPARE) == []
    health.started(0)
    assert health.having(State.SPARE) == [0]


def test_a_lost_spare_and_one_that_was_only_starting_are_replaced_by_nobody(clock):
    health = serving(clock, 2, spares=2)
    assert health.lost(3, "killed") is None
    health.restarting(3)
    assert health.lost(3, "killed again") is None
    assert health.having(State.SERVING) == [0, 1]
    assert health.having(State.SPARE) == [2]


def test_guests_come_when_they_are_invited_take_nobodys_place_and_are_nobodys_loss(clock):
    health = Health("rollout", 2, 0, clock, spares=1, guests=2)
    assert health.due() == []
    health.invite()
    assert health.due() == [3, 4]
    for number in (3, 4):
        health.restarting(number)
        health.started(number)
    for number in (0, 1, 2):
        health.started(number)
    assert health.having(State.SERVING) == [0, 1, 3, 4]
    assert health.having(State.SPARE) == [2]
    assert health.lost(4, "its node is gone") is None
    assert health.given_up is None
    assert health.having(State.SPARE) == [2]
    health.invite()
    clock.now += GUEST_PAUSE_S - 1
    assert health.due() == [], "whoever needs its room may take it first"
    clock.now += 1
    assert health.due() == [4]


def test_a_guest_that_cannot_work_is_asked_in_again_ever_more_rarely_until_it_does(clock):
    health = Health("rollout", 1, 0, clock, guests=1)
    health.invite()
    pauses = []
    for _ in range(7):
        health.restarting(1)
        health.lost(1, "it cannot work")
        health.answered()  # what others do says nothing about it
        began = clock.now
        while not health.due():
            clock.now += 0.5
        pauses.append(clock.now - began)
    assert pauses == [30, 60, 120, 240, 480, LONGEST_GUEST_PAUSE_S, LONGEST_GUEST_PAUSE_S]
    assert health.given_up is None
    health.restarting(1)
    health.started(1)
    health.lost(1, "")
    clock.now += GUEST_PAUSE_S
    assert health.due() == [1]


def test_without_a_spare_left_a_place_stays_empty_until_somebody_is_started(clock):
    health = serving(clock, 2, spares=1)
    assert health.lost(0, "killed") == 2
    assert health.lost(1, "killed") is None
    assert health.having(State.SERVING) == [2]
    health.restarting(0)
    health.started(0)
    assert health.having(State.SERVING) == [0, 2]
    clock.now += LONGEST_PAUSE_S
    health.restarting(1)
    health.started(1)
    assert health.having(State.SPARE) == [1]


def test_losses_of_spares_count_towards_giving_up(clock):
    health = serving(clock, 1, replacements=1, spares=1)
    health.lost(1, "out of memory")
    assert health.given_up is None
    health.restarting(1)
    health.lost(1, "out of memory")
    assert health.given_up == "rollout actors were lost 2 times in a row, the first time because out of memory"
