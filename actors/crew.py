"""The actors of one role as a crew: work goes to whoever serves, and an actor that dies is replaced and its unfinished
work given out again. What was finished is kept: returned values outlive the actor that returned them.

Who may serve is decided in :mod:`actors.health`; here are the calls, the waiting and the killing. Several threads may
give work to a crew and wait for it at the same time: what they share is changed under a lock, and nobody waits while
holding it.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.health import Health, State
from actors.processes import admit, enter
from actors.room import room
from actors.waiting import LOOK_UP_EVERY_S, LOST, Wait, expected, lost_because
from common.errors import ActorError, ClusterError, OmniAlphaError

log = logging.getLogger("omnialpha")

Notify = Callable[..., None]
"""Hears ``actor_lost``, ``actor_replaced``, ``spare_started``, ``actor_joined`` and ``actor_left`` with their facts,
like an event log's ``write``."""

LOOK_AT_SPARES_EVERY_S = 5.0
"""How often a spare, which nobody gives work, is asked whether it is still there."""


def unheard(event: str, **facts: Any) -> None:
    """Nobody listens."""


@dataclass(eq=False)
class Work:
    """One call on an actor. It must come to the same result on every actor of the crew, however often it is made."""

    call: Callable[[Any], Any]
    """Makes the call on an actor and gives its reference, or several of which the first is small."""
    refs: tuple[Any, ...] = ()
    """What the latest call returns; empty while no actor has it."""
    actor: Any = None
    """Who has it."""

    def give(self, actor: Any) -> None:
        """Makes the call."""
        made = self.call(actor)
        self.refs, self.actor = tuple(made) if isinstance(made, list | tuple) else (made,), actor

    def take_back(self) -> None:
        """Forgets a call that failed."""
        self.refs, self.actor = (), None


