"""Every call of an actor leaves a line in its log; the earliest exception of all logs can be found."""

import subprocess
import sys
import time
from pathlib import Path

from common.role_logs import Line, first_failure, read_lines

ROOT = Path(__file__).resolve().parents[3]
# In a process of its own, as an actor is: it changes the whole process's logging.
ACTOR = """
import logging, sys, time
from pathlib import Path
from common.role_logs import log_to, recorded

@recorded
class Actor:
    def work(self, seconds):
        time.sleep(seconds)
        logging.getLogger("omnialpha").info("half way")
        return seconds
    def fail(self):
        raise ValueError("the first line\\nthe second")
    def around(self):
        self.work(seconds=0)
    def _inner(self):
        pass

log_to(Path(sys.argv[1]))
actor = Actor()
assert actor.work(seconds=0.05) == 0.05
actor._inner()
try:
    actor.fail()
except ValueError:
    logging.getLogger("somewhere.else").warning("caught")
actor.around()
"""


def written_by_an_actor(path: Path) -> list[Line]:
    subprocess.run([sys.executable, "-c", ACTOR, str(path)], check=True, env={"PYTHONPATH": str(ROOT)}, cwd="/")
    return list(read_lines(path))


def test_calls_their_seconds_exceptions_and_other_messages_are_in_the_log_in_utc(tmp_path):
    before = time.time() - 0.001
    lines = written_by_an_actor(tmp_path / "logs" / "reward-0.log")
    texts = [(line.level, line.text.partition(" took ")[0]) for line in lines]
    assert texts == [
        ("INFO", "half way"),
        ("INFO", "work"),
        ("ERROR", "fail raised ValueError: the first line"),
        ("WARNING", "caught"),
        ("INFO", "half way"),
        ("INFO", "around"),  # what it called is part of it
    ]
    assert all(before <= line.time <= time.time() for line in lines)
    assert lines[1].call is not None
    name, seconds = lines[1].call
    assert name == "work"
    assert 0.05 <= seconds < 10
    assert "Traceback" in (tmp_path / "logs" / "reward-0.log").read_text()


def test_the_first_failure_is_the_earliest_of_all_roles_after_a_moment(tmp_path):
    def log(name: str, *lines: str) -> None:
        (tmp_path / f"{name}.log").write_text("".join(f"2026-01-01T00:00:{line}\n" for line in lines))

    log("learner-0", "03.000Z INFO train took 1.000 s", "07.000Z ERROR train raised RuntimeError: peer is gone")
    log("reward-1", "01.000Z ERROR score raised KeyError: recovered", "06.999Z ERROR score raised KeyError: 'x'")
    log("rollout-0", "09.000Z ERROR sample raised ValueError: late", "garbage that is no line")
    began = next(read_lines(tmp_path / "learner-0.log")).time
    failure = first_failure(tmp_path, began)
    assert failure is not None
    assert failure.log.stem == "reward-1"
    assert failure.message == "'x'"
    assert str(failure).startswith("the first failure was in reward-1 at 00:00:06 UTC: score raised KeyError: 'x' (")
    assert first_failure(tmp_path, began + 60) is None
    assert first_failure(tmp_path / "nothing here", 0.0) is None
