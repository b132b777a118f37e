"""``omnialpha status`` on run folders in every condition that a person meets."""

import fcntl
import time
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.events import EventLog
from pipeline.cli import main
from pipeline.run import Run
from pipeline.status import read_status, render_status, seconds_per_step, waited_for
from tests.unit.pipeline.report_runs import make_run


def write(folder: Path, *events: tuple[str, dict], attempt: int = 1) -> None:
    log = EventLog(folder / "events.jsonl", attempt)
    for name, fields in events:
        log.write(name, **fields)
    log.close()


def text_of(folder: Path, later: float = 0.0) -> str:
    return render_status(read_status(folder, time.time() + later))


def lines_of(text: str) -> dict[str, str]:
    """The text's lines by their first word."""
    first, *others = text.splitlines()
    return {"": first} | {line.split()[0]: line.split(maxsplit=1)[1] for line in others}


def test_a_finished_run(tmp_path):
    make_run(tmp_path / "run")
    write(tmp_path / "run", ("stage_seconds", {"stage": "evaluate", "seconds": 5.0}))
    told = lines_of(text_of(tmp_path / "run", 240))
    assert told[""].endswith(": finished, attempt 1, 4 min ago")
    assert told["vae"] == told["sft"] == "done in 12 s"
    assert told["grpo"] == "done in 33 s"
    assert told["evaluate"] == "done in 5 s"
    assert told["groups"] == "6 launched, dropped as zero variance 1, trained 5"
    assert told["scores"].startswith("6 missing, mostly because boundary")
    assert not {"now", "actors", "last"} & told.keys()


def test_a_run_that_was_killed_says_where_it_was_and_that_the_same_command_goes_on(tmp_path):
    make_run(tmp_path / "run", grpo_steps=3, finished=False)
    told = lines_of(text_of(tmp_path / "run", 7200))
    assert "its driver ended in stage grpo without a word" in told[""]
    assert "last event 2.0 h ago; the same command goes on" in told[""]
    assert told["grpo"].startswith("step 3 of 6")
    assert told["grpo"].endswith("no commit yet")
    assert told["evaluate"] == "not begun"
    assert "now" not in told


def test_a_failed_run_shows_its_error(tmp_path):
    make_run(tmp_path / "run", grpo_steps=3, finished=False)
    write(tmp_path / "run", ("run_failed", {"error": "ActorError", "message": "rollout actors were lost 4 times"}))
    told = lines_of(text_of(tmp_path / "run"))
    assert "failed, attempt 1" in told[""]
    assert told["last"].startswith("error  ActorError in attempt 1, 0 s ago: rollout actors were lost 4 times")


def test_a_run_that_was_asked_to_stop_has_no_error(tmp_path):
    make_run(tmp_path / "run", grpo_steps=3, finished=False)
    write(tmp_path / "run", ("run_failed", {"error": "Interrupted", "message": "stopped in stage 'grpo'"}))
    told = lines_of(text_of(tmp_path / "run"))
    assert "stopped on request" in told[""]
    assert "last" not in told


def test_a_run_that_is_at_work_says_what_it_does_and_what_it_waits_for(tmp_path):
    folder = make_run(tmp_path / "run", grpo_steps=3, finished=False) or tmp_path / "run"
    (folder / "grpo" / "step-00000002").mkdir(parents=True)
    (folder / "grpo" / "step-00000002" / "manifest.json").write_text("{}")
    (folder / "log.txt").write_text(
        "2026-01-01 00:00:00,000 INFO waiting for rollout actors: groups: 3 of 8 after 30 s\n"
    )
    write(
        folder,
        ("actor_lost", {"role": "rollout", "actor": 1, "cause": "its process 7 ended"}),
        ("actor_replaced", {"role": "rollout", "actor": 1, "seconds": 3.0}),
        ("actor_lost", {"role": "reward", "actor": 0, "cause": "out of memory"}),
    )
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = lines_of(text_of(folder, 30))
    assert "running, attempt 1, process 1, for 30 s" in told[""]
    assert "last commit at step 2" in told["grpo"]
    assert told["now"] == (
        "in stage grpo; last event 30 s ago (actor lost); waiting for rollout actors: groups: 3 of 8 after 30 s"
    )
    assert told["actors"] == (
        "reward lost once, replaced never; rollout lost once, replaced once; last reward 0, 30 s ago: out of memory; "
        "a replacement is starting"
    )


def test_a_driver_that_has_been_quiet_for_long_is_said_to_be(tmp_path):
    folder = make_run(tmp_path / "run", grpo_steps=3, finished=False) or tmp_path / "run"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "quiet for longer than usual" in text_of(folder, 600)
        assert "quiet" not in text_of(folder, 5)


def test_asking_does_not_keep_a_driver_out(tmp_path):
    from pipeline.config import load_config

    config = load_config("tiny", [f"run_dir={tmp_path / 'run'}", "tracking.wandb=disabled"])
    run = Run(config)
    told = lines_of(text_of(tmp_path / "run"))
    run.close()
    assert "running, attempt 1" in told[""]
    assert {told[stage] for stage in ("vae", "sft", "grpo", "evaluate")} == {"not begun"}
    text_of(tmp_path / "run")
    Run(config).close()


def test_what_a_rollback_took_back_is_not_counted(tmp_path):
    folder = make_run(tmp_path / "run", grpo_steps=3, finished=False) or tmp_path / "run"
    write(folder, ("run_started", {"pid": 2}), ("rollback", {"stage": "grpo", "to_step": 2}), attempt=2)
    told = lines_of(text_of(folder))
    assert told["grpo"].startswith("step 2 of 6")
    assert "taken back to a commit once" in told["grpo"]


def test_the_pace_is_that_of_the_last_attempt():
    steps = [{"event": "step", "stage": "sft", "time": t, "attempt": a} for a, t in [(1, 0), (1, 9), (2, 50), (2, 53)]]
    assert seconds_per_step(steps, "sft") == 3
    assert seconds_per_step(steps[:1], "sft") is None
    assert seconds_per_step(steps, "vae") is None


def test_only_the_end_of_the_log_says_what_is_waited_for():
    waiting = "2026-01-01 00:00:00,000 INFO waiting for pictures: 0 of 1 after 30 s\n"
    assert waited_for(waiting) == "pictures: 0 of 1 after 30 s"
    assert waited_for(waiting + "2026-01-01 00:00:01,000 INFO grpo 3/6\n") is None
    assert waited_for("") is None


def test_a_folder_without_events_or_with_damaged_files_has_a_status(tmp_path):
    (tmp_path / "identity.json").write_text("{}")
    assert "nothing has run yet" in text_of(tmp_path)
    (tmp_path / "config.yaml").write_text(": [")
    (tmp_path / "events.jsonl").write_text('{"event": "step"}\n7\n{"torn')
    assert "nothing has run yet" in text_of(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="not a run folder"):
        read_status(tmp_path)
    assert main(["status", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_the_command_prints_the_status(tmp_path, capsys):
    make_run(tmp_path / "run")
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "done in 33 s" in capsys.readouterr().out
