"""Every wait has a name, a deadline and a periodic line that says what it waits for, and ends when nobody wants its
outcome any more."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextvars import ContextVar
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from actors.stacks import dump_stacks
from common.errors import ActorError, DeadlineError, LostValueError, OmniAlphaError

log = logging.getLogger("omnialpha")

REPORT_EVERY_S = 30.0

LOOK_UP_EVERY_S = 0.5
"""A wait looks up this often: whether it is still wanted, whether it is time for a line."""

LOST = (RayActorError, OutOfMemoryError, NodeDiedError)
"""How Ray says that an actor is gone, as opposed to an error that it raised."""

PROCESS_ENDED = "its process"
"""How a message about the end of an actor's process begins."""

Value = TypeVar("Value")


_unwanted: ContextVar[threading.Event | None] = ContextVar("unwanted", default=None)


class Abandoned(Exception):
    """Nobody wants what this thread waits for any more."""


def in_background(work: Callable[[], Value], name: str, unwanted: threading.Event) -> Future[Value]:
    """Starts a thread; once ``unwanted`` is set, its next wait raises :class:`Abandoned`."""
    future: Future[Value] = Future()

    def run() -> None:
        _unwanted.set(unwanted)
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: a second Ctrl-C ends the driver at once.
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _check_wanted() -> None:
    unwanted = _unwanted.get()
    if unwanted is not None and unwanted.is_set():
        raise Abandoned


class Wait:
    """A wait's deadline and its periodic line."""

    def __init__(self, what: str, count: int, deadline_s: float) -> None:
        self._what, self._count, self._deadline = what, count, deadline_s
        self._start = self._reported = time.monotonic()

    def left(self, missing: int, heard_at: float = 0.0) -> float:
        """Seconds that are left, counted anew from ``heard_at``: when whoever is waited for last gave an answer, be it
        to somebody else.

        Raises:
            DeadlineError: none; says how many things are still missing.
            Abandoned: the outcome is not wanted any more.
        """
        _check_wanted()
        now = time.monotonic()
        waited, silent = now - self._start, now - max(self._start, heard_at)
        if silent >= self._deadline:
            overdue = f"{self._what}: {missing} of {self._count} still missing after {self._deadline:.0f} s"
            log.warning("%s", overdue)
            folder = dump_stacks()
            seen = f"what every process was doing is in {folder}; " if folder else ""
            raise DeadlineError(
                f"{overdue}; {seen}raise cluster.deadline_s if the work is that slow, otherwise look for a stuck actor "
                "in `ray status`"
            )
        if now - self._reported >= REPORT_EVERY_S:
            self._reported, there = now, self._count - missing
            log.info("waiting for %s: %d of %d after %.0f s", self._what, there, self._count, waited)
        return self._deadline - silent


def wait_all(refs: Sequence[Any], what: str, deadline_s: float, look: Callable[[], None] | None = None) -> list[Any]:
    """Values of all ``refs``, in order. Large values do not belong here: wait for the small return beside them.

    The first failure ends the wait at once, so that ranks which hang because a peer failed do not hide its error.
    ``look`` is called while nothing happens, and ends the wait by raising.

    Raises:
        LostValueError: what a call was to work on was lost with its node.
        DeadlineError: not all were there in time; says how many were missing.
        ActorError: an actor died, or raised something unexpected (its traceback is in the log).
        OmniAlphaError: an actor raised an expected error; it arrives as itself.
    """
    pending, values = list(dict.fromkeys(refs)), {}
    wait = Wait(what, len(refs), deadline_s)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(wait.left(len(pending)), LOOK_UP_EVERY_S))
        for ref in ready:
            values[ref] = _get(ref, what)
        if look and not ready:
            look()
    return [values[ref] for ref in refs]


def _get(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        raise expected(error, what) from None


def expected(error: RayError, what: str) -> OmniAlphaError:
    """What a failed call means to a person: an actor's own expected error, or one message about the actor."""
    if isinstance(error, ObjectLostError):  # also where an actor's argument was: its error is of both classes
        log.debug("%s: %s", what, error)
        return LostValueError(
            f"{what}: a value was lost with the node that held it; run the same command again to go on from the last "
            "commit"
        )
    if isinstance(error, RayTaskError):
        cause = error.cause
        log.debug("%s failed:\n%s", what, error)
        if isinstance(cause, OmniAlphaError):
            return cause
        return ActorError(f"{what}: {type(cause).__name__}: {cause}; the actor's traceback is in the run's log")
    if isinstance(error, RayActorError):
        log.debug("%s: %s", what, error)
        if getattr(error, "actor_init_failed", False):
            return ActorError(f"{what}: {lost_because(error)}")
        reason = lost_because(error)
        return ActorError(f"{what}: an actor died ({reason}); run the same command again to go on from the last commit")
    return ActorError(f"{what}: {str(error).strip().splitlines()[0]}")


def lost_because(error: RayError) -> str:
    """Ray's reason for the loss of an actor, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if getattr(error, "actor_init_failed", False):  # the last line of the constructor's traceback is its message
        return lines[-1].partition(": ")[2] or lines[-1]
    if "connection error code 2" in str(error):  # Ray saw no more of it than its end
        pid = next((f" {line[4:].strip()}" for line in lines if line.startswith("pid:")), "")
        return f"{PROCESS_ENDED}{pid} ended: killed, out of memory, or a crash"
    return next((line for line in lines if line.startswith("The actor is dead because")), lines[0])[:300]


def wait_futures(futures: Sequence[Future[Value]], what: str) -> list[Value]:
    """Results of all ``futures``, in order; each of them keeps deadlines of its own.

    Raises:
        OmniAlphaError: the first failure.
    """
    start = reported = time.monotonic()
    pending = set(futures)
    while pending:
        _check_wanted()
        done, pending = wait(pending, timeout=LOOK_UP_EVERY_S, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        if (now := time.monotonic()) - reported >= REPORT_EVERY_S:
            reported, there = now, len(futures) - len(pending)
            log.info("waiting for %s: %d of %d after %.0f s", what, there, len(futures), now - start)
    return [future.result() for future in futures]
