"""The trace of a run's last steps: a valid file, one row for each actor, nothing over another in a row."""

import itertools
import json
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.events import EventLog
from pipeline.cli import main
from pipeline.trace import trace

START = 1_800_000_000.0


def stamp(seconds: float) -> str:
    moment = datetime.fromtimestamp(START + seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """Three GRPO steps of 10 s each: 6 s of waiting for two rollout actors, then 4 s of training on two ranks."""
    monkeypatch.setattr("common.events.time.time", lambda: now[0])
    now = [START]
    (tmp_path / "identity.json").write_text("{}")
    events = EventLog(tmp_path / "events.jsonl", 1)
    events.write("run_started", pid=1)
    logs: dict[str, list[str]] = defaultdict(list)
    for step in range(1, 4):
        begin = 10.0 * (step - 1)
        for actor in range(2):
            logs[f"rollout-{actor}"] += [
                f"{stamp(begin + 3.0)} INFO sample took 3.001 s",  # rounded: begins before the step does
                f"{stamp(begin + 6.0)} INFO sample took 3.002 s",  # and before the one before it ended
            ]
            logs[f"learner-{actor}"].append(f"{stamp(begin + 10)} INFO train took 4.000 s")
        logs["reward-0"] += [f"{stamp(begin + 4)} INFO score took 0.500 s", f"{stamp(begin + 5)} WARNING not a call"]
        now[0] = START + 10.0 * step
        events.write("step", stage="grpo", step=step, sample_s=6.0, train_s=4.0)
    events.close()
    (tmp_path / "logs").mkdir()
    for name, lines in logs.items():
        (tmp_path / "logs" / f"{name}.log").write_text("\n".join(lines) + "\n")
    return tmp_path


def rows(made: dict) -> dict[str, list[dict]]:
    names = {e["tid"]: e["args"]["name"] for e in made["traceEvents"] if e["name"] == "thread_name"}
    found: dict[str, list[dict]] = {name: [] for name in names.values()}
    for event in made["traceEvents"]:
        if event["ph"] == "X":
            found[names[event["tid"]]].append(event)
    return found


def test_the_command_writes_a_row_for_the_driver_and_for_each_actor_in_which_nothing_overlaps(run):
    assert main(["trace", str(run), "--steps", "2"]) == 0
    made = json.loads((run / "trace.json").read_text())
    found = rows(made)
    assert list(found) == ["driver", "learner-0", "learner-1", "reward-0", "rollout-0", "rollout-1"]
    for spans in found.values():
        assert all(span["ts"] >= 0 and span["dur"] >= 0 and isinstance(span["ts"], int) for span in spans)
        assert all(b["ts"] >= a["ts"] + a["dur"] for a, b in itertools.pairwise(spans))
    steps = ["grpo step 2: wait for groups", "grpo step 2: train", "grpo step 3: wait for groups", "grpo step 3: train"]
    assert [span["name"] for span in found["driver"]] == steps
    assert [span["dur"] for span in found["driver"]] == [6_000_000, 4_000_000] * 2
    assert [(s["name"], s["ts"], s["dur"]) for s in found["learner-1"]] == [
        ("train", 6_000_000, 4_000_000),
        ("train", 16_000_000, 4_000_000),
    ]
    assert len(found["reward-0"]) == 2


def test_the_driver_of_a_supervised_stage_has_its_training_steps(tmp_path):
    (tmp_path / "identity.json").write_text("{}")
    events = EventLog(tmp_path / "events.jsonl", 1)
    events.write("run_started", pid=1)
    events.write("step", stage="sft", step=1, max_seconds=0.5)
    events.close()
    ((span,),) = rows(trace(tmp_path, 20)).values()
    assert (span["name"], span["ts"], span["dur"]) == ("sft step 1: train", 0, 500_000)


def test_a_run_without_a_finished_step_and_a_folder_that_is_no_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        trace(tmp_path, 20)
    (tmp_path / "identity.json").write_text("{}")
    with pytest.raises(ConfigError, match="has not finished a step yet"):
        trace(tmp_path, 20)
