"""Clusters of several nodes on this machine: one that grows, one that is too small, and the loss of a node."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.crew import Crew
from actors.learner import LearnerGroup
from actors.processes import roster
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from actors.shared_storage import SharedStorage
from common.errors import ClusterError, PlacementError
from common.events import group_balance, read_events
from pipeline.config import RunConfig, load_config
from pipeline.evaluate import run_evaluate
from pipeline.plan import check_plan
from pipeline.run import Run
from pipeline.stages import run_stages
from policy.folder import load_transformer
from tests.faults import worker
from tests.faults.worker import Worker
from tests.integration.policies import write_policy
from tests.integration.test_whole_loop import processes_of

ray.cloudpickle.register_pickle_by_value(worker)  # actors cannot import the tests

pytestmark = [
    pytest.mark.faults,
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("without_ray"),
]

STEPS, PROMPTS = 4, 3


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Starts a cluster whose nodes have so many CPUs each; the first is the driver's."""
    started: list[Cluster] = []

    def start(*cpus: float) -> Cluster:
        made = Cluster(initialize_head=True, head_node_args=node(cpus[0]))
        started.append(made)
        for number in cpus[1:]:
            made.add_node(**node(number))
        return made

    yield start
    ray.shutdown()
    for made in started:
        made.shutdown()


def node(cpus: float) -> dict[str, Any]:
    return {"num_cpus": cpus, "num_gpus": 0, "object_store_memory": 150 * 2**20}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def config(policy, real_dataset, tmp_path) -> Any:
    def make(cluster: Cluster, *overrides: str, name: str = "run") -> RunConfig:
        own = [f"run_dir={tmp_path / name}", f"dataset={real_dataset}", f"grpo.start={policy}"]
        size = [f"grpo.steps={STEPS}", f"grpo.prompts={PROMPTS}", "grpo.group=3", "grpo.optimiser.lr=1e-3"]
        size += ["grpo.commit_every=2", "tracking.wandb=disabled", "cluster.deadline_s=240"]
        return load_config("tiny", [*own, *size, f"cluster.address={cluster.address}", *overrides])

    return make


def roles(learner: float = 1, rollout: float = 2, reward: float = 1) -> list[str]:
    """CPUs of the one actor that each role has."""
    return [
        f"cluster.{role}.cpus={cpus}" for role, cpus in (("learner", learner), ("rollout", rollout), ("reward", reward))
    ] + [f"cluster.{role}.actors=1" for role in ("learner", "rollout", "reward")]


def steps(events: list[dict]) -> list[dict]:
    timed = ("time", "attempt", "sample_s", "train_s", "max_seconds", "idle_learner", "idle_rollout")
    return [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] == "step"]


def trained(config: RunConfig) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Weights and events of a whole GRPO stage."""
    run_stages(config, ["grpo"])
    return load_transformer(config.folder / "grpo" / "final" / "model").state_dict(), events_of(config)


def remove_node_of(name: str, cluster: Cluster) -> list[str]:
    """Ends the raylet under an actor with all its processes; returns the names of the run's actors that were there."""
    gone = roster.known()[name].node
    lost = sorted(other for other, process in roster.known().items() if process.node == gone)
    (raylet,) = (each for each in cluster.worker_nodes if each.node_id == gone)
    cluster.remove_node(raylet, allow_graceful=False)
    return lost


def events_of(config: RunConfig) -> list[dict]:
    return read_events(config.folder / "events.jsonl")


# A cluster that grows ------------------------------------------------------------------------------------------------


