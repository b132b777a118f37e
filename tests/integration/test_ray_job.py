"""The same run submitted as a Ray job to a cluster that somebody else started, from an empty directory."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.commit import verify
from common.events import read_events
from tests.integration.test_whole_loop import OMNIALPHA, environment, processes_of, wait_until

pytestmark = pytest.mark.xdist_group("ray")

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path_factory) -> Iterator[tuple[dict[str, str], str]]:
    """A Ray head node of the test's own, on loopback, with its own temporary folder and token."""
    # Ray's socket paths must stay below 108 bytes, so not under pytest's long folder names.
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/oa-XXXXXX"], text=True).strip())
    port, dashboard = free_port(), free_port()
    env = environment(folder) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    start = [
        *(RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"),
        # Every fixed default port is replaced: another Ray on this machine (the tests' own) may hold it.
        *(f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-port={dashboard}"),
        *("--dashboard-host=127.0.0.1", f"--temp-dir={folder}"),
        *("--object-store-memory=200000000", "--disable-usage-stats", "--block"),
    ]
    process = subprocess.Popen(start, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"

    def ready() -> bool:
        # The job agent starts after everything else; until then submissions are refused.
        probe = [RAY, "job", "submit", "--no-wait", "--address", address, "--", "true"]
        try:
            return subprocess.run(probe, env=env, capture_output=True, timeout=120).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    try:
        wait_until(ready, 240, "the start of the Ray head")
        yield env, address
    finally:
        process.terminate()
        process.wait(timeout=30)
        for left in processes_of(folder):
            left.kill()
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def test_a_run_submitted_as_a_ray_job_finishes(head, tmp_path, real_dataset):
    env, address = head
    empty = tmp_path / "empty"
    empty.mkdir()
    run = tmp_path / "run"
    submitted = subprocess.run(
        [
            *(RAY, "job", "submit", "--address", address, "--"),
            *(OMNIALPHA, "run", "tiny", f"run_dir={run}", f"dataset={real_dataset}", "vae.steps=2", "sft.steps=2"),
        ],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-2000:]
    assert "| all RL tasks | reward |" in submitted.stdout
    verify(run / "evaluate" / "final")
    assert any(event["event"] == "evaluated" for event in read_events(run / "events.jsonl"))
    assert not list(empty.iterdir())
