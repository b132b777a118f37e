"""A run that was stopped goes on with more or fewer learner ranks and rollout actors."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.learner import LearnerGroup
from common.errors import Interrupted
from common.events import group_balance, read_events
from pipeline.config import RunConfig, load_config
from pipeline.run import Run
from pipeline.stages import Actors, run_stage, surviving
from policy.folder import load_transformer
from tests.integration.policies import write_policy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster"),
]

STEPS, PROMPTS = 4, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory, real_dataset) -> Any:
    policy = write_policy(tmp_path_factory.mktemp("policy"))

    def make(folder: Path, ranks: int, rollouts: int, lag: int) -> RunConfig:
        cluster = (
            f"cluster={{learner: {{actors: {ranks}, cpus: 0.1}}, rollout: {{actors: {rollouts}, cpus: 0.1}}, "
            "reward: {actors: 1, cpus: 0.1}, deadline_s: 240}"
        )
        own = [f"run_dir={folder}", f"dataset={real_dataset}", f"grpo.start={policy}", "tracking.wandb=disabled"]
        size = [f"grpo.steps={STEPS}", f"grpo.prompts={PROMPTS}", "grpo.group=3", "grpo.optimiser.lr=1e-3"]
        # No step is committed because it is due: what is kept is kept because the run was asked to stop.
        return load_config(
            "tiny", [*own, *size, cluster, f"grpo.max_staleness={lag}", "grpo.commit_every=100", "stop_grace_s=240"]
        )

    return make


def train(config: RunConfig, stop_in: int | None = None) -> None:
    """A whole GRPO stage, or one that gets SIGTERM while it trains step ``stop_in`` (from 0)."""
    run, trained = Run(config), LearnerGroup.train

    def training(self: LearnerGroup, step: int, *rest: Any) -> dict[str, float]:
        if step == stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return trained(self, step, *rest)

    with pytest.MonkeyPatch.context() as patch, run.signals():
        patch.setattr(LearnerGroup, "train", training)
        actors = Actors(run)
        try:
            surviving(run, actors, partial(run_stage, run, actors, "grpo"))
        finally:
            actors.learner.close()
            actors.close()
            run.close()
            for actor in [*actors.rollouts.crew.actors, *actors.rewards.crew.actors]:
                ray.kill(actor)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Any:
    """Weights and step events of a run that nobody stopped, by lag."""
    made: dict[int, tuple[dict[str, torch.Tensor], list[dict]]] = {}

    def get(lag: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
        if lag not in made:
            folder = tmp_path_factory.mktemp("runs") / "quiet"
            train(config(folder, 1, 1, lag))
            made[lag] = outcome(folder)
        return made[lag]

    return get


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    weights = load_transformer(folder / "grpo" / "final" / "model").state_dict()
    return weights, [e for e in read_events(folder / "events.jsonl") if e["event"] == "step"]


@pytest.mark.parametrize(
    ("before", "after", "lag"),
    [((2, 1), (1, 3), 0), ((1, 3), (2, 1), 1)],
    ids=["fewer ranks and more rollout actors", "more ranks and fewer rollout actors, one step of lag"],
)
def test_a_run_stopped_and_resumed_in_another_size_takes_every_step_once_and_comes_to_the_same(
    config, undisturbed, tmp_path, before, after, lag
):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match=r"stopped in stage 'grpo' after step 2; .* goes on from step 2"):
        train(config(folder, *before, lag), stop_in=1)
    stopped = group_balance(read_events(folder / "events.jsonl"))
    in_flight = stopped.get("in_flight", 0)
    assert stopped["launched"] == stopped["trained"] + in_flight
    assert stopped["trained"] == 2 * PROMPTS
    assert bool(in_flight) == bool(lag)
    train(config(folder, *after, lag))
    weights, steps = outcome(folder)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["attempt"] for step in steps] == [1, 1, 2, 2]
    balance = group_balance(read_events(folder / "events.jsonl"))
    assert balance["trained"] == STEPS * PROMPTS
    # What was in flight when the run stopped is sampled again: launched twice, trained once.
    assert balance["launched"] == balance["trained"] + in_flight
    assert balance.get("dropped:rolled back", 0) == in_flight
    quiet, calm = undisturbed(lag)
    # Another number of ranks adds the same terms in another order, and Adam takes them by their signs.
    assert [s["reward"] for s in steps] == pytest.approx([s["reward"] for s in calm], abs=1e-4)
    worst = max(float((weights[name] - quiet[name]).abs().max()) for name in quiet)
    assert worst < 1e-4, worst
