"""The run's event log: one JSON object a line, appended, flushed, never rewritten.

Group accounting can be checked from it alone (:func:`group_balance`): every launched group is trained in the
committed lineage, dropped for a stated reason, rolled back, or still in flight.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.commit import storage_errors


class EventLog:
    """Appends events, from any thread."""

    def __init__(self, path: Path, attempt: int = 0, hear: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        """
        Args:
            path: the file.
            attempt: counts the driver's starts on this run folder.
            hear: is told of each event and its facts too.
        """
        self.path = path
        self.attempt = attempt
        self._hear = hear
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:  # the last writer was killed inside a line
            self._file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        """Adds one event with its wall-clock time in seconds."""
        line = {"time": round(time.time(), 3), "attempt": self.attempt, "event": event, **fields}
        with self._lock, storage_errors(self.path):
            self._file.write(json.dumps(finite(line), separators=(",", ":"), allow_nan=False) + "\n")
            self._file.flush()
        if self._hear:
            self._hear(event, fields)

    def sync(self) -> None:
        """Makes everything written so far durable; comes before a commit that refers to it."""
        with storage_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the log. Every event was flushed when it was written; what the disk refused then is not tried again."""
        with contextlib.suppress(OSError):
            self._file.close()


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete events; a line torn by a crash is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def group_balance(events: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Counts groups: ``launched``, ``trained``, ``dropped:<reason>`` and ``in_flight``.

    A rollback (``event="rollback"``, ``to_step``) turns groups launched for later steps into
    ``dropped:rolled back``, whatever had become of them.
    """
    fates, counts = _fates(events)
    counts.update(fate for _, fate in fates.values())
    return dict(counts)


def in_flight(events: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Groups that were launched and have neither been trained nor dropped → the step they were launched for."""
    return {group: step for group, (step, fate) in _fates(events)[0].items() if fate == "in_flight"}


def _fates(events: Iterable[dict[str, Any]]) -> tuple[dict[str, tuple[int, str]], Counter[str]]:
    """(group → (step, fate) in the current lineage, how many were launched and rolled back in all)."""
    state: dict[str, tuple[int, str]] = {}
    counts: Counter[str] = Counter()
    for event in events:
        match event["event"]:
            case "group_launched":
                counts["launched"] += 1
                state[event["group"]] = (event["step"], "in_flight")
            case "group_trained":
                state[event["group"]] = (event["step"], "trained")
            case "group_dropped":
                state[event["group"]] = (event["step"], f"dropped:{event['reason']}")
            case "rollback" if event.get("stage", "grpo") == "grpo":
                for group, (step, _) in list(state.items()):
                    if step > event["to_step"]:
                        counts["dropped:rolled back"] += 1
                        del state[group]
    return state, counts
