"""What a GRPO step costs, as ratios against a baseline in the same run.

    python -m benchmarks.grpo_step runs/demo [--steps 6]

- ``pipeline / reference``: a step of the real loop (one rollout actor, one learner rank, one reward actor, as many
  threads each as there are cores) against the Ray-free reference loop of the tests on the same groups (one process with
  as many threads), both in float32.
- ``one by one / batched``: eight members sampled singly against one batch of eight.
- ``window of 9 / window of 4``: the optimiser's share of a step with every eligible step trained against four.

Medians over the steps after the first, one measurement after the other, to be run on an otherwise idle machine. A step
of the pipeline is sampling, scoring, training and publishing; the reference loop's is all it does. Singly sampled
members encode their condition again. Exits with 1 where the pipeline takes more than 1.05 times the reference, or
batching gains less than 1.5 times.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from actors.cluster import connected
from actors.rollout import RolloutActor, RolloutSetup
from common.events import read_events
from pipeline.config import RunConfig, load_config
from pipeline.run import Run
from pipeline.stages import Actors, run_grpo
from policy.group import GroupRequest
from policy.rl import Start
from policy.weights import pack
from tests.integration.reference_loop import reference_loop

ROLES = ("learner", "rollout", "reward")


def _config(demo: Path, folder: Path, *overrides: str) -> RunConfig:
    policy = demo / "sft" / "final" / "model"
    base = [f"run_dir={folder}", f"dataset={demo / 'dataset'}", f"grpo.start={policy}", "tracking.wandb=disabled"]
    off = ["grpo.pictures_every=1000", "grpo.commit_every=1000", "grpo.watch.every=0"]
    alone = [f"cluster.{role}.{key}" for role in ROLES for key in ("actors=1", f"threads={os.cpu_count() or 1}")]
    return load_config("demo", [*base, *off, *alone, "grpo.precision=float32", *overrides])


def _pipeline(config: RunConfig) -> tuple[list[float], list[float]]:
    """Seconds of each step: (all of it, the learner's part)."""
    run = Run(config)
    try:
        with connected(config.cluster):
            actors = Actors(run)
            run_grpo(run, actors.learner, actors.rollouts, actors.rewards)
        steps = [event for event in read_events(run.folder / "events.jsonl") if event["event"] == "step"]
    finally:
        run.close()
    return [s["sample_s"] + s["train_s"] for s in steps], [s["train_s"] for s in steps]


def _rollouts(demo: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds for eight members: (one by one, in one batch)."""
    config = _config(demo, Path("unused"))
    grpo = config.grpo
    assert grpo.start is not None
    torch.set_num_threads(1)
    setup = RolloutSetup(Start(grpo.start), config.dataset_folder, config.seed, grpo.sampling, grpo.kernel)
    actor = RolloutActor(setup, threads=1)
    actor.load(0, *pack(actor._model.state_dict()))
    single, batched = [], []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        for member in range(8):
            actor.sample(GroupRequest(1, 8 * repeat + member, repeat, 1))
        middle = time.perf_counter()
        actor.sample(GroupRequest(1, 8 * repeat, repeat, 8))
        single.append(middle - began)
        batched.append(time.perf_counter() - middle)
    return single[1:], batched[1:]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo run")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    demo, steps = options.demo.resolve(), f"grpo.steps={options.steps}"
    with tempfile.TemporaryDirectory(prefix="omnialpha-bench-") as folder:
        home = Path(folder)
        real, learner_4 = _pipeline(_config(demo, home / "window-4", steps))
        every = ("grpo.sampling.window.size=9", "grpo.sampling.window.movement=fixed")
        _, learner_9 = _pipeline(_config(demo, home / "window-9", steps, *every))
        torch.set_num_threads(os.cpu_count() or 1)
        reference = reference_loop(_config(demo, home / "reference", steps)).seconds
        single, batched = _rollouts(demo, options.steps)
    middle = {
        name: statistics.median(values)
        for name, values in {
            "pipeline": real[1:], "reference": reference[1:], "one by one": single, "batched": batched,
            "window of 9": learner_9[1:], "window of 4": learner_4[1:],
        }.items()
    }  # fmt: skip
    pairs = (("pipeline", "reference"), ("one by one", "batched"), ("window of 9", "window of 4"))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    for a, b in pairs:
        print(f"{a} / {b}: {middle[a] / middle[b]:.2f}  ({middle[a]:.2f} s / {middle[b]:.2f} s)")
    print(json.dumps(middle))
    if middle["pipeline"] > 1.05 * middle["reference"] or middle["one by one"] < 1.5 * middle["batched"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
