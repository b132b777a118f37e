"""``omnialpha status RUN``: what a run has done and what it is doing, read from its folder alone: while it goes, after
it, and after a crash. Changes nothing there."""

import argparse
import fcntl
import itertools
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.commit import MANIFEST
from common.errors import ConfigError
from common.events import group_balance, read_events
from pipeline.report_data import TRAINED, Event, lineage

QUIET_S = 120.0
"""Silence of a living driver after which its status says so."""
RECENT = 20
"""Steps over which the pace is measured."""


@dataclass(frozen=True)
class Status:
    """What the folder tells."""

    folder: Path
    alive: bool
    """Whether a driver holds the folder."""
    now: float
    """Wall-clock seconds."""
    config: dict[str, Any]
    events: list[Event] = field(default_factory=list)
    """Of all attempts."""
    log_tail: str = ""
    """End of the run's log."""

    @property
    def attempt(self) -> list[Event]:
        """Events of the last attempt."""
        starts = [place for place, event in enumerate(self.events) if event["event"] == "run_started"]
        return self.events[starts[-1] :] if starts else []

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the whole run: those that its configuration has, and none before ``grpo.start``."""
        if (self.config.get("grpo") or {}).get("start"):
            return ("grpo", "evaluate")
        return tuple(stage for stage in (*TRAINED, "evaluate") if not self.config or self.config.get(stage))

    @property
    def stage(self) -> str | None:
        """The stage that the last attempt has begun and not ended."""
        begun = None
        for event in self.attempt:
            if event["event"] == "stage_started":
                begun = event["stage"]
            elif event["event"] == "stage_seconds":
                begun = None
        return begun

    def done(self, stage: str) -> bool:
        """Whether a stage's result is there (``omnialpha`` itself also verifies it)."""
        return (self.folder / stage / "final" / MANIFEST).is_file()


def read_status(folder: Path, now: float | None = None) -> Status:
    """Reads a run folder.

    Raises:
        ConfigError: it is none.
    """
    if not (folder / "identity.json").is_file():
        raise ConfigError(
            f"{folder}: not a run folder (no identity.json); give the folder that `omnialpha run` writes, for example "
            "runs/demo"
        )
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    alive = held(folder / ".lock")  # before the events: what ends in between is then seen as ended
    events = [e for e in read_events(folder / "events.jsonl") if isinstance(e, dict) and {"time", "event"} <= e.keys()]
    return Status(
        folder,
        alive,
        time.time() if now is None else now,
        config if isinstance(config, dict) else {},
        events,
        _tail(folder / "log.txt"),
    )


