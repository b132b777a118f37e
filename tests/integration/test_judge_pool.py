"""What Ray does for the judge, over a program that listens where vLLM would; test_judge_serving.py has vLLM."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from PIL import Image

from actors.judge import JudgePool, JudgeServing
from actors.judge_server import JudgeServerConfig
from rewards.judge.client import JudgeClientConfig
from tests import openai_server

LABELS = ("0", "1")
PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture
def pool(ray_cluster, tmp_path):
    """Two replicas, and the folder whose name is on the command line of everything that belongs to them."""
    # Called as vLLM's interpreter is: -m MODULE --model M --served-model-name NAME --host H --port PORT ...
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} {openai_server.__file__} "${{10}}" "$6" "$VLLM_API_KEY" {tmp_path}\n'
    )
    python.chmod(0o755)
    server = JudgeServerConfig(model="m", python=python, replicas=2, cpus=0.1, start_deadline_s=120.0)
    pool = JudgePool(
        JudgeServing(server=server, client=JudgeClientConfig(patience_s=120.0, cache=0)), tmp_path / "logs"
    )
    yield pool, tmp_path
    pool.close()
    assert until(lambda: not processes(tmp_path))


def processes(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or ())]


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return value


def test_a_client_in_another_process_gets_answers_whatever_is_killed_and_nothing_is_left_behind(pool):
    judge, folder = pool
    assert len(processes(folder)) == 4  # each replica has a child of its own

    @ray.remote(num_cpus=0.1)
    def ask(client):
        return [client.ask(f"number {k}", [PICTURE], LABELS)["1"] for k in range(4)]

    client = judge.asker()
    assert ray.get(ask.remote(client)) == pytest.approx([0.7] * 4)
    assert judge.metrics() == {"restarts": 0.0, "running": 6.0}

    for process in processes(folder):
        os.kill(process.pid, signal.SIGKILL)
    assert ray.get(ask.remote(client)) == pytest.approx([0.7] * 4)
    until(lambda: judge.metrics().get("restarts") == 2.0)

    before = processes(folder)
    for actor in judge._actors:
        ray.kill(actor, no_restart=False)
    assert ray.get(ask.remote(client)) == pytest.approx([0.7] * 4)
    until(lambda: not any(process.is_running() for process in before))
