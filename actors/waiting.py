"""Every wait has a name, a deadline and a periodic line that says what it waits for."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from common.errors import ActorError, DeadlineError, OmniAlphaError

log = logging.getLogger("omnialpha")

REPORT_EVERY_S = 30.0

Value = TypeVar("Value")


def wait_all(refs: Sequence[Any], what: str, deadline_s: float) -> list[Any]:
    """Values of all ``refs``, in order. Large values do not belong here: wait for the small return beside them.

    The first failure ends the wait at once, so that ranks which hang because a peer failed do not hide its error.

    Raises:
        DeadlineError: not all were there in time; says how many were missing.
        ActorError: an actor died, or raised something unexpected (its traceback is in the log).
        OmniAlphaError: an actor raised an expected error; it arrives as itself.
    """
    start = reported = time.monotonic()
    pending, values = list(dict.fromkeys(refs)), {}
    while pending:
        now = time.monotonic()
        left = deadline_s - (now - start)
        if left <= 0:
            raise DeadlineError(
                f"{what}: {len(pending)} of {len(refs)} still missing after {deadline_s:.0f} s; "
                "raise cluster.deadline_s if the work is that slow, otherwise look for a stuck actor in `ray status`"
            )
        ready, pending = ray.wait(pending, num_returns=1, timeout=min(left, 5.0))
        for ref in ready:
            values[ref] = _get(ref, what)
        if now - reported >= REPORT_EVERY_S:
            reported = now
            log.info("waiting for %s: %d of %d after %.0f s", what, len(refs) - len(pending), len(refs), now - start)
    return [values[ref] for ref in refs]


def _get(ref: Any, what: str) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        raise expected(error, what) from None


def expected(error: RayError, what: str) -> OmniAlphaError:
    """What a failed call means to a person: an actor's own expected error, or one message about the actor."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        log.debug("%s failed:\n%s", what, error)
        if isinstance(cause, OmniAlphaError):
            return cause
        return ActorError(f"{what}: {type(cause).__name__}: {cause}; the actor's traceback is in the run's log")
    if isinstance(error, RayActorError):
        log.debug("%s: %s", what, error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if getattr(error, "actor_init_failed", False):  # the last line of the constructor's traceback is its message
            return ActorError(f"{what}: {lines[-1].partition(': ')[2] or lines[-1]}")
        reason = lines[0]
        return ActorError(f"{what}: an actor died ({reason}); run the same command again to go on from the last commit")
    return ActorError(f"{what}: {str(error).strip().splitlines()[0]}")


def wait_futures(futures: Sequence[Future[Value]], what: str) -> list[Value]:
    """Results of all ``futures``, in order; each of them keeps deadlines of its own.

    Raises:
        OmniAlphaError: the first failure.
    """
    start = reported = time.monotonic()
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=5.0, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        if (now := time.monotonic()) - reported >= REPORT_EVERY_S:
            reported, there = now, len(futures) - len(pending)
            log.info("waiting for %s: %d of %d after %.0f s", what, there, len(futures), now - start)
    return [future.result() for future in futures]