def test_a_run_waits_for_a_node_that_joins_and_says_what_it_waits_for(cluster, config, monkeypatch, caplog):
    caplog.set_level("INFO", logger="omnialpha")
    monkeypatch.setattr("actors.room.REPORT_EVERY_S", 1.0)
    small, stop_here, looks = cluster(2), Run.stop_here, []
    settings = config(small, *roles(), "cluster.wait_s=120", "grpo.steps=1", "grpo.commit_every=1")

    def grow(self: Run, stage: str) -> None:  # asked twice a second while the run waits
        looks.append(stage)
        if len(looks) == 6:
            small.add_node(**node(2))
        stop_here(self, stage)

    monkeypatch.setattr(Run, "stop_here", grow)
    run_stages(settings, ["grpo"])
    said = (settings.folder / "log.txt").read_text()
    assert "waiting for a larger cluster: the configured actors need 4 CPUs (learner 1 × 1 CPU, rollout 1 × 2" in said
    assert said.index("waiting for a larger cluster") < said.index("the cluster is large enough")
    assert [e["step"] for e in events_of(settings) if e["event"] == "step"] == [1]


def test_a_cluster_that_does_not_grow_in_time_is_refused_with_what_is_missing(cluster, config):
    settings = config(cluster(2), *roles(), "cluster.wait_s=3")
    with pytest.raises(PlacementError, match=r"need 4 CPUs .* the cluster offers 2; .*\(after 3 s\)"):
        run_stages(settings, ["grpo"])
    assert not [e for e in events_of(settings) if e["event"] == "stage_started"]


def test_sigterm_while_a_run_waits_for_a_larger_cluster_ends_it_and_leaves_nothing_running(cluster, config, tmp_path):
    settings = config(cluster(2), *roles(), "cluster.wait_s=120")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "pipeline.cli", "grpo", str(tmp_path / "mine.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        said = []
        for line in driver.stdout:
            said.append(line)
            if "waiting for a larger cluster" in line:
                began = time.monotonic()
                driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=60) == 130, "".join(said)
    assert time.monotonic() - began < 20
    assert "stopped in stage 'grpo'" in said[-1], said[-1]
    assert not [e for e in events_of(settings) if e["event"] == "stage_started"]
    assert not processes_of(settings.folder)


def test_a_node_that_joins_later_is_asked_about_the_shared_storage_by_the_first_actor_there(
    cluster, real_dataset, tmp_path
):
    made = cluster(1)
    ray.init(made.address, logging_level="ERROR", log_to_driver=False)
    (tmp_path / "run").mkdir()
    storage, actor = SharedStorage(tmp_path / "run", real_dataset), ray.remote(num_cpus=0)(Worker)

    def start(on: str) -> None:
        where = NodeAffinitySchedulingStrategy(on, soft=False)
        make = actor.options(scheduling_strategy=where).remote
        crew = Crew("reward", make, 1, replacements=0, deadline_s=120.0)
        try:
            crew.begin()
        finally:
            ray.kill(crew.actors[0])

    try:
        storage.check(deadline_s=120.0)
        roster.storage = storage
        first, second = (made.add_node(**node(1)).node_id for _ in range(2))
        start(first)
        assert storage.question.known == {made.head_node.node_id, first}
        storage.question.path.unlink()  # as on a node without the mount
        start(first)
        start(made.head_node.node_id)
        with pytest.raises(ClusterError, match=r"does not share .*run with the driver \(No such file"):
            start(second)
    finally:
        roster.open(None)
        storage.close()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_plan_has_a_line_for_every_node_of_the_cluster(cluster, config):
    lines = check_plan(config(cluster(2, 3), *roles(learner=3, rollout=1, reward=1))).splitlines()
    found = {line.split()[1]: line for line in lines if "GiB" in line}
    assert found.keys() == {"2", "3"}
    assert found["3"].endswith("  learner × 1")
    assert found["2"].endswith("  rollout × 1, reward × 1")


