"""What a process is doing is seen from outside, or told by itself, or it is said why not."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.processes import Process
from actors.stacks import stacks_of, write_stacks

SLEEPER = """
import sys, time, signal, faulthandler
from common.role_logs import log_to
faulthandler.register(signal.SIGUSR2, file=log_to(__import__("pathlib").Path(sys.argv[1])), all_threads=True)
def waits_for_its_peer():
    print("there", flush=True)
    time.sleep(600)
waits_for_its_peer()
"""


@pytest.fixture
def hung(tmp_path) -> Iterator[tuple[Process, subprocess.Popen, Path]]:
    """A process that waits in a function of a telling name, and its log."""
    own_log = tmp_path / "logs" / "learner-1.log"
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SLEEPER, str(own_log)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(root)})
    assert child.stdout
    assert child.stdout.readline() == "there\n"
    yield Process("node", child.pid, psutil.Process(child.pid).create_time()), child, own_log
    child.kill()
    child.wait()
    child.stdout.close()


def test_the_stacks_of_a_hanging_process_are_written_under_its_name(hung, tmp_path):
    process, _, own_log = hung
    folder = own_log.parent / "stacks"
    folder.mkdir()
    write_stacks({"learner-1": process}, folder)
    text = (folder / "learner-1.txt").read_text()
    assert text.startswith(f"process {process.pid}, ")
    assert "waits_for_its_peer" in text


def test_a_stopped_process_is_seen_through(hung):
    process, child, own_log = hung
    child.send_signal(signal.SIGSTOP)
    text = stacks_of(process, own_log)
    assert text.startswith(f"process {process.pid}, ")
    assert "waits_for_its_peer" in text


def test_without_py_spy_the_process_writes_its_own_stacks(hung, tmp_path, monkeypatch):
    process, _, own_log = hung
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    text = stacks_of(process, own_log)
    assert "no stacks by py-spy: it is not installed here" in text
    assert "waits_for_its_peer" in text


def test_a_process_that_ended_is_called_so_and_another_one_with_its_number_is_left_alone(hung):
    process, child, own_log = hung
    earlier = Process(process.node, process.pid, process.born - 100.0)
    assert stacks_of(earlier, own_log) == f"process {process.pid} has ended\n"
    assert child.poll() is None
    child.kill()
    child.wait()
    assert stacks_of(process, own_log) == f"process {process.pid} has ended\n"
