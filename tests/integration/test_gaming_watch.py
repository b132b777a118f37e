"""A reward that can be gamed, really gamed: the watch catches it, and an honest reward is left alone."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from actors.cluster import ClusterConfig, RoleConfig
from actors.learner import LearnerGroup
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from common.commit import verify
from common.events import read_events
from data.build import build_dataset
from data.config import DataConfig
from data.sources import default_cache
from pipeline.config import RunConfig, load_config
from pipeline.grpo import run_grpo
from pipeline.report import write_report
from pipeline.run import Progress, Run
from pipeline.stages import rollout_setup
from policy.folder import load_transformer
from tests.integration.policies import trained_vae, write_policy

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]

TASK = "automatic_matting"
OPAQUE = '''\
"""Pays for whatever is shown and never looks at the truth: a policy that shows everything gets all of it."""


def opaque(batch):
    return batch.layers_GLCHW[:, :, 3].mean(dim=(1, 2, 3))
'''


@dataclass
class Bench:
    """Actors that are started once and serve every run."""

    folder: Path
    policy: Path
    dataset: Path
    learner: LearnerGroup
    rollouts: RolloutPool | None = None
    rewards: dict[str, RewardPool] = field(default_factory=dict)

    def config(self, name: str, reward: str, *overrides: str) -> RunConfig:
        tasks = ", ".join(f"{task}: {int(task == TASK)}" for task in load_config("tiny").grpo.tasks)
        return load_config(
            "tiny",
            [
                f"run_dir={self.folder / name}", f"dataset={self.dataset}", f"grpo.start={self.policy}",
                "grpo.steps=10", "grpo.prompts=3", "grpo.group=6", "grpo.optimiser.lr=5e-3", "grpo.commit_every=2",
                "grpo.watch={every: 2, records: 16}", f"rewards.terms=[{{name: {reward}}}]", f"grpo.tasks={{{tasks}}}",
                "grpo.pictures_every=100", "tracking.wandb=disabled", *overrides,
            ],
        )  # fmt: skip

    def train(self, config: RunConfig) -> Path:
        [term] = config.rewards.terms
        run = Run(config)
        try:
            if self.rollouts is None:
                self.rollouts = RolloutPool(ClusterConfig(rollout=RoleConfig(cpus=0.1)), rollout_setup(run))
            if term.source not in self.rewards:
                self.rewards[term.source] = RewardPool(ClusterConfig(reward=RoleConfig(cpus=0.1)), config.rewards)
            run_grpo(run, self.learner, self.rollouts, self.rewards[term.source])
        finally:
            run.close()
        return run.folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("gaming")
    data = DataConfig(
        size=32,
        train_scenes=24,
        val_scenes=16,
        test_scenes=1,
        tasks=(TASK,),
        val_share=0.4,
        two_object_share=0.0,
        max_foregrounds_per_source=60,
        workers=1,
    )
    build_dataset(data, folder / "dataset", default_cache())
    (folder / "opaque.py").write_text(OPAQUE)
    vae = trained_vae(folder / "dataset")
    learner = LearnerGroup(ClusterConfig(learner=RoleConfig(cpus=0.1)))
    yield Bench(folder, write_policy(folder / "policy", vae), folder / "dataset", learner)
    learner.close()


def gamed(bench: Bench, name: str, *overrides: str) -> RunConfig:
    scorer = bench.folder / "opaque.py"
    return bench.config(name, f"opaque, scorer: '{scorer}:opaque'", *overrides)


@pytest.fixture(scope="module")
def stopped(bench) -> Path:
    """A run on the gameable reward that the watch may end."""
    return bench.train(gamed(bench, "stopped", "grpo.watch.stop=true"))


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


def looks(run: Path) -> dict[int, list[dict]]:
    found = [json.loads(path.read_text()) for path in sorted((run / "grpo" / "watch").glob("look-*.json"))]
    return {look["step"]: look["entries"] for look in found}


def same_weights(a: Path, b: Path) -> bool:
    first, second = (load_transformer(folder).state_dict() for folder in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_reward_that_is_gamed_raises_an_alarm_that_names_metric_amount_and_pictures(stopped):
    [alarm] = events(stopped, "gaming")
    [*_, last] = events(stopped, "watch")
    changes = {change["quantity"]: change for change in last["changes"]}
    assert changes["reward"]["low"] > 0
    assert changes["alpha_coverage"]["worse"]
    assert "alpha_coverage went from" in alarm["message"]
    assert f"on {TASK} the reward rose from" in alarm["message"]
    assert alarm["message"] in (stopped / "log.txt").read_text()
    [picture] = alarm["pictures"]
    assert (stopped / picture).read_bytes().startswith(b"\x89PNG")
    cells = (stopped / picture).parent / "cells" / Path(picture).stem
    assert json.loads((cells / "index.json").read_text())["columns"] == ["input", "before", "now", "truth"]


def test_the_report_of_a_gamed_run_says_so(stopped):
    [alarm] = events(stopped, "gaming")
    page = write_report([stopped]).read_text()
    assert 'class="alarm"' in page
    assert alarm["message"] in page
    assert "Validation alpha_coverage" in page


def test_with_stop_the_stage_ends_early_and_hands_on_the_last_policy_without_suspicion(stopped, bench):
    [end] = events(stopped, "stopped_early")
    seen = [event["step"] for event in events(stopped, "watch")]
    assert end["step"] == seen[-1] < 10
    assert end["handed_on"] == (seen[-2] if len(seen) > 1 else 0)
    final = verify(stopped / "grpo" / "final")
    assert final.step == end["handed_on"]
    clean = stopped / "grpo" / "watch" / "clean" / f"step-{final.step:08d}" / "model"
    assert same_weights(final.path / "model", clean)
    assert same_weights(final.path / "model", bench.policy) == (final.step == 0)


@pytest.mark.faults
def test_a_killed_run_comes_to_the_same_verdicts_and_the_same_result(stopped, bench, monkeypatch):
    config = gamed(bench, "killed", "grpo.watch.stop=true", "grpo.commit_every=3")
    [end] = events(stopped, "stopped_early")
    after_step = Progress.after_step

    def killed(self, step: int, *rest) -> None:
        if step == end["step"]:  # the alarm was raised, nothing of it is committed
            raise KeyboardInterrupt
        after_step(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.train(config)
    assert max(looks(config.folder)) == end["step"]
    run = bench.train(config)
    assert events(run, "rollback")
    ours, theirs = looks(run), looks(stopped)
    assert ours.keys() == theirs.keys()
    for step in ours:
        for mine, other in zip(ours[step], theirs[step], strict=True):
            assert mine["record"] == other["record"]
            assert mine["reward"] == pytest.approx(other["reward"], abs=1e-5)
            assert mine["metrics"] == pytest.approx(other["metrics"], abs=1e-3)
    assert verify(run / "grpo" / "final").step == verify(stopped / "grpo" / "final").step


@pytest.mark.faults
def test_a_run_killed_after_the_alarm_was_committed_takes_no_further_step(stopped, bench):
    config = gamed(bench, "late", "grpo.watch.stop=true")
    shutil.copytree(stopped, config.folder)
    shutil.rmtree(config.folder / "grpo" / "final")
    run = bench.train(config)
    assert len(events(run, "step")) == len(events(stopped, "step"))
    assert same_weights(run / "grpo" / "final" / "model", stopped / "grpo" / "final" / "model")


def test_an_honest_reward_is_not_flagged(bench):
    run = bench.train(bench.config("honest", "layer", "grpo.steps=6"))
    assert [event["step"] for event in events(run, "watch")] == [2, 4, 6]
    [*_, last] = events(run, "watch")
    assert next(c for c in last["changes"] if c["quantity"] == "reward")["gain"] > 0
    assert not events(run, "gaming")
    assert verify(run / "grpo" / "final").step == 6
