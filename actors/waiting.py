"""Every wait has a name, a deadline and a periodic line that says what it waits for."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from common.errors import ActorError, DeadlineError, OmniAlphaError

log = logging.getLogger("omnialpha")

REPORT_EVERY_S = 30.0


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
    except RayTaskError as error:
        cause = error.cause
        log.debug("%s failed:\n%s", what, error)
        if isinstance(cause, OmniAlphaError):
            raise cause from None
        raise ActorError(
            f"{what}: {type(cause).__name__}: {cause}; the actor's traceback is in the run's log"
        ) from None
    except RayActorError as error:
        log.debug("%s: %s", what, error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if getattr(error, "actor_init_failed", False):  # the last line of the constructor's traceback is its message
            raise ActorError(f"{what}: {lines[-1].partition(': ')[2] or lines[-1]}") from None
        reason = lines[0]
        raise ActorError(
            f"{what}: an actor died ({reason}); run the same command again to go on from the last commit"
        ) from None
    except RayError as error:
        raise ActorError(f"{what}: {str(error).strip().splitlines()[0]}") from None
