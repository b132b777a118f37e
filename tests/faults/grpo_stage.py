"""A small GRPO stage on real actors, run as a driver runs it, and disturbed on purpose."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.learner import LearnerGroup
from actors.rollout import RolloutPool
from common.events import read_events
from pipeline.config import RunConfig, load_config
from pipeline.run import Run
from pipeline.stages import Actors, run_stage, surviving
from policy.folder import load_transformer

CLUSTER = (
    "cluster={learner: {actors: 2, cpus: 0.1}, rollout: {actors: 1, cpus: 0.1}, reward: {actors: 1, cpus: 0.1}, "
    "deadline_s: 240, replacements: 1}"
)


def small_stage(policy: Path, dataset: Path) -> Callable[[Path], RunConfig]:
    """Configurations of a stage of four steps, by run folder."""

    def make(folder: Path) -> RunConfig:
        own = [f"run_dir={folder}", f"dataset={dataset}", f"grpo.start={policy}", "tracking.wandb=disabled", CLUSTER]
        size = ["grpo.steps=4", "grpo.prompts=3", "grpo.group=3", "grpo.optimiser.lr=1e-3", "grpo.commit_every=1"]
        return load_config("tiny", [*own, *size])

    return make


def trained(config: RunConfig, disturb: Any = None) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and events of a whole GRPO stage; ``disturb(learner, step)`` may change a step's items."""
    run = Run(config)
    actors = Actors(run)
    train = LearnerGroup.train

    def disturbed(self, step, items, *rest):
        return train(self, step, disturb(self, step, items) if disturb else items, *rest)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LearnerGroup, "train", disturbed)
            surviving(run, actors, partial(run_stage, run, actors, "grpo"))
    finally:
        actors.learner.close()
        actors.close()
        run.close()
        sampling = actors.rollouts.crew.actors if isinstance(actors.rollouts, RolloutPool) else []
        for actor in [*sampling, *actors.rewards.crew.actors]:
            ray.kill(actor)
    weights = load_transformer(run.final("grpo") / "model").state_dict()
    return weights, read_events(config.folder / "events.jsonl")


def steps(events: list[dict]) -> dict[int, dict]:
    """What each step came to in the end."""
    timed = ("time", "attempt", "sample_s", "train_s", "max_seconds", "idle_learner", "idle_rollout")
    return {e["step"]: {k: v for k, v in e.items() if k not in timed} for e in events if e["event"] == "step"}
