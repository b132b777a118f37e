"""A scorer that is being tried out may hang, crash or exit: it does so in a child of the command, which says what
happened."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from common.errors import OmniAlphaError, RewardError

Beat = Callable[[], None]
"""What the function calls to say that it has got on; its deadline then begins anew."""

START_S = 120.0
"""Longest time until the first beat: importing torch on a busy machine is nobody's fault."""


def in_child(what: str, deadline_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(beat, *arguments)`` of a module, run in a child process; its result must be picklable.

    Args:
        what: names the scorers in messages.
        deadline_s: longest time between two beats, or from the last one to the result.
        function: first takes a :data:`Beat`.
        arguments: the others.

    Raises:
        RewardError: nothing came in time, or the child ended without a result.
        OmniAlphaError: the function raised it.
    """
    # Spawned, not forked: torch and whatever a scorer imports must not meet threads that are copied half-way.
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(send, function, arguments))
    child.start()
    send.close()
    limit = max(START_S, deadline_s)
    try:
        while receive.poll(limit):
            limit = deadline_s
            result, error = receive.recv() or (_BEAT, None)
            if error is not None:
                raise error
            if result is not _BEAT:
                return result
        raise RewardError(f"{what}: no answer within {limit:g} s; mend it, or raise --deadline if it is that slow")
    except EOFError:
        child.join()
        raise RewardError(
            f"{what}: ended its process ({_ending(child.exitcode)}); mend it: nothing may do that"
        ) from None
    finally:
        child.kill()
        assert child.pid is not None
        with contextlib.suppress(ProcessLookupError):  # what it started goes with it
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


_BEAT = object()


def _run(send: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()  # a Ctrl-C goes to the parent alone, which then ends this group
    result, error = None, None
    try:
        result = function(lambda: send.send(None), *arguments)
    except OmniAlphaError as expected:
        error = expected
    with contextlib.suppress(BrokenPipeError):
        send.send((result, error))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
