"""Sampling ahead of the learner: which version samples which step, and that neither a stop, a crash nor a lost actor
changes anything but time."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.cluster import ClusterConfig, RoleConfig
from actors.learner import LearnerGroup
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from common.errors import Interrupted, LearnerError
from common.events import group_balance, in_flight, read_events
from pipeline.config import RunConfig, load_config
from pipeline.grpo import run_grpo
from pipeline.run import Run
from pipeline.stages import rollout_setup
from policy.folder import load_transformer
from tests.integration.policies import write_policy

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900), pytest.mark.usefixtures("ray_cluster")]

STEPS, PROMPTS = 6, 2
CLUSTER = ClusterConfig(
    learner=RoleConfig(cpus=0.1), rollout=RoleConfig(actors=2, cpus=0.1), reward=RoleConfig(cpus=0.1), deadline_s=240
)


@pytest.fixture(scope="module")
def make(tmp_path_factory, real_dataset) -> Callable[..., RunConfig]:
    policy = write_policy(tmp_path_factory.mktemp("policy"))

    def config(folder: Path, lag: int, *more: str) -> RunConfig:
        own = [f"run_dir={folder}", f"dataset={real_dataset}", f"grpo.start={policy}", "tracking.wandb=disabled"]
        size = [f"grpo.steps={STEPS}", f"grpo.prompts={PROMPTS}", "grpo.group=3", "grpo.optimiser.lr=1e-3"]
        ahead = [f"grpo.max_staleness={lag}", "grpo.objective.clip_range=0.01", "grpo.commit_every=1"]
        return load_config("tiny", [*own, *size, *ahead, "grpo.watch.every=0", "grpo.pictures_every=100", *more])

    return config


class Actors:
    """The actors of one stage, kept for several attempts at it as a driver keeps them."""

    def __init__(self) -> None:
        self.learner = LearnerGroup(CLUSTER)
        self.rollouts: dict[str, RolloutPool] = {}
        self.rewards: RewardPool | None = None

    def train(self, config: RunConfig, after_step: Callable[[int, Run], None] | None = None) -> None:
        """One attempt at the stage; ``after_step`` hears the number of each step when its update is done."""
        run = Run(config)
        setup = rollout_setup(run)
        pool = self.rollouts.get(str(setup)) or RolloutPool(CLUSTER, setup, run.events.write)
        self.rollouts[str(setup)] = pool
        self.rewards = self.rewards or RewardPool(CLUSTER, config.rewards)
        record = run.record

        def heard(stage: str, step: int, *rest: Any) -> None:
            record(stage, step, *rest)
            if after_step:
                after_step(step, run)

        run.record = heard  # type: ignore[method-assign]
        pool.crew._notify = run.events.write
        try:
            run_grpo(run, self.learner, pool, self.rewards)
        finally:
            run.close()


@pytest.fixture(scope="module")
def actors(ray_cluster):
    made = Actors()
    yield made
    made.learner.close()
    for pool in made.rollouts.values():
        for actor in pool.crew.actors:
            ray.kill(actor)


@pytest.fixture(scope="module")
def undisturbed(actors, make, tmp_path_factory) -> Callable[[int], RunConfig]:
    known: dict[int, RunConfig] = {}

    def run(lag: int) -> RunConfig:
        if lag not in known:
            known[lag] = make(tmp_path_factory.mktemp("runs") / f"lag-{lag}", lag)
            actors.train(known[lag])
        return known[lag]

    return run


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_transformer(config.folder / "grpo" / "final" / "model").state_dict()


def events(config: RunConfig, name: str) -> list[dict]:
    return [event for event in read_events(config.folder / "events.jsonl") if event["event"] == name]


def steps(config: RunConfig) -> dict[int, dict]:
    """What each step came to in the end, without times."""
    timed = ("time", "attempt", "sample_s", "train_s", "max_seconds", "idle_learner", "idle_rollout")
    return {e["step"]: {k: v for k, v in e.items() if k not in timed} for e in events(config, "step")}


def assert_same_outcome(config: RunConfig, quiet: RunConfig) -> None:
    ours, theirs = weights(config), weights(quiet)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert steps(config) == steps(quiet)
    balance = group_balance(read_events(config.folder / "events.jsonl"))
    assert balance["launched"] == sum(count for fate, count in balance.items() if fate != "launched")
    assert "in_flight" not in balance


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_every_step_is_sampled_by_the_version_that_lags_by_no_more_and_no_less(undisturbed, lag):
    config = undisturbed(lag)
    assert [step["version_lag"] for step in steps(config).values()] == [min(k, lag) for k in range(STEPS)]
    trained = events(config, "group_trained")
    assert {(e["step"], e["version"], e["sampled_by"]) for e in trained} == {
        (step, step, max(0, step - 1 - lag)) for step in range(1, STEPS + 1)
    }
    off = [step["first_ratio_error"] for step in steps(config).values()]
    assert off[0] <= 1e-6
    assert all((error > 1e-6) == bool(lag) for error in off[1:])


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_steps_are_launched_while_the_learner_works_and_no_further_ahead_than_the_lag_allows(undisturbed, lag):
    log = read_events(undisturbed(lag).folder / "events.jsonl")
    done = {event["step"]: place for place, event in enumerate(log) if event["event"] == "step"}
    launched = [(event["step"], place) for place, event in enumerate(log) if event["event"] == "group_launched"]
    for step, place in launched:
        # With a lag the step's event comes after the launch that its new version allows.
        assert all(done[earlier] < place for earlier in range(1, step - lag - bool(lag)))
    assert (min(place for step, place in launched if step == 2) < done[1]) == bool(lag)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(actors, undisturbed, make, tmp_path, lag):
    config = make(tmp_path / "run", lag)

    def stop(step: int, run: Run) -> None:
        if step == 3:
            run._stop = signal.SIGTERM

    with pytest.raises(Interrupted, match="after step 3"):
        actors.train(config, stop)
    flying = in_flight(read_events(config.folder / "events.jsonl"))
    assert set(flying.values()) <= set(range(4, 4 + lag + bool(lag)))
    stored = sorted(path.stem for path in (config.folder / "grpo" / "step-00000003").glob("weights-*"))
    assert stored == [f"weights-{version:08d}" for version in range(3 - lag, 3)]
    actors.train(config)
    assert_same_outcome(config, undisturbed(lag))


@pytest.mark.parametrize("lag", [1, 2])
def test_ranks_lost_while_groups_are_in_flight_cost_time_alone(actors, undisturbed, make, tmp_path, lag):
    config = make(tmp_path / "run", lag)

    def lose(step: int, run: Run) -> None:
        if step == 3 and run.events.attempt == 1:
            raise LearnerError("the ranks are gone")

    with pytest.raises(LearnerError):
        actors.train(config, lose)
    actors.train(config)
    assert events(config, "rollback")[-1]["to_step"] == 2
    assert_same_outcome(config, undisturbed(lag))


def test_a_rollout_actor_killed_with_groups_of_several_versions_in_flight_costs_time_alone(
    actors, undisturbed, make, tmp_path
):
    config, victims = make(tmp_path / "run", 2), []

    def kill(step: int, run: Run) -> None:
        if step == 1:  # steps 2 to 4 are with the actors and are done before this one answers; 5 and 6 are yet to come
            pool = actors.rollouts[str(rollout_setup(run))]
            pid = ray.get(pool.crew.actors[0].__ray_call__.remote(lambda _: os.getpid()))
            os.kill(pid, signal.SIGSTOP)  # what it is given from now on surely dies with it
            threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
            victims.append(pid)

    actors.train(config, kill)
    assert victims
    assert [e["role"] for e in events(config, "actor_lost")] == ["rollout"]
    assert_same_outcome(config, undisturbed(2))


def test_a_policy_that_is_the_samplers_own_is_what_forward_process_training_calls_old(actors, make, tmp_path):
    config = make(tmp_path / "run", 2, "grpo.algorithm=nft", "grpo.nft.times=2")
    actors.train(config)
    drift = [step["drift"] for step in steps(config).values()]
    assert drift[0] == 0
    assert all(value > 0 for value in drift[1:])  # the learner has moved on since these groups were sampled
