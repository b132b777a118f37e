"""``omnialpha trace RUN``: who did what in the last steps, as a file for Perfetto or chrome://tracing. One row for the
driver, from the event log, and one for each actor, from its own log. Clocks of several machines are taken as they are.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.commit import write_atomic
from common.errors import ConfigError
from common.role_logs import read_lines
from pipeline.report_data import Event
from pipeline.status import read_status

log = logging.getLogger("omnialpha")


@dataclass(frozen=True)
class Span:
    """Something that took a while."""

    name: str
    begin: float
    """Wall-clock seconds."""
    end: float


def trace(folder: Path, steps: int) -> dict[str, Any]:
    """The last ``steps`` steps of a run's last attempt, in Chrome's trace event format.

    Raises:
        ConfigError: it is no run folder, or no step was finished.
    """
    taken = [event for event in read_status(folder).attempt if event["event"] == "step"][-steps:]
    if not taken:
        raise ConfigError(f"{folder}: the last attempt has not finished a step yet; trace it when it has")
    driver = apart([span for event in taken for span in _of_step(event)])
    since = driver[0].begin
    rows = {"driver": driver}
    for path in sorted((folder / "logs").glob("*.log")):
        rows[path.stem] = apart([span for span in _calls(path, since) if span.begin >= since])
    made: list[dict[str, Any]] = []
    for number, (row, spans) in enumerate(rows.items()):
        made.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}})
        made.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": number, "args": {"sort_index": number}})
        for span in spans:
            begin, end = (round((moment - since) * 1e6) for moment in (span.begin, span.end))
            made.append(
                {"ph": "X", "name": span.name, "cat": row, "pid": 0, "tid": number, "ts": begin, "dur": end - begin}
            )
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def apart(spans: list[Span]) -> list[Span]:
    """Spans of one row in their order, without the overlaps that rounding of times to milliseconds leaves."""
    row: list[Span] = []
    for span in sorted(spans, key=lambda span: span.end):
        begin = max(span.begin, row[-1].end) if row else span.begin
        row.append(Span(span.name, min(begin, span.end), span.end))
    return row


def _of_step(event: Event) -> Iterator[Span]:
    end, stage, step = event["time"], event["stage"], event["step"]
    train = event.get("train_s", event.get("max_seconds")) or 0.0
    yield Span(f"{stage} step {step}: train", end - train, end)
    if waited := event.get("sample_s"):
        yield Span(f"{stage} step {step}: wait for groups", end - train - waited, end - train)


def _calls(path: Path, since: float) -> Iterator[Span]:
    for line in read_lines(path, since):
        if call := line.call:
            name, seconds = call
            yield Span(name, line.time - seconds, line.time)


def register(commands: Any) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("trace", help="who did what in a run's last steps, for Perfetto or chrome://tracing")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--steps", type=_count, default=20, help="how many of the last steps (default: 20)")
    parser.add_argument("--out", type=Path, help="file to write; default: RUN/trace.json")
    parser.set_defaults(handler=_trace)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps; give 1 or more")
    return int(text)


def _trace(options: argparse.Namespace) -> None:
    made = trace(options.run, options.steps)
    out = options.out or options.run / "trace.json"
    write_atomic(out, json.dumps(made, separators=(",", ":")) + "\n")
    log.info("wrote %s; open it in chrome://tracing or Perfetto", out)