def held(lock: Path) -> bool:
    """Whether a driver holds the lock of a run folder."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def render_status(status: Status) -> str:
    """A few lines for a person."""
    rows = [(str(status.folder), _driver(status))]
    steps = lineage(status.events)
    rows += [(stage, _stage(status, stage, steps.get(stage, {}))) for stage in status.stages]
    if status.alive:
        rows.append(("now", _now(status)))
    balance = group_balance(status.events)
    if launched := balance.pop("launched", 0):
        parts = [f"{name.replace('dropped:', 'dropped as ')} {count}" for name, count in sorted(balance.items())]
        rows.append(("groups", ", ".join([f"{launched} launched", *parts]).replace("_", " ")))
    if missing := sum(event.get("missing_scores") or 0 for event in steps.get("grpo", {}).values()):
        reasons: Counter[str] = Counter()
        for event in steps["grpo"].values():
            reasons.update(event.get("missing_because") or {})
        rows.append(("scores", f"{missing} missing, mostly because {reasons.most_common(1)[0][0]}"))
    rows += [("actors", line) for line in _actors(status)]
    failures = [event for event in status.events if event["event"] == "run_failed"]
    if failures and failures[-1].get("error") != "Interrupted":
        last = failures[-1]
        text = f"{last.get('error')} in attempt {last.get('attempt')}, {_ago(status, last)}: {last.get('message')}"
        rows.append(("last error", text))
    first, *others = rows
    width = max(len(name) for name, _ in others)
    return "\n".join([f"{first[0]}: {first[1]}", *(f"  {name:{width}s}  {text}" for name, text in others)])


def _driver(status: Status) -> str:
    attempt, stage = status.attempt, status.stage
    if not attempt:
        return "a driver has just begun" if status.alive else "nothing has run yet"
    start, last = attempt[0], attempt[-1]
    which = f"attempt {start.get('attempt')}"
    if status.alive:
        return f"running, {which}, process {start.get('pid')}, for {_span(status.now - start['time'])}"
    when = _ago(status, last)
    if last["event"] == "run_failed":
        if last.get("error") == "Interrupted":
            return f"stopped on request, {which}, {when}; the same command goes on"
        return f"failed, {which}, {when}; mend what the last error says, then the same command goes on"
    if stage or (not _begun(attempt) and any(e["event"] == "environment" for e in attempt)):
        where = f"in stage {stage}" if stage else "while it prepared"
        return (
            f"its driver ended {where} without a word (killed, or its machine went down), {which}, last event {when}; "
            "the same command goes on"
        )
    if all(status.done(name) for name in status.stages):
        return f"finished, {which}, {when}"
    return f"not running; {which} did what it was asked for, {when}"


def _begun(attempt: Sequence[Event]) -> bool:
    return any(event["event"] == "stage_started" for event in attempt)


def _stage(status: Status, stage: str, steps: dict[int, Event]) -> str:
    spent = sum(event["seconds"] for event in _named(status.events, "stage_seconds", stage))
    if status.done(stage):
        return f"done in {_span(spent)}" if spent else "done"
    if not steps and not _named(status.events, "stage_started", stage):
        return "not begun"
    if stage not in TRAINED:
        return "begun"
    total = (status.config.get(stage) or {}).get("steps")
    last = max(steps, default=0)
    parts = [f"step {last}" + (f" of {total}" if total else "")]
    if pace := seconds_per_step(status.events, stage):
        parts.append(f"{pace:.2g} s a step" if pace < 10 else f"{pace:.0f} s a step")
        if total and status.alive and status.stage == stage:
            parts.append(f"about {_span((total - last) * pace)} left")
    commits = [path.parent.name for path in (status.folder / stage).glob(f"step-*/{MANIFEST}")]
    newest = max((int(name.removeprefix("step-")) for name in commits), default=None)
    parts.append("no commit yet" if newest is None else f"last commit at step {newest}")
    if rolled := _named(status.events, "rollback", stage):
        parts.append(f"taken back to a commit {_times(len(rolled))}")
    return ", ".join(parts)


def seconds_per_step(events: Sequence[Event], stage: str) -> float | None:
    """Median time between the stage's latest steps of one attempt; None before there are two."""
    taken = _named(events, "step", stage)
    recent = [event for event in taken if event.get("attempt") == taken[-1].get("attempt")][-RECENT - 1 :]
    gaps = [b["time"] - a["time"] for a, b in itertools.pairwise(recent)]
    return statistics.median(gaps) if gaps else None


def _now(status: Status) -> str:
    last = status.events[-1] if status.events else None
    where = f"in stage {status.stage}" if status.stage else "preparing, or between stages"
    if last is None:
        return where
    text = f"{where}; last event {_ago(status, last)} ({last['event'].replace('_', ' ')})"
    if waiting := waited_for(status.log_tail):
        text += f"; waiting for {waiting}"
    elif status.now - last["time"] > QUIET_S:
        text += "; quiet for longer than usual: see the end of log.txt, and `ray status` for stuck actors"
    return text


def waited_for(log_tail: str) -> str | None:
    """What the last line of a log says that the run waits for."""
    lines = log_tail.strip().splitlines()
    found = re.search(r" INFO waiting for (.*)$", lines[-1]) if lines else None
    return found.group(1) if found else None


def _actors(status: Status) -> list[str]:
    """Lost and replaced actors, by role; one line where there were any."""
    lost = [event for event in status.events if event["event"] == "actor_lost"]
    if not lost:
        return []
    replaced = Counter(event["role"] for event in status.events if event["event"] == "actor_replaced")
    counts = Counter(event["role"] for event in lost)
    parts = [
        f"{role} lost {_times(count)}, replaced {_times(replaced[role])}" for role, count in sorted(counts.items())
    ]
    last = lost[-1]
    name = f"{last['role']} {last['actor']}" if "actor" in last else last["role"]
    line = f"{'; '.join(parts)}; last {name}, {_ago(status, last)}: {last['cause']}"
    missing = (counts - replaced).total()
    return [line + ("; a replacement is starting" if status.alive and missing else "")]


def _named(events: Sequence[Event], name: str, stage: str) -> list[Event]:
    return [event for event in events if event["event"] == name and event.get("stage") == stage]


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _ago(status: Status, event: Event) -> str:
    return f"{_span(max(0.0, status.now - event['time']))} ago"


def _span(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5940:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _tail(path: Path, size: int = 4096) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def register(commands: Any) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("status", help="what a run has done and is doing, from its folder alone")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.set_defaults(handler=_status)


def _status(options: argparse.Namespace) -> None:
    print(render_status(read_status(options.run)))
