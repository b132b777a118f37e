"""Which actors of a role may work, and when one that was lost is started anew. Pure: time comes from a clock that is
passed in, and whoever starts, asks and kills actors lives in :mod:`actors.crew`.

    STARTING ──started──▶ SERVING, or SPARE while all places are taken          lost: from everywhere to LOST
       ▲                     ▲
       │                     └──another is lost── SPARE
       └──restarting── LOST

A spare is as good as any other: it takes the place of one that is lost at once, and who is started for that one becomes
the next spare. A guest serves while the cluster has room for it and is nobody's loss: it may come again after a while.
Weights are not health's business: every call that needs some names them, and an actor loads them before
it works.
"""

import math
from collections.abc import Callable, Sequence
from enum import Enum

LONGEST_PAUSE_S = 30.0

GUEST_PAUSE_S = 30.0
"""Before a guest that has gone is asked in again: whoever needs its room may take it."""
LONGEST_GUEST_PAUSE_S = 960.0
"""Before one is asked in again that could not work each time: every try takes a process."""


class State(Enum):
    """Of one actor."""

    STARTING = "starting"
    SERVING = "serving"
    SPARE = "spare"
    LOST = "lost"


class Health:
    """The actors of one role, by number."""

    def __init__(
        self, role: str, count: int, replacements: int, clock: Callable[[], float], *, spares: int = 0, guests: int = 0
    ) -> None:
        """
        Args:
            role: names them in messages.
            count: how many are to serve.
            replacements: how often in a row each may be replaced, without an answer from any of them in between. Each
                is counted by itself: a node may be lost with many of them at once.
            clock: seconds that never go back.
            spares: how many there are beside those that serve.
            guests: how many more serve while there is room for them; they have the last numbers.
        """
        self._role, self._allowed, self._clock = role, replacements, clock
        self._places, every = count, count + spares + guests
        self.guests = range(count + spares, every)
        self._states = [State.STARTING] * (count + spares) + [State.LOST] * guests
        self._due = [0.0] * (count + spares) + [math.inf] * guests  # until they are invited
        self._causes: list[str] = []
        self._in_a_row = [0] * every

    def invite(self) -> None:
        """From now on guests may come: all others have their places."""
        for number in self.guests:
            if math.isinf(self._due[number]):
                self._due[number] = self._clock()

    def state(self, number: int) -> State:
        """State of one actor."""
        return self._states[number]

    def having(self, *states: State) -> list[int]:
        """Numbers of the actors in one of ``states``."""
        return [number for number, state in enumerate(self._states) if state in states]

    def started(self, number: int) -> None:
        """The process is there: it serves, or waits for a place."""
        taken = len(set(self.having(State.SERVING)) - set(self.guests))
        serves = number in self.guests or taken < self._places
        self._move(number, (State.STARTING,), State.SERVING if serves else State.SPARE)
        if number in self.guests:
            self._in_a_row[number] = 0

    def answered(self) -> None:
        """One of the actors did its work: losses are counted anew."""
        self._causes.clear()
        self._in_a_row[: self.guests.start] = [0] * self.guests.start

    def lost(self, number: int, cause: str) -> int | None:
        """An actor is gone. The first time in a row it is replaced at once, later after a pause that doubles.

        Args:
            number: which one.
            cause: why; of a guest, only where it could not work, and then its pause doubles.

        Returns:
            The spare that serves in its place from now on, if there is one.
        """
        served = self._states[number] is State.SERVING
        self._move(number, (State.STARTING, State.SERVING, State.SPARE), State.LOST)
        if number in self.guests:
            pause = min(GUEST_PAUSE_S * 2.0 ** self._in_a_row[number], LONGEST_GUEST_PAUSE_S)
            self._due[number] = self._clock() + pause
            self._in_a_row[number] += bool(cause)
            return None
        self._causes.append(cause)
        self._in_a_row[number] += 1
        pause = 0.0 if self._in_a_row[number] == 1 else min(2.0 ** (self._in_a_row[number] - 2), LONGEST_PAUSE_S)
        self._due[number] = self._clock() + pause
        spares = self.having(State.SPARE)
        if not served or not spares:
            return None
        self._move(spares[0], (State.SPARE,), State.SERVING)
        return spares[0]

    def due(self) -> list[int]:
        """Lost actors whose replacement is to be started now."""
        return [number for number in self.having(State.LOST) if self._clock() >= self._due[number]]

    def restarting(self, number: int) -> None:
        """A replacement was started."""
        self._move(number, (State.LOST,), State.STARTING)

    @property
    def given_up(self) -> str | None:
        """Why no actor will be replaced any more, as a person should read it; None while there is hope."""
        if max(self._in_a_row[: self.guests.start]) <= self._allowed:
            return None
        what = f"a {self._role} actor was lost"
        if self._allowed:
            what = f"{self._role} actors were lost {len(self._causes)} times in a row, the first time"
        return f"{what} because {self._causes[0]}"

    def _move(self, number: int, before: Sequence[State], after: State) -> None:
        if self._states[number] not in before:
            raise ValueError(f"{self._role} actor {number} is {self._states[number].value}: it cannot be {after.value}")
        self._states[number] = after
