"""One log per process of a run, ``logs/<role>-<number>.log``: a line for every call it was given, with the seconds it
took, and what it raised. Times are UTC, so that logs of several machines can be laid side by side.
"""

import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from common.commit import storage_errors

calls = logging.getLogger("omnialpha.calls")

_inside = threading.local()

_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z ([A-Z]+) (.*)")
_CALL = re.compile(r"(\w+) took ([\d.]+) s")

Actor = TypeVar("Actor", bound=type)


def log_to(path: Path) -> TextIO:
    """From now on this process's logging goes to the end of ``path``; returns the opened file.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a", encoding="utf-8", buffering=1)
    handler = logging.StreamHandler(opened)
    form = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handler.setFormatter(form)
    logging.getLogger().addHandler(handler)
    logging.getLogger("omnialpha").setLevel(logging.INFO)
    return opened


def recorded(actor: Actor) -> Actor:
    """Class decorator: every call of a public method leaves its line in the log of the process."""
    for name, method in list(vars(actor).items()):
        if not name.startswith("_") and callable(method):
            setattr(actor, name, recording(name, method))
    return actor


def recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, each call of which leaves its line under ``name``, unless another recorded one makes it."""

    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        if getattr(_inside, "call", False):
            return method(*arguments, **named)
        _inside.call, began = True, time.perf_counter()
        try:
            value = method(*arguments, **named)
        except Exception as error:
            calls.error("%s raised %s: %s", name, type(error).__name__, error, exc_info=True)
            raise
        finally:
            _inside.call = False
        calls.info("%s took %.3f s", name, time.perf_counter() - began)
        return value

    return call


@dataclass(frozen=True)
class Line:
    """The first line of one log message."""

    time: float
    """Wall-clock seconds."""
    level: str
    text: str

    @property
    def call(self) -> tuple[str, float] | None:
        """(method, seconds) where the line is about a call that came to its end."""
        found = _CALL.fullmatch(self.text)
        return (found.group(1), float(found.group(2))) if found else None


def read_lines(path: Path, since: float = 0.0) -> Iterator[Line]:
    """Messages of one log from ``since`` on."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if found := _LINE.match(text):
                moment = datetime.fromisoformat(found.group(1)).replace(tzinfo=UTC).timestamp()
                if moment >= since:
                    yield Line(moment, found.group(2), found.group(3))


@dataclass(frozen=True, order=True)
class Failure:
    """What an actor raised."""

    time: float
    """Wall-clock seconds."""
    log: Path
    text: str

    @property
    def message(self) -> str:
        """First line of the exception's own message."""
        return self.text.partition(": ")[2]

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.time, UTC).strftime("%H:%M:%S")
        return f"the first failure was in {self.log.stem} at {when} UTC: {self.text} (traceback in {self.log})"


def first_failure(folder: Path, since: float) -> Failure | None:
    """The earliest exception in any log of ``folder`` from ``since`` on; None where there is none."""
    failures = [
        Failure(line.time, path, line.text)
        for path in sorted(folder.glob("*.log"))
        for line in read_lines(path, since)
        if line.level == "ERROR"
    ]
    return min(failures, default=None)
