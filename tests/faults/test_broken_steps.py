"""A rank that hangs, numbers that are not finite, scorers that fail and commits that rot, in whole GRPO stages."""

import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from common.commit import latest
from common.errors import NumericsError, RewardError
from common.events import group_balance
from pipeline.config import RunConfig
from rewards.combine import TermConfig
from tests.faults.grpo_stage import small_stage, steps, trained
from tests.integration.policies import write_policy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.xdist_group("ray"),
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster"),
]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def config(tmp_path_factory, real_dataset) -> Any:
    return small_stage(write_policy(tmp_path_factory.mktemp("policy")), real_dataset)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[dict]]:
    return trained(config(tmp_path_factory.mktemp("runs") / "quiet"))


def test_a_rank_that_hangs_is_noticed_at_the_deadline_and_every_step_is_that_of_an_undisturbed_run(
    config,
    undisturbed,
    tmp_path,
    caplog,
):
    deadline_s, stopped = 30.0, list[float]()
    hanging: RunConfig = config(tmp_path / "run")
    cluster = hanging.cluster.model_copy(update={"deadline_s": deadline_s})

    def disturb(learner, step, items):
        if step == 2 and not stopped:
            os.kill(ray.get(learner._ranks[1].__ray_call__.remote(lambda _: os.getpid())), signal.SIGSTOP)
            stopped.append(time.time())
        return items

    with caplog.at_level(logging.WARNING, logger="omnialpha"):
        weights, events = trained(hanging.model_copy(update={"cluster": cluster}), disturb)
    (overdue,) = (r for r in caplog.records if r.getMessage().endswith("still missing after 30 s"))
    assert deadline_s - 0.1 <= overdue.created - stopped[0] <= deadline_s + 1
    calm_weights, calm = undisturbed
    assert equal(weights, calm_weights)
    assert steps(events) == steps(calm)
    (lost,) = (e for e in events if e["event"] == "actor_lost")
    assert "what every process was doing is in" in lost["cause"]
    (replaced,) = (e for e in events if e["event"] == "actor_replaced")
    assert replaced["seconds"] < 30


def test_a_loss_that_is_not_finite_names_step_and_group_and_the_run_goes_on_from_the_commit_before(
    config,
    undisturbed,
    tmp_path,
):
    def disturb(learner, step, items):
        if step != 2:
            return items
        group = ray.get(items[1].payload)
        poisoned = replace(group, window_GWMCHW=np.full_like(group.window_GWMCHW, np.nan))
        return [items[0], replace(items[1], payload=poisoned), *items[2:]]

    with pytest.raises(NumericsError, match=r"^step 3, group 3\.\d \(\w+\): loss is nan before the optimiser step; "):
        trained(config(tmp_path / "run"), disturb)
    skipped = list[str]()
    found = latest(tmp_path / "run" / "grpo", skipped.append)
    assert not skipped
    assert found is not None
    assert found.step == 2
    weights, events = trained(config(tmp_path / "run"))
    calm_weights, calm = undisturbed
    assert equal(weights, calm_weights)
    assert steps(events) == steps(calm)


SCORER = '''
class Picky:
    """Brightness; fails for groups of some tasks."""

    def score(self, batch):
        if batch.task in {tasks!r}:
            raise ValueError("cannot score this")
        return batch.layers_GLCHW.mean((1, 2, 3, 4)).tolist()
'''


def picky(make: Any, folder: Path, tasks: tuple[str, ...]) -> RunConfig:
    folder.mkdir(exist_ok=True)
    (folder / "picky.py").write_text(SCORER.format(tasks=tasks))
    made: RunConfig = make(folder / "run")
    term = TermConfig(name="picky", scorer=f"{folder / 'picky.py'}:Picky")
    rewards = made.rewards.model_copy(update={"terms": (term,)})
    grpo = made.grpo.model_copy(update={"max_empty_steps": 2})
    return made.model_copy(update={"rewards": rewards, "grpo": grpo})


def test_a_group_whose_scores_all_fail_is_dropped_with_its_reason_and_the_others_are_trained(
    config,
    undisturbed,
    tmp_path,
):
    launched = [e for e in undisturbed[1] if e["event"] == "group_launched"]
    task = launched[0]["task"]
    _, events = trained(picky(config, tmp_path, (task,)))
    failing = {e["group"] for e in events if e["event"] == "group_launched" and e["task"] == task}
    dropped = {e["group"]: e["reason"] for e in events if e["event"] == "group_dropped"}
    assert dropped == dict.fromkeys(failing, "below_min_group")
    balance = group_balance(events)
    assert balance["trained"] == balance["launched"] - len(failing) > 0
    short = [e for e in events if e["event"] == "step" and e["missing_scores"]]
    assert sum(e["missing_scores"] for e in short) == 3 * len(failing)
    assert all("cannot score this" in reason for e in short for reason in e["missing_because"])


def test_scorers_that_always_fail_stop_the_run_with_what_they_said(config, undisturbed, tmp_path):
    tasks = tuple({e["task"] for e in undisturbed[1] if e["event"] == "group_launched"})
    with pytest.raises(
        RewardError, match=r"no trainable group in \d consecutive steps .*below_min_group.*cannot score this"
    ):
        trained(picky(config, tmp_path, tasks))


def test_a_run_whose_newest_commit_rotted_goes_on_from_the_one_before_and_comes_to_the_same(
    config,
    undisturbed,
    tmp_path,
    caplog,
):
    class Stop(Exception):
        pass

    def disturb(learner, step, items):
        if step == 3:
            raise Stop
        return items

    with pytest.raises(Stop):
        trained(config(tmp_path / "run"), disturb)
    newest = max((tmp_path / "run" / "grpo").glob("step-*"))
    (state, *_) = sorted(newest.rglob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, logger="omnialpha"):
        weights, events = trained(config(tmp_path / "run"))
    assert f"skipped a damaged commit: {newest}" in caplog.text
    calm_weights, calm = undisturbed
    assert equal(weights, calm_weights)
    assert steps(events) == steps(calm)
    assert [e["to_step"] for e in events if e["event"] == "rollback"] == [2]
