"""Kills at moments nobody chose. Minutes long, so not part of ``make test``: ``pytest -m soak tests/faults``."""

import contextlib
import math
import os
import random
import signal
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TextIO

import psutil
import pytest
import torch

from common.events import group_balance, read_events
from tests.integration.policies import write_policy
from tests.integration.test_whole_loop import command, environment, processes_of, wait_until_gone, weights_of

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


def test_a_hundred_steps_under_random_kills_of_every_role_come_to_what_undisturbed_ones_do(tmp_path, real_dataset):
    """Every few seconds an actor of a random role is killed, now and then the driver; steps have so many samples that
    dozens of kills fall among them."""
    seed = int(os.environ.get("OMNIALPHA_SOAK_SEED", time.time()))
    print(f"OMNIALPHA_SOAK_SEED={seed}")  # noqa: T201
    draw, policy = random.Random(seed), write_policy(tmp_path / "policy")
    size = ["grpo.steps=100", "grpo.commit_every=4", "grpo.max_staleness=1", "grpo.objective.clip_range=0.01"]
    size += ["grpo.optimiser.lr=1e-4", "grpo.pictures_every=50", "grpo.watch.every=0", "cluster.replacements=6"]
    size += ["grpo.prompts=12", "grpo.group=4", "grpo.sampling.schedule.steps=12", "grpo.sampling.window.size=4"]
    size += ["cluster.rollout.actors=2", "cluster.rollout.spares=1", "cluster.learner.actors=2", "cluster.cpus=4"]
    size += ["cluster.rollout.cpus=0.2", "cluster.learner.cpus=0.2", "cluster.reward.cpus=0.2"]

    def start(run: Path, log: TextIO) -> subprocess.Popen:
        typed = [*command(run, real_dataset, "grpo"), *size, f"grpo.start={policy}", "tracking.wandb=disabled"]
        return subprocess.Popen(typed, env=environment(run), stdout=log, stderr=log, start_new_session=True)

    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    shared = set(os.listdir("/dev/shm"))
    kills: Counter[str] = Counter()
    with (tmp_path / "log").open("w") as log:
        assert start(quiet, log).wait(timeout=900) == 0, (tmp_path / "log").read_text()[-3000:]
        driver, drivers = start(killed, log), 3
        while driver.poll() is None or driver.returncode == -signal.SIGKILL:
            if driver.returncode is not None:
                wait_until_gone(killed)
                driver = start(killed, log)
            time.sleep(draw.uniform(3, 12))
            actors = defaultdict(list)
            for process in processes_of(killed):
                if name := role_of(process):
                    actors[name].append(process)
            if drivers and actors and draw.random() < 0.05:
                drivers -= 1
                kills["driver"] += 1
                driver.kill()
                driver.wait()
            elif actors:
                name = draw.choice(sorted(actors))
                with contextlib.suppress(psutil.NoSuchProcess):
                    draw.choice(actors[name]).kill()
                    kills[name] += 1
    print(f"killed: {dict(kills)}")  # noqa: T201
    assert driver.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert min(kills[role] for role in ("RolloutActor", "RewardActor", "LearnerRank")) >= 3
    assert kills.total() >= 24
    wait_until_gone(killed)
    assert set(os.listdir("/dev/shm")) <= shared
    events, calm = (read_events(run / "events.jsonl") for run in (killed, quiet))
    balance = group_balance(events)
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched")
    ours, theirs = ({e["step"]: e for e in log if e["event"] == "step"} for log in (events, calm))
    assert sorted(ours) == sorted(theirs) == list(range(1, 101))
    for step in ours:
        assert math.isfinite(ours[step]["loss"])
        assert all(ours[step][key] == pytest.approx(theirs[step][key], abs=1e-6) for key in ("loss", "reward", "ratio"))
    after, expected = weights_of(killed, "grpo"), weights_of(quiet, "grpo")
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-6)


def role_of(process: psutil.Process) -> str:
    """Class of the Ray actor that a process is, empty for others."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        title = " ".join(process.cmdline())
        return next((name for name in ("RolloutActor", "RewardActor", "LearnerRank") if f"ray::{name}" in title), "")
    return ""