# The loss of a node --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [False, True], ids=["before they are scored", "before they are trained"])
def test_a_node_lost_with_its_rollout_actor_and_finished_groups_changes_nothing_in_the_outcome(
    cluster, config, monkeypatch, scored
):
    three, score, train, lost = cluster(2, 3, 3), RewardPool.score, LearnerGroup.train, list[str]()
    # The learner starts on the driver's node, where no room is left for a rollout actor. Groups are too large to travel
    # with the messages to the driver.
    own = [*roles(learner=1, rollout=2, reward=0.01), "grpo.group=9"]
    quiet, calm = trained(config(three, *own, name="quiet"))

    def score_and_lose(self, group, *rest):
        if not scored and group.request.step == 3 and group.request.group == 1 and not lost:
            lost.extend(remove_node_of("rollout-0", three))
        return score(self, group, *rest)

    def train_and_lose(self, step, *rest):
        if scored and step == 2 and not lost:
            lost.extend(remove_node_of("rollout-0", three))
        return train(self, step, *rest)

    monkeypatch.setattr(RewardPool, "score", score_and_lose)
    monkeypatch.setattr(LearnerGroup, "train", train_and_lose)
    weights, events = trained(config(three, *own))
    assert "rollout-0" in lost
    assert "learner-0" not in lost
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    assert steps(events) == steps(calm)
    told = Counter(event["event"] for event in events)
    balance = group_balance(events)
    if scored:  # only the ranks know that trajectories are gone, and do so in the middle of a step
        assert [e["to_step"] for e in events if e["event"] == "rollback"] == [2]
        assert balance["dropped:rolled back"] == PROMPTS
    else:  # the step's groups are sampled again, nobody else loses anything
        assert told["groups_lost"] >= 1
        assert {e["step"] for e in events if e["event"] == "groups_lost"} == {3}
        assert told["rollback"] == 0
        assert balance == group_balance(calm)
        assert {e["role"] for e in events if e["event"] == "actor_replaced"} <= {"rollout", "reward"}
    # A replacement may first be placed on the lost node, as long as the cluster does not know of the loss.
    assert {f"{e['role']}-{e['actor']}" for e in events if e["event"] == "actor_lost" and "actor" in e} == set(lost)
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched")


def test_an_evaluation_whose_samples_are_lost_with_a_node_is_run_again_and_finds_the_same(cluster, config, monkeypatch):
    three, measure, lost = cluster(2, 3, 3), RewardPool.measure, list[str]()
    # Samples of six records at once are too large to travel with the messages to the driver.
    own = [*roles(learner=1, rollout=2, reward=0.01), "grpo.steps=1", "evaluate.records=6", "evaluate.batch=6"]

    def evaluated(config: RunConfig) -> tuple[dict[str, Any], list[dict]]:
        run_stages(config, ["grpo", "evaluate"])
        results = json.loads((config.folder / "evaluate" / "final" / "results.json").read_text())
        del results["training"]  # seconds
        return results, events_of(config)

    def measure_and_lose(self, task, count, pixels, *rest):
        if self.watched and not lost:
            lost.extend(remove_node_of("rollout-0", three))
        return measure(self, task, count, pixels, *rest)

    def evaluate(run, rollouts, rewards):
        rewards.watched = True  # the gaming watch measures too
        return run_evaluate(run, rollouts, rewards)

    quiet, calm = evaluated(config(three, *own, name="quiet"))
    monkeypatch.setattr(RewardPool, "watched", False, raising=False)
    monkeypatch.setattr(RewardPool, "measure", measure_and_lose)
    monkeypatch.setattr("pipeline.stages.run_evaluate", evaluate)
    results, events = evaluated(config(three, *own))
    assert "rollout-0" in lost
    assert "values_lost" not in {e["event"] for e in calm}
    assert [e["event"] for e in events].count("values_lost") == 1
    assert results == quiet


def test_a_node_lost_without_room_for_its_actors_ends_the_run_with_what_it_needs(cluster, config, monkeypatch):
    two, score = cluster(2, 2), RewardPool.score
    settings = config(two, *roles())

    def score_and_lose(self, group, *rest):
        if group.request.step == 3 and group.request.group == 1:
            remove_node_of("rollout-0", two)
        return score(self, group, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RewardPool, "score", score_and_lose)
        with pytest.raises(PlacementError, match=r"need 4 CPUs .*rollout 1 × 2 CPU.* offers 2; .*cluster.wait_s"):
            run_stages(settings, ["grpo"])
    ray.shutdown()
    two.add_node(**node(2))
    _, events = trained(settings)  # with the node back, the same command goes on
    assert [e["to_step"] for e in events if e["event"] == "rollback"] == [2]
    assert [e["step"] for e in steps(events)] == [1, 2, 3, 4]
    balance = group_balance(events)
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched")


