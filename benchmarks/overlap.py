"""What sampling ahead of the learner gains, as ratios of wall clock against the same loop without it.

    python -m benchmarks.overlap [--steps 12] [--phase 2.0]

The real loop with real actors (two rollout actors, two reward actors, one learner rank) on a tiny random policy. Each
call that samples, scores or trains is drawn out to a fixed length by waiting, so that phases are of known length
whatever else the machine does; the seconds of real work in them are reported beside it. What follows steady state is
counted: the steps after the first three, from one step's end to the next.

- balanced phases: sequential / pipelined at least 1.85 with lag 1, at least 2.5 with lag 2
- judging: with lag 2 a step whose reward actors wait for a judge as long as the others work lasts at most 1.15 times a
  step whose reward actors do not wait
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray

import actors.reward
import actors.rollout
from actors.cluster import ClusterConfig, RoleConfig, connected
from actors.learner import LearnerGroup, LearnerRank
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
JUDGED = 1.15
ORCHESTRATION_S = 0.02
CLUSTER = ClusterConfig(
    cpus=2,
    learner=RoleConfig(cpus=0.4),
    rollout=RoleConfig(actors=2, cpus=0.3),
    reward=RoleConfig(actors=2, cpus=0.3),
    object_store_mib=256,
)


def drawn_out(actor: type, method: str) -> type:
    """A subclass whose ``method`` lasts ``phase_s`` by waiting for the rest, and keeps its real work in ``work_s``."""

    def lasting(self: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = getattr(actor, method)(self, *arguments)
        work = time.perf_counter() - began
        self.work_s.append(work)
        time.sleep(max(0.0, self.phase_s - work))
        return result

    return type(actor.__name__, (actor,), {method: lasting, "phase_s": 0.0, "work_s": []})


@dataclass(frozen=True)
class Measured:
    """Steps of one loop."""

    seconds: list[float]
    """From one step's end to the next."""
    work_s: float
    """Real work of the busiest actor in a call, median."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)


class Bench:
    """Actors that are started once and serve every loop."""

    def __init__(self, home: Path, steps: int) -> None:
        self._home, self._steps, self._loops = home, steps, 0
        with (
            mock.patch.object(actors.rollout, "RolloutActor", drawn_out(actors.rollout.RolloutActor, "sample")),
            mock.patch.object(actors.reward, "RewardActor", drawn_out(actors.reward.RewardActor, "score")),
            mock.patch.object(LearnerGroup, "kind", drawn_out(LearnerRank, "train")),
            contextlib.closing(Run(self._config(0, "setup"))) as run,
        ):
            self._learner = LearnerGroup(CLUSTER)
            self._rollouts = RolloutPool(CLUSTER, rollout_setup(run))
            self._rewards = RewardPool(CLUSTER, run.config.rewards)

    def measure(self, lengths: Sequence[float], lag: int) -> Measured:
        """Runs the loop with phases of these lengths."""
        self._loops += 1
        roles = (self._rollouts.crew.actors, self._rewards.crew.actors, self._learner._ranks)
        everyone = [(actor, length) for role, length in zip(roles, lengths, strict=True) for actor in role]
        ray.get([actor.__ray_call__.remote(_begin, length) for actor, length in everyone])
        with contextlib.closing(Run(self._config(lag, f"loop-{self._loops}"))) as run:
            run_grpo(run, self._learner, self._rollouts, self._rewards)
            events = read_events(run.folder / "events.jsonl")
        work = ray.get([actor.__ray_call__.remote(lambda a: a.work_s) for actor, _ in everyone])
        ends = [event["time"] for event in events if event["event"] == "step"]
        gaps = [b - a for a, b in itertools.pairwise(ends)][WARM_UP - 1 :]
        return Measured(gaps, max(statistics.median(seconds) for seconds in work))

    def _config(self, lag: int, name: str) -> RunConfig:
        home = self._home
        folders = [f"run_dir={home / name}", f"dataset={home / 'dataset'}", f"grpo.start={home / 'policy'}"]
        size = [f"grpo.steps={self._steps}", "grpo.prompts=2", "grpo.group=3", f"grpo.max_staleness={lag}"]
        off = ["grpo.pictures_every=1000", "grpo.commit_every=1000", "grpo.watch.every=0", "tracking.wandb=disabled"]
        return load_config("tiny", [*folders, *size, *off])


def _begin(actor: Any, seconds: float) -> None:
    actor.phase_s, actor.work_s = seconds, []


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
        bench = Bench(home, options.steps)
        for name, shape in (("balanced", BALANCED), ("unbalanced", UNBALANCED)):
            lengths = [length * options.phase for length in shape]
            sequential = bench.measure(lengths, 0)
            beyond = statistics.median(sequential.seconds) - sum(lengths)
            print(
                f"{name}: sequential {sequential.mean:.3f} s a step, {1000 * beyond:.0f} ms of it orchestration; "
                f"real work of the busiest actor {sequential.work_s:.2f} s",
                flush=True,
            )
            missed += [f"orchestration {1000 * beyond:.0f} ms"] if beyond > ORCHESTRATION_S else []
            for lag in TARGETS:
                ahead = bench.measure(lengths, lag)
                ratio, ideal = sequential.mean / ahead.mean, min(lag + 1, sum(lengths) / max(lengths))
                target = TARGETS[lag] if shape == BALANCED else 0.9 * ideal
                reached = f"ideal {ideal:.2f}, target {target:.2f}"
                print(f"{name}, lag {lag}: {ratio:.2f} ({ahead.mean:.3f} s a step), {reached}", flush=True)
                missed += [f"{name} lag {lag}: {ratio:.2f} < {target:.2f}"] if ratio < target else []
                if shape == BALANCED and lag == 2:
                    unjudged = bench.measure([lengths[0], 0.0, lengths[2]], lag)
                    ratio = ahead.mean / unjudged.mean
                    print(f"judging, lag 2: {ratio:.2f} ({unjudged.mean:.3f} s without), target {JUDGED}", flush=True)
                    missed += [f"judging {ratio:.2f} > {JUDGED}"] if ratio > JUDGED else []
    if missed:
        print("missed:", "; ".join(missed))
        sys.exit(1)


if __name__ == "__main__":
    main()
