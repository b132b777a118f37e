"""What sampling ahead of the learner gains, as ratios of wall clock against the same loop without it.

    python -m benchmarks.overlap [--steps 12] [--phase 2.0]

The real loop with real actors (two rollout actors, two reward actors, one learner rank) on a tiny random policy. Each
call that samples, scores or trains is drawn out to a fixed length by waiting, so that phases are of known length
whatever else the machine does; the seconds of real work in them are reported beside it. What follows steady state is
counted: the steps after the first three, from one step's end to the next.

- balanced phases: sequential / pipelined at least 1.85 with lag 1, at least 2.5 with lag 2
- unbalanced phases (rollout : reward : learner as 3 : 1 : 2): at least 90 % of min(lag + 1, sum / longest)
- orchestration: what a step of the sequential loop lasts beyond its phases, at most 20 ms. Publishing weights, a few
  milliseconds for this policy, is part of it.

Exits with 1 where a target is missed.
"""

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray

import actors.learner
import actors.reward
import actors.rollout
from actors.cluster import ClusterConfig, RoleConfig, connected
from actors.learner import LearnerGroup
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from common.events import read_events
from data.build import build_dataset
from data.config import DataConfig
from data.sources import default_cache
from pipeline.config import RunConfig, load_config
from pipeline.grpo import run_grpo
from pipeline.run import Run
from pipeline.stages import rollout_setup
from tests.integration.policies import write_policy

WARM_UP = 3
BALANCED, UNBALANCED = (1.0, 1.0, 1.0), (1.5, 0.5, 1.0)
"""Lengths of rollout, reward and learner phase, relative to ``--phase``."""
TARGETS = {1: 1.85, 2: 2.5}
ORCHESTRATION_S = 0.02
CLUSTER = ClusterConfig(
    cpus=2,
    learner=RoleConfig(cpus=0.4),
    rollout=RoleConfig(actors=2, cpus=0.3),
    reward=RoleConfig(actors=2, cpus=0.3),
    object_store_mib=256,
)


def drawn_out(actor: type, method: str, seconds: float) -> type:
    """A subclass whose ``method`` lasts ``seconds`` by waiting for the rest, and counts its real work in ``work_s``."""

    def lasting(self: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = getattr(actor, method)(self, *arguments)
        work = time.perf_counter() - began
        self.work_s = [*getattr(self, "work_s", []), work]
        time.sleep(max(0.0, seconds - work))
        return result

    return type(actor.__name__, (actor,), {method: lasting})


@contextlib.contextmanager
def phases(rollout_s: float, reward_s: float, learner_s: float) -> Iterator[None]:
    """Actors that are made inside take this long."""
    with (
        mock.patch.object(actors.rollout, "RolloutActor", drawn_out(actors.rollout.RolloutActor, "sample", rollout_s)),
        mock.patch.object(actors.reward, "RewardActor", drawn_out(actors.reward.RewardActor, "score", reward_s)),
        mock.patch.object(actors.learner, "LearnerRank", drawn_out(actors.learner.LearnerRank, "train", learner_s)),
    ):
        yield


@dataclass(frozen=True)
class Measured:
    """Steps of one loop."""

    seconds: list[float]
    """From one step's end to the next."""
    work_s: float
    """Real work of the busiest role per step, median."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)


def measure(home: Path, lengths: tuple[float, float, float], lag: int, steps: int) -> Measured:
    """Runs the loop with phases of these lengths."""
    config = _config(home, lag, steps, f"{lengths}-{lag}")
    run = Run(config)
    with phases(*lengths):
        learner = LearnerGroup(CLUSTER)
        rollouts = RolloutPool(CLUSTER, rollout_setup(run))
        rewards = RewardPool(CLUSTER, config.rewards)
    everyone = [*learner._ranks, *rollouts.crew.actors, *rewards.crew.actors]
    try:
        run_grpo(run, learner, rollouts, rewards)
        work = ray.get([actor.__ray_call__.remote(lambda a: getattr(a, "work_s", [0.0])) for actor in everyone])
    finally:
        run.close()
        for actor in everyone:
            ray.kill(actor)
    ends = [event["time"] for event in read_events(run.folder / "events.jsonl") if event["event"] == "step"]
    gaps = [b - a for a, b in itertools.pairwise(ends)][WARM_UP - 1 :]
    return Measured(gaps, max(statistics.median(seconds) for seconds in work))


def _config(home: Path, lag: int, steps: int, name: str) -> RunConfig:
    folders = [f"run_dir={home / name}", f"dataset={home / 'dataset'}", f"grpo.start={home / 'policy'}"]
    size = [f"grpo.steps={steps}", "grpo.prompts=2", "grpo.group=3", f"grpo.max_staleness={lag}"]
    off = ["grpo.pictures_every=1000", "grpo.commit_every=1000", "grpo.watch.every=0", "tracking.wandb=disabled"]
    return load_config("tiny", [*folders, *size, *off])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--phase", type=float, default=2.0, help="seconds of a balanced phase")
    options = parser.parse_args()
    missed = []
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, phases of {options.phase:g} s")
    with tempfile.TemporaryDirectory(prefix="omnialpha-bench-") as folder, connected(CLUSTER):
        home = Path(folder)
        data = DataConfig(size=32, train_scenes=12, val_scenes=4, test_scenes=6, workers=1)
        build_dataset(data, home / "dataset", default_cache())
        write_policy(home / "policy")
        for name, shape in (("balanced", BALANCED), ("unbalanced", UNBALANCED)):
            lengths = (shape[0] * options.phase, shape[1] * options.phase, shape[2] * options.phase)
            sequential = measure(home, lengths, 0, options.steps)
            beyond = statistics.median(sequential.seconds) - sum(lengths)
            print(
                f"{name}: sequential {sequential.mean:.3f} s a step, {1000 * beyond:.0f} ms of it orchestration; "
                f"real work of the busiest actor {sequential.work_s:.2f} s"
            )
            missed += [f"orchestration {1000 * beyond:.0f} ms"] if beyond > ORCHESTRATION_S else []
            for lag in TARGETS:
                ahead = measure(home, lengths, lag, options.steps)
                ratio, ideal = sequential.mean / ahead.mean, min(lag + 1, sum(lengths) / max(lengths))
                target = TARGETS[lag] if shape == BALANCED else 0.9 * ideal
                reached = f"ideal {ideal:.2f}, target {target:.2f}"
                print(f"{name}, lag {lag}: {ratio:.2f} ({ahead.mean:.3f} s a step), {reached}", flush=True)
                missed += [f"{name} lag {lag}: {ratio:.2f} < {target:.2f}"] if ratio < target else []
    if missed:
        print("missed:", "; ".join(missed))
        sys.exit(1)


if __name__ == "__main__":
    main()
