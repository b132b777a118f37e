"""Kills at moments nobody chose. Minutes long, so not part of ``make test``: ``pytest -m soak tests/faults``."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch

from common.events import group_balance, read_events
from tests.integration.test_whole_loop import command, environment, wait_until_gone, weights_of

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("ray"), pytest.mark.timeout(3000)]


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, real_dataset):
    seed = int(os.environ.get("OMNIALPHA_SOAK_SEED", time.time()))
    print(f"OMNIALPHA_SOAK_SEED={seed}")  # noqa: T201
    draw = random.Random(seed)
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    subprocess.run(command(quiet, real_dataset), env=environment(quiet), check=True, capture_output=True, timeout=600)
    with (tmp_path / "log").open("w") as log:
        for kill in range(12):
            driver = subprocess.Popen(
                command(killed, real_dataset), env=environment(killed), stdout=log, stderr=log, start_new_session=True
            )
            limit = draw.uniform(3, 42) if kill < 11 else 600.0
            try:
                assert driver.wait(timeout=limit) == 0, (tmp_path / "log").read_text()[-3000:]
                break
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                driver.wait()
                print(f"killed after {limit:.1f} s")  # noqa: T201
                wait_until_gone(killed)
    for stage in ("vae", "sft", "continued", "grpo"):
        ours, theirs = weights_of(killed, stage), weights_of(quiet, stage)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    balance = group_balance(read_events(killed / "events.jsonl"))
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched")