class Crew:
    """All actors of one role."""

    def __init__(
        self,
        role: str,
        make: Callable[[], Any],
        count: int,
        *,
        replacements: int,
        deadline_s: float,
        notify: Notify = unheard,
        spares: int = 0,
        guests: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the actors; :meth:`begin` waits for them.

        Args:
            role: names them in messages and events.
            make: starts one actor.
            count: how many are to work.
            replacements: as in :class:`actors.health.Health`.
            deadline_s: longest time without an answer from the role.
            notify: hears who is lost, replaced, joins or leaves.
            spares: how many more are started and given no work until one of the others is lost.
            guests: how many more are asked for and work while the cluster has room for them; nobody waits for them.
            clock: of the health.
        """
        self._role, self._make, self._deadline = role, make, deadline_s
        self._notify = notify
        self._lock = threading.RLock()
        self.count, self._clock = count, clock
        self._health = Health(role, count, replacements, clock, spares=spares, guests=guests)
        self._next = 0
        self._answered_at = 0.0
        self._lost_at: dict[int, float] = {}
        self._taken_over: dict[int, tuple[float, int]] = {}  # lost → since when, and which spare has its place
        self._refilled_since: dict[int, float] = {}
        self._looks: dict[Any, int] = {}
        self._refused: set[int] = set()
        self._looked_at: dict[int, float] = {}
        self.actors = [make() for _ in range(count + spares)] + [None] * guests
        self._starting = {number: enter(actor, self._name(number)) for number, actor in enumerate(self.actors) if actor}

    def begin(self) -> None:
        """Waits until all are there.

        Raises:
            ActorError: a constructor raised, or actors were lost one after the other.
            ClusterError: one of them does not run the driver's code.
            DeadlineError: they were not there in time.
        """
        what = f"{self._role} actors to start"
        wait = Wait(what, len(self._starting), self._deadline)
        while missing := set(self._health.having(State.STARTING, State.LOST)) - set(self._health.guests):
            self._ready(what, [], wait, len(missing))

    def ask(self, call: Callable[[Any], Any], number: int | None = None) -> Work:
        """Gives work to the one in place ``number`` of those that serve, or to one after the other; returns at once.
        With nobody serving it is given out when it is waited for."""
        work = Work(call)
        with self._lock:
            serving = self.serving
            if number is None:
                self._next += 1
                number = self._next
            if serving:
                work.give(self.actors[serving[number % len(serving)]])
        return work

    @property
    def serving(self) -> list[int]:
        """Numbers of the actors that are given work."""
        return self._health.having(State.SERVING)

    def invite_guests(self) -> None:
        """Called again and again from when every actor of the run has had its place: guests must not take one that
        somebody needs."""
        with self._lock:
            self._health.invite()

    def send_guests_away(self) -> None:
        """Ends the guests, whose work is given out again: somebody who is needed has no place otherwise."""
        with self._lock:
            for number in self._health.guests:
                if self._health.state(number) is not State.LOST:
                    self._leave(number)

    def wait(self, works: Sequence[Work], what: str) -> list[Any]:
        """First values of all ``works``, in order; raises as :meth:`as_done`."""
        values = dict(self.as_done(works, what))
        return [values[work] for work in works]

    def as_done(self, works: Sequence[Work], what: str) -> Iterator[tuple[Work, Any]]:
        """Each work with its first value as soon as it is there.

        Raises:
            DeadlineError: the role answered nobody for too long.
            ActorError: actors were lost one after the other, or one raised something unexpected.
            LostValueError: what a call was to work on was lost with its node.
            PlacementError: nobody serves, and the cluster has become too small.
            OmniAlphaError: an actor raised an expected error; it arrives as itself.
            Abandoned: nobody wants the values any more. Actors still make the calls that they have: Ray cannot take
                them out of an actor's queue.
        """
        pending, wait = list(works), Wait(what, len(works), self._deadline)
        while pending:
            for work, value in self._ready(what, pending, wait, len(pending)):
                pending.remove(work)
                yield work, value

    def _ready(self, what: str, pending: Sequence[Work], wait: Wait, missing: int) -> list[tuple[Work, Any]]:
        """Lets something happen: a value that arrives, an actor that starts, is lost, or is started again."""
        left = wait.left(missing, self._answered_at)
        with self._lock:
            self._start_again()
            self._give_out(pending)
            self._look_at_spares()
            starting = {ref: number for number, ref in self._starting.items()}
            looks = dict(self._looks)
            asked = {work.refs[0]: work for work in pending if work.refs}
            away = set(self._health.having(State.LOST)) - set(self._health.guests)
            pause = min(left, 0.1 if away else LOOK_UP_EVERY_S)
            deserted = not self.serving
        if deserted:
            room.look()
        refs = [*starting, *looks, *asked]
        if not refs:
            time.sleep(pause)
            return []
        ready = ray.wait(refs, num_returns=len(refs), timeout=0)[0] or ray.wait(refs, timeout=pause)[0]
        done = []
        for ref in ready:
            try:
                value = ray.get(ref)
            except LOST as error:
                with self._lock:
                    if ref in starting:
                        self._lose_starting(starting[ref], ref, error, what)
                    elif ref in looks:
                        self._lose_looked_at(ref, error, what)
                    else:
                        gone = asked[ref].actor
                        asked[ref].take_back()
                        # All work of a lost actor fails; the first failure has it replaced.
                        for number in [k for k, actor in enumerate(self.actors) if actor is gone]:
                            self._lose(number, error, what)
            except RayError as error:
                with self._lock:
                    guest = starting.get(ref) in self._health.guests
                    if guest:
                        self._turn_away(starting[ref], ref, expected(error, what))
                if not guest:
                    raise expected(error, what) from None
            else:
                with self._lock:
                    if ref in starting:
                        self._started(starting[ref], ref, value)
                    elif ref in looks:
                        self._seen(ref)
                    else:
                        self._health.answered()
                        self._answered_at = time.monotonic()
                        done.append((asked[ref], value))
        return done

    def _name(self, number: int) -> str:
        return f"{self._role}-{number}"

    def _start_again(self) -> None:
        """Starts replacements that are due."""
        for number in self._health.due():
            if number not in self._health.guests:
                room.make(self._name(number))
            elif room.short:
                continue
            self._health.restarting(number)
            self.actors[number] = self._make()
            self._starting[number] = enter(self.actors[number], self._name(number))

    def _give_out(self, pending: Sequence[Work]) -> None:
        """Work that nobody has goes to the serving actors with the least of it."""
        serving = [self.actors[number] for number in self._health.having(State.SERVING)]
        for work in pending if serving else ():
            if not work.refs:
                work.give(min(serving, key=lambda actor: sum(other.actor is actor for other in pending)))

    def _started(self, number: int, ref: Any, said: dict[str, Any]) -> None:
        """An actor is there, which several threads may have waited for."""
        if self._starting.get(number) is not ref:
            return
        del self._starting[number]
        if number in self._health.guests:
            self._join(number, said)
            return
        admit(said)
        self._health.started(number)
        room.placed(self._name(number))
        if number in self._lost_at:
            seconds = self._clock() - self._lost_at.pop(number)
            log.info("%s actor %d was replaced in %.1f s", self._role, number, seconds)
            self._notify("actor_replaced", role=self._role, actor=number, seconds=round(seconds, 3))
        if number in self._refilled_since:
            seconds = self._clock() - self._refilled_since.pop(number)
            self._notify("spare_started", role=self._role, actor=number, seconds=round(seconds, 3))

    def _join(self, number: int, said: dict[str, Any]) -> None:
        try:
            admit(said)
        except ClusterError as error:  # a node that joins days later does not end the run
            self._refuse(number, error)
            return
        self._health.started(number)
        log.info("%s actor %d has joined: %d work", self._role, number, len(self.serving))
        self._notify("actor_joined", role=self._role, actor=number)

    def _turn_away(self, number: int, ref: Any, error: OmniAlphaError) -> None:
        """A guest did not come to be, which several threads may have waited for."""
        if self._starting.get(number) is ref:
            self._refuse(number, error)

    def _refuse(self, number: int, error: OmniAlphaError) -> None:
        """A guest cannot work. It is tried again later, for its node may be mended; that is said once."""
        if number not in self._refused:
            log.warning("%s; %s actor %d does not join", error, self._role, number)
        self._refused.add(number)
        self._leave(number, "it cannot work")

    def _leave(self, number: int, cause: str = "") -> None:
        """A guest goes, whether it was sent away, lost or refused."""
        worked = self._health.state(number) is State.SERVING
        self._starting.pop(number, None)
        with contextlib.suppress(RayError):
            ray.kill(self.actors[number], no_restart=True)
        self._health.lost(number, cause)
        if worked:
            log.info("%s actor %d has left: %d work", self._role, number, len(self.serving))
            self._notify("actor_left", role=self._role, actor=number)

    def _look_at_spares(self) -> None:
        """Asks spares whether they are still there, where that is due: nobody else would notice their loss."""
        for number in self._health.having(State.SPARE):
            due = self._clock() - self._looked_at.get(number, -LOOK_AT_SPARES_EVERY_S) >= LOOK_AT_SPARES_EVERY_S
            if due and number not in self._looks.values():
                self._look_at(number)

    def _look_at(self, number: int) -> None:
        self._looked_at[number] = self._clock()
        self._looks[self.actors[number].__ray_ready__.remote()] = number

    def _seen(self, ref: Any) -> None:
        """An actor answered that it is there, which several threads may have waited for."""
        number = self._looks.pop(ref, None)
        for lost, (since, spare) in list(self._taken_over.items()):
            if spare == number:
                del self._taken_over[lost]
                seconds = self._clock() - since
                log.info("%s actor %d was replaced by spare %d in %.1f s", self._role, lost, spare, seconds)
                facts = {"role": self._role, "actor": lost, "spare": spare, "seconds": round(seconds, 3)}
                self._notify("actor_replaced", **facts)

    def _lose_looked_at(self, ref: Any, error: RayError, what: str) -> None:
        """An actor did not answer any more, which several threads may have waited for."""
        if (number := self._looks.pop(ref, None)) is not None:
            self._lose(number, error, what)

    def _lose_starting(self, number: int, ref: Any, error: RayError, what: str) -> None:
        """An actor did not come to be, which several threads may have waited for."""
        if self._starting.get(number) is ref:
            self._lose(number, error, what)

    def _lose(self, number: int, error: RayError, what: str) -> None:
        """An actor is gone, which may be heard several times.

        Raises:
            ActorError: it will not be replaced.
        """
        if self._health.state(number) is State.LOST:
            return
        log.debug("%s actor %d: %s", self._role, number, error)
        if number in self._health.guests:
            if getattr(error, "actor_init_failed", False):
                self._refuse(number, expected(error, what))
            else:
                self._leave(number)
            return
        self._starting.pop(number, None)
        with contextlib.suppress(RayError):  # whatever Ray believes of it, it must not work beside its replacement
            ray.kill(self.actors[number], no_restart=True)
        known = number in self._lost_at or number in self._refilled_since
        first = not known and self._health.state(number) is State.STARTING
        if first and getattr(error, "actor_init_failed", False):
            raise expected(error, what) from None  # the constructor raised before anything worked: it always will
        cause = lost_because(error)
        spare = self._health.lost(number, cause)
        self._notify("actor_lost", role=self._role, actor=number, cause=cause)
        if reason := self._health.given_up:
            raise ActorError(
                f"{reason}; if that was memory, give the role fewer actors or smaller groups, otherwise see the "
                "worker's log in Ray's session folder; then run the same command again to go on from the last commit"
            )
        self._looks = {ref: other for ref, other in self._looks.items() if other != number}
        for lost, (since, taken_by) in list(self._taken_over.items()):
            if taken_by == number:  # the spare has died too: whoever is started for the first one replaces it after all
                del self._taken_over[lost]
                if self._refilled_since.pop(lost, None) is not None:
                    self._lost_at[lost] = since
        if spare is None:
            self._refilled_since.pop(number, None)
            self._lost_at.setdefault(number, self._clock())
        else:
            self._taken_over[number] = (self._clock(), spare)
            self._refilled_since[number] = self._clock()
            self._look_at(spare)
        log.warning("%s actor %d was lost (%s); it is replaced and its work given out again", self._role, number, cause)
