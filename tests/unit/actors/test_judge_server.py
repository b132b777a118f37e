"""The supervisor over a program that listens where vLLM would; tests/integration/test_judge_serving.py has vLLM."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from actors import judge_guard
from actors.judge_server import GuardedProcess, JudgeServer, JudgeServerConfig, Launch, vllm_launch
from common.errors import ActorError, ConfigError, DeadlineError
from rewards.judge.exchange import Unavailable, exchange
from tests import openai_server

CONFIG = JudgeServerConfig(model="m", start_deadline_s=60.0)
KEY = "key-that-nobody-may-read"


def listening(config, name, port, key):
    return Launch((sys.executable, "-u", openai_server.__file__, str(port), name, key), dict(os.environ))


def shell(script):
    return lambda *_: Launch(("/bin/sh", "-c", script), dict(os.environ))


@pytest.fixture
def start(tmp_path):
    """Starts servers that are ended with the test, and sees that nothing of them is left."""
    started, before = [], set(family(tmp_path))

    def begin(config=CONFIG, launch=listening, name="judge"):
        started.append(JudgeServer(config, name, KEY, tmp_path / f"server-{len(started)}.log", launch=launch))
        return started[-1]

    yield begin
    for server in started:
        server.stop()
    until(lambda: set(family(tmp_path)) == before, 10.0)


def family(folder: Path) -> list[int]:
    """Processes of the guards whose log lies in a folder, and of what they guard."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(part.startswith(str(folder)) for part in process.info["cmdline"] or ()):
            found += [process.pid, *(child.pid for child in children(process))]
    return found


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def until(condition, seconds=60.0):
    """What the condition gives as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def server_pids(server):
    """The program and the child that it has, without their guard."""
    port = server.endpoint().url.rpartition(":")[2]
    commands = {p.pid: p.info["cmdline"] or () for p in psutil.process_iter(["cmdline"])}
    return [
        pid for pid, command in commands.items() if {port, KEY} <= set(command) and judge_guard.__file__ not in command
    ]


def gone(pids):
    return lambda: not any(psutil.pid_exists(pid) and not zombie(pid) for pid in pids)


def zombie(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_server_is_ready_when_it_serves_this_runs_model_and_nothing_is_left_after_stop(start):
    server = start()
    assert server.endpoint() is None
    server.wait_ready()
    endpoint = server.endpoint()
    assert b"judge" in exchange(endpoint, "/v1/models", None, 10.0)
    pids = server_pids(server)
    assert len(pids) == 2
    server.stop()
    assert gone(pids)()
    with pytest.raises(Unavailable):
        exchange(endpoint, "/v1/models", None, 10.0)


def test_a_server_that_is_killed_is_started_again(start):
    server = start()
    server.wait_ready()
    for killed in (1, 2, 3):
        pids = until(lambda: server.endpoint() and server_pids(server))
        os.kill(min(pids), signal.SIGKILL)
        until(lambda killed=killed: server.restarts == killed)
        until(gone(pids))
    until(server.endpoint)


def test_a_server_that_keeps_ending_is_given_up_with_its_last_lines(start):
    server = start(CONFIG.model_copy(update={"restarts": 1}))
    server.wait_ready()
    for _ in range(2):
        os.kill(min(until(lambda: server.endpoint() and server_pids(server))), signal.SIGKILL)
        until(lambda: server._failure or not server.endpoint())
    until(lambda: server._failure)
    with pytest.raises(ActorError, match=r"killed by signal 9, as it did 2 times in a row.*\n.*starting \d+ judge"):
        server.endpoint()


def test_a_server_that_ends_before_it_is_ready_is_not_tried_again_and_its_last_lines_say_why(start):
    server = start(launch=shell(f"seq 100; echo no such model, {KEY} >&2; exit 3"))
    with pytest.raises(DeadlineError, match=r"exit code 3 before it was ready") as failure:
        server.wait_ready()
    assert "no such model, ***" in str(failure.value)
    assert str(failure.value).count("\n") == 15
    assert server.restarts == 0


def test_a_server_that_never_becomes_ready_is_ended_at_its_deadline(start):
    server = start(CONFIG.model_copy(update={"start_deadline_s": 1.0}), shell("echo loading; exec sleep 1000"))
    with pytest.raises(DeadlineError, match=r"not ready after 1 s \(start_deadline_s\)[^\n]*\n  loading"):
        server.wait_ready()


def test_a_command_that_does_not_exist_is_one_message(start):
    with pytest.raises(ActorError, match=r"/no/such/program cannot be started"):
        start(launch=lambda *_: Launch(("/no/such/program",), {})).wait_ready()


def test_without_the_judges_environment_the_message_says_how_to_make_it(start):
    with pytest.raises(ConfigError, match=r"no interpreter /no/python; make it with `make judge-env`"):
        start(CONFIG.model_copy(update={"python": Path("/no/python")}), vllm_launch).wait_ready()


def test_a_port_that_another_program_has_is_refused_by_number(start, monkeypatch):
    monkeypatch.setattr("actors.judge_server.FREED_S", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127.0.0.1 is taken"):
            start(CONFIG.model_copy(update={"port": port})).wait_ready()


def test_of_two_runs_on_one_port_one_serves_and_the_other_is_refused(start, monkeypatch):
    monkeypatch.setattr("actors.judge_server.FREED_S", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config = CONFIG.model_copy(update={"port": free.getsockname()[1]})
    first = start(config)
    first.wait_ready()
    with pytest.raises(ConfigError, match="is taken"):
        start(config, name="other").wait_ready()
    assert first.endpoint()


def test_another_runs_server_on_the_port_does_not_pass_for_this_ones(start, monkeypatch):
    monkeypatch.setattr("actors.judge_server._free", lambda host, port: True)  # it comes just after the look
    with openai_server.serving(model="other") as other:
        config = CONFIG.model_copy(update={"start_deadline_s": 2.0, "port": other.server_address[1]})
        with pytest.raises(DeadlineError, match="not ready"):
            start(config, shell("exec sleep 1000")).wait_ready()


STARTER = """
import sys, time
from pathlib import Path
from actors.judge_server import GuardedProcess, Launch
import os
process = GuardedProcess(Launch((sys.executable, sys.argv[1], "0", "m", "k"), dict(os.environ)), Path(sys.argv[2]))
print(process.pid, flush=True)
time.sleep(1000)
"""


def starter(tmp_path):
    """A process that starts a guarded server, and the pids of the server and its child."""
    command = [sys.executable, "-c", STARTER, openai_server.__file__, str(tmp_path / "log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(openai_server.__file__).parents[1])
    assert process.stdout
    pid = int(process.stdout.readline())
    child = until(lambda: children(psutil.Process(pid)))
    return process, [pid, *(c.pid for c in child)]


def test_a_server_ends_with_the_process_that_started_it_even_if_that_is_killed(tmp_path):
    process, pids = starter(tmp_path)
    process.kill()
    process.communicate()
    until(gone(pids))


def test_a_guard_that_is_killed_takes_its_server_along(tmp_path):
    launch = Launch((sys.executable, openai_server.__file__, "0", "m", "k"), dict(os.environ))
    process = GuardedProcess(launch, tmp_path / "log")
    pids = [process.pid, *(c.pid for c in until(lambda: children(psutil.Process(process.pid))))]
    os.kill(psutil.Process(process.pid).ppid(), signal.SIGKILL)
    assert until(lambda: process.ended(0.1)) == "its guard was killed"
    process.stop()
    until(gone(pids))


def test_the_key_is_not_on_the_command_line_and_settings_of_ours_do_not_reach_the_server(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = JudgeServerConfig(model=str(tmp_path), python=Path(sys.executable), arguments=("--max-model-len", "512"))
    launch = vllm_launch(config, "name", 1234, KEY)
    assert KEY not in " ".join(launch.command)
    assert launch.environment["VLLM_API_KEY"] == KEY
    assert not {"PYTHONPATH", "RAY_ADDRESS"} & set(launch.environment)
    assert launch.command[-2:] == ("--max-model-len", "512")
    assert {"--enforce-eager", "float32"} <= set(launch.command)
    on_gpus = vllm_launch(config.model_copy(update={"gpus": True, "tensor_parallel": 4}), "name", 1234, KEY)
    assert "--enforce-eager" not in on_gpus.command
    assert on_gpus.command[on_gpus.command.index("--tensor-parallel-size") + 1] == "4"
