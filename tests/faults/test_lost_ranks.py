"""Learner ranks that are lost are built anew from the last commit, in the same run."""

import os
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest
import ray
import torch

import actors.learner
from actors.colocated import ColocatedGroup
from common.errors import LearnerError
from common.events import group_balance, read_events
from tests.faults.grpo_stage import small_stage, steps, trained
from tests.integration.policies import write_policy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory, real_dataset) -> Any:
    return small_stage(write_policy(tmp_path_factory.mktemp("policy")), real_dataset)


def test_ranks_lost_in_the_middle_of_steps_are_built_anew_and_every_step_is_that_of_an_undisturbed_run(
    config, tmp_path
):
    quiet, calm = trained(config(tmp_path / "quiet"))
    told: list[str] = []

    def disturb(learner, step, items):
        if step == 1 and not told:
            told.append("killed")
            pid = ray.get(learner._ranks[1].__ray_call__.remote(lambda _: os.getpid()))
            os.kill(pid, signal.SIGSTOP)  # so that its peer waits for it in the middle of the step
            threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        if step == 2 and len(told) == 1:
            told.append("raised")
            return [replace(items[0], payload=None), *items[1:]]  # one rank cannot make sense of it
        return items

    weights, events = trained(config(tmp_path / "run"), disturb)
    assert told == ["killed", "raised"]
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    assert steps(events) == steps(calm)
    lost = [e["cause"] for e in events if e["event"] == "actor_lost"]
    assert len(lost) == 2
    assert lost[0].startswith("learner rank 1: its process")
    assert [e["event"] for e in events].count("actor_replaced") == 2
    assert [e["to_step"] for e in events if e["event"] == "rollback"] == [1, 2]
    balance = group_balance(events)
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched") == 12 + 6
    assert balance["dropped:rolled back"] == 6
    assert "in_flight" not in balance


def test_ranks_that_sample_lost_in_the_middle_of_a_group_are_built_anew_and_the_run_ends_as_the_other_placement_does(
    config, tmp_path, monkeypatch
):
    quiet, calm = trained(config(tmp_path / "quiet"))
    killed, sample = list[int](), ColocatedGroup.sample

    def sample_and_kill(self, setup, requests, *rest):
        if requests[0].step != 3 or killed:
            return sample(self, setup, requests, *rest)
        pid = ray.get(self._ranks[1].__ray_call__.remote(lambda _: os.getpid()))
        killed.append(pid)
        os.kill(pid, signal.SIGSTOP)  # so that it surely dies with groups unanswered
        groups = sample(self, setup, requests, *rest)
        threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        return groups

    monkeypatch.setattr(ColocatedGroup, "sample", sample_and_kill)
    made = config(tmp_path / "run")
    weights, events = trained(
        made.model_copy(update={"cluster": made.cluster.model_copy(update={"colocated": True, "offload": True})})
    )
    assert len(killed) == 1
    assert all(torch.equal(weights[name], quiet[name]) for name in quiet)
    assert steps(events) == steps(calm)
    assert next(e["cause"] for e in events if e["event"] == "actor_lost").startswith("learner rank 1: its process")
    balance = group_balance(events)
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched") == 12 + 3
    assert "in_flight" not in balance


def test_a_new_rank_that_is_lost_before_the_ranks_have_met_is_one_more_loss_and_not_the_end(
    config, tmp_path, monkeypatch
):
    lost, wait_all = list[Any](), actors.learner.wait_all

    def disturb(learner, step, items):
        if step == 1 and not lost:
            lost.append(learner)
            ray.kill(learner._ranks[0], no_restart=True)
        return items

    def wait_and_kill(refs, what, *rest):
        values = wait_all(refs, what, *rest)
        if what.startswith("a rendezvous") and len(lost) == 1:
            lost.append("again")
            ray.kill(lost[0]._ranks[1], no_restart=True)
        return values

    monkeypatch.setattr(actors.learner, "wait_all", wait_and_kill)
    made = config(tmp_path / "run")
    cluster = made.cluster.model_copy(update={"replacements": 2})
    _, events = trained(made.model_copy(update={"cluster": cluster}), disturb)
    assert len(lost) == 2
    told = [e["event"] for e in events if e["event"] in ("actor_lost", "actor_replaced")]
    assert told == ["actor_lost", "actor_lost", "actor_replaced"]
    assert sorted(steps(events)) == [1, 2, 3, 4]


def test_ranks_that_are_lost_without_a_commit_in_between_stop_the_run_with_the_first_cause(config, tmp_path):
    def disturb(learner, step, items):
        return [replace(items[0], payload=step)] if step == 1 else items

    with pytest.raises(LearnerError, match=r"^learner ranks were lost 2 times without a commit .* 'int' object has no"):
        trained(config(tmp_path / "run"), disturb)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [e["event"] for e in events].count("actor_lost") == 2
    assert max(e["step"] for e in events if e["event"] == "commit") == 1