def test_learner_ranks_on_a_lost_node_are_built_anew_elsewhere_from_the_last_commit(cluster, config, monkeypatch):
    three, train, lost = cluster(1, 2, 2), LearnerGroup.train, list[str]()
    own = roles(learner=2, rollout=0.01, reward=0.01)  # the rank does not fit on the driver's node, the others do
    quiet, calm = trained(config(three, *own, name="quiet"))

    def train_and_lose(self, step, *rest):
        if step == 3 and not lost:
            lost.extend(remove_node_of("learner-0", three))  # and the weights that step 3 was sampled with
        return train(self, step, *rest)

    monkeypatch.setattr(LearnerGroup, "train", train_and_lose)
    weights, events = trained(config(three, *own))
    assert lost == ["learner-0"]
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    assert [e["to_step"] for e in events if e["event"] == "rollback"] == [2]
    taken = steps(events)
    assert [e["step"] for e in taken] == [1, 2, 3, 3, 4], "step 3 was repeated: commits are made every two steps"
    assert taken[2] == taken[3]
    assert [*taken[:2], *taken[3:]] == steps(calm)
    assert {e["role"] for e in events if e["event"] in ("actor_lost", "actor_replaced")} == {"learner"}
    balance = group_balance(events)
    assert balance["launched"] == balance["trained"] + balance["dropped:rolled back"] == (STEPS + 2) * PROMPTS


# Rollout actors that come and go --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["its node is lost", "somebody else is lost"])
def test_a_rollout_actor_joins_with_a_node_and_leaves_without_changing_anything_in_the_outcome(
    cluster, config, monkeypatch, end
):
    grown, train, sample, score = cluster(4), LearnerGroup.train, RolloutPool.sample, RewardPool.score
    # Groups are too large to travel with the messages to the driver: a node takes those that it made with it.
    own = [*roles(learner=1, rollout=2, reward=1), "grpo.steps=6", "grpo.group=9"]
    quiet, calm = trained(config(grown, *own, name="quiet"))
    pools, lost_at = list[RolloutPool](), list[str]()

    def sample_and_see(self, *rest):
        pools[:] = [self]
        return sample(self, *rest)

    def train_and_change(self, step, *rest):
        crew = pools[0].crew
        if step == 1:
            assert crew.serving == [0], "there is no room for a second one"
            grown.add_node(**node(2))
            ray.get(crew.actors[1].__ray_ready__.remote(), timeout=120)
        if step == 4:
            assert crew.serving == [0, 1]
            if end == "somebody else is lost":
                ray.kill(crew.actors[0], no_restart=True)
        return train(self, step, *rest)

    def score_and_lose(self, group, *rest):
        if group.request.step == 6 and end == "its node is lost" and not lost_at:
            lost_at[:] = remove_node_of("rollout-1", grown)  # none of the step's groups is scored yet
        return score(self, group, *rest)

    monkeypatch.setattr(RewardPool, "score", score_and_lose)
    monkeypatch.setattr(RolloutPool, "sample", sample_and_see)
    monkeypatch.setattr(LearnerGroup, "train", train_and_change)
    weights, events = trained(config(grown, *own, "cluster.rollout_most=2"))
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    assert steps(events) == steps(calm)
    assert group_balance(events) == group_balance(calm)
    told = [(e["event"], e["actor"]) for e in events if e["event"].startswith("actor_")]
    assert told[:1] == [("actor_joined", 1)]
    assert ("actor_left", 1) in told
    assert lost_at == (["rollout-1"] if end == "its node is lost" else [])
    assert not [e for e in events if e["event"] == "rollback"]
    lost = [] if end == "its node is lost" else [("actor_lost", 0), ("actor_replaced", 0)]
    assert [entry for entry in told if entry[0] in ("actor_lost", "actor_replaced")] == lost
    log = (config(grown, *own).folder / "logs" / "rollout-1.log").read_text()
    assert "sample took" in log
