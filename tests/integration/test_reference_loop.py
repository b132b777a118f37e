"""The real loop takes the steps of the reference loop, however it is spread over processes; broken loops do not."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import pipeline.grpo
from actors.cluster import ClusterConfig, RoleConfig
from actors.colocated import ColocatedGroup, ColocatedRollouts
from actors.learner import LearnerGroup
from actors.reward import RewardPool
from actors.rollout import RolloutPool
from common.errors import NumericsError
from common.events import read_events
from pipeline.config import RunConfig, load_config
from pipeline.grpo import run_grpo
from pipeline.run import Run
from pipeline.stages import rollout_setup
from pipeline.train import starting_point
from policy.folder import load_transformer, starting_policy
from tests.integration.policies import relative_change, write_policy
from tests.integration.reference_loop import Outcome, reference_loop

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]

COLOCATED = 0
"""Rollout actors where the learner ranks sample."""

VARIANTS = {
    "full": [],
    "lora": ["grpo.lora={rank: 4}"],
    "updates": ["grpo.minibatches=2", "grpo.epochs=2", "grpo.objective.clip_range=0.01"],
    "lag 1": ["grpo.max_staleness=1", "grpo.objective.clip_range=0.01"],
    "lag 2": ["grpo.max_staleness=2", "grpo.minibatches=2", "grpo.objective.clip_range=0.01"],
    "average": ["grpo.ema=0.4", "grpo.minibatches=2", "grpo.objective.clip_range=0.01"],
    "credit": ["grpo.objective.credit={cells: 8, reach: 0.15}", "grpo.minibatches=2", "grpo.objective.clip_range=0.1"],
    "mirrored": ["grpo.noise=mirrored", "grpo.group=4"],
    "cps": ["grpo.kernel={name: cps, eta: 0.8}", "grpo.noise=shared"],
}


@dataclass
class Bench:
    """Actors that are started once and serve every case."""

    policy: Path
    dataset: Path
    learners: dict[tuple[int, bool], LearnerGroup]
    rollouts: dict[str, RolloutPool]
    rewards: RewardPool | None

    def config(self, folder: Path, variant: str, *overrides: str) -> RunConfig:
        base = [
            f"run_dir={folder}", f"dataset={self.dataset}", f"grpo.start={self.policy}", "grpo.steps=5",
            "grpo.prompts=5", "grpo.group=3", "grpo.optimiser.lr=1e-3", "grpo.pictures_every=100",
            "tracking.wandb=disabled", "keep_commits=1", "grpo.watch.every=0",
        ]  # fmt: skip
        return load_config("tiny", [*base, *VARIANTS[variant], *overrides])


@pytest.fixture(scope="module")
def bench(tmp_path_factory, real_dataset, ray_cluster):
    made = Bench(write_policy(tmp_path_factory.mktemp("policy")), real_dataset, {}, {}, None)
    yield made
    for learner in made.learners.values():
        learner.close()


@pytest.fixture(scope="module")
def reference(bench, tmp_path_factory) -> Callable[[str], Outcome]:
    known: dict[str, Outcome] = {}

    def get(variant: str) -> Outcome:
        if variant not in known:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the rollout actors
            known[variant] = reference_loop(bench.config(tmp_path_factory.mktemp("unused"), variant))
            torch.set_num_threads(threads)
        return known[variant]

    return get


def real_loop(bench: Bench, config: RunConfig, variant: str, ranks: int, rollouts: int) -> Outcome:
    """``rollouts``: number of rollout actors; without one the ranks sample themselves."""
    role, key = RoleConfig(actors=ranks, cpus=0.1), (ranks, not rollouts)
    if key not in bench.learners:
        cluster = ClusterConfig(learner=role, deadline_s=240, colocated=not rollouts, offload=not rollouts)
        bench.learners[key] = LearnerGroup(cluster) if rollouts else ColocatedGroup(cluster)
    learner = bench.learners[key]
    bench.rewards = bench.rewards or RewardPool(ClusterConfig(reward=RoleConfig(cpus=0.1)), config.rewards)
    run = Run(config)
    start = starting_point(run, "grpo")
    setup = rollout_setup(run)
    kind, pool = f"{rollouts} {setup}", None
    if isinstance(learner, ColocatedGroup):
        pool = ColocatedRollouts(learner, setup)
    elif kind not in bench.rollouts:
        bench.rollouts[kind] = RolloutPool(ClusterConfig(rollout=RoleConfig(actors=rollouts, cpus=0.1)), setup)
    pool = pool or bench.rollouts[kind]
    groups: dict[tuple[int, int], Any] = {}

    def watched(sampled, *rest):
        made = list(sampled)
        for group in made:
            groups[group.request.step, group.request.group] = ray.get(group.trajectory).clean_GMCHW
        return collect(made, *rest)

    collect = pipeline.grpo.collect
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline.grpo, "collect", watched)
            run_grpo(run, learner, pool, bench.rewards)
    finally:
        run.close()
    model = starting_policy(config.grpo.start, config.grpo.lora, start.seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    final = load_transformer(run.final("grpo") / "model")
    after = {name: value for name, value in final.state_dict().items() if name in before}
    steps = [e for e in read_events(run.folder / "events.jsonl") if e["event"] == "step"]
    norms = [step["max_grad_norm"] for step in steps]
    return Outcome(before, after, [torch.tensor(groups[key]) for key in sorted(groups)], norms)


def assert_equal(real: Outcome, expected: Outcome) -> None:
    for name in expected.before:
        assert torch.equal(real.before[name], expected.before[name])
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(real.groups, expected.groups, strict=True)]
    assert max(apart[:5]) <= 1e-6, apart  # sampled by the very same weights
    assert max(apart) <= 1e-4, apart  # sampled by weights that differ in their last bits, through several steps
    assert relative_change(real.before, real.after, expected.after) <= 1e-3
    per_step = len(expected.norms) // len(real.norms)
    largest = [max(expected.norms[k : k + per_step]) for k in range(0, len(expected.norms), per_step)]
    np.testing.assert_allclose(real.norms, largest, rtol=1e-3)


@pytest.mark.parametrize(
    ("variant", "ranks", "rollouts", "stage"),
    [
        ("full", 1, 1, 1),
        ("full", 2, 3, 0),
        ("full", 2, 1, 1),
        ("full", 2, 3, 2),
        ("full", 2, 1, 3),
        ("average", 2, 1, 1),
        ("lora", 1, 1, 1),
        ("lora", 2, 1, 3),
        ("updates", 2, 3, 1),
        ("cps", 2, 1, 1),
        ("mirrored", 1, 1, 1),
        ("credit", 2, 3, 1),
        ("lag 1", 1, 1, 1),
        ("lag 1", 2, 3, 3),
        ("lag 2", 2, 3, 1),
        *(("full", ranks, COLOCATED, stage) for ranks in (1, 2) for stage in range(4)),
        ("lora", 2, COLOCATED, 3),
        ("updates", 2, COLOCATED, 1),
        ("credit", 1, COLOCATED, 1),
    ],
)
def test_the_real_loop_equals_the_reference_loop(bench, reference, tmp_path, variant, ranks, rollouts, stage):
    config = bench.config(tmp_path / "run", variant, f"grpo.zero_stage={stage}")
    assert_equal(real_loop(bench, config, variant, ranks, rollouts), reference(variant))


def lose_a_micro_batch(patch: pytest.MonkeyPatch) -> None:
    select = pipeline.grpo.select

    def lossy(scored, *rest):
        batch = select(scored, *rest)
        kept = [replace(batch.items[0], payload=ray.put(shortened(ray.get(batch.items[0].payload)))), *batch.items[1:]]
        kept[0] = replace(kept[0], count=kept[0].count // 2)
        return replace(batch, items=kept)

    def shortened(group):
        return replace(group, steps=group.steps[:-1])

    patch.setattr(pipeline.grpo, "select", lossy)


def keep_stale_weights(patch: pytest.MonkeyPatch) -> None:
    publish = RolloutPool.publish
    first: list[Any] = []

    def stale(self, version, *weights):
        first.append(weights)
        return publish(self, version, *first[0])

    train = LearnerGroup.train
    patch.setattr(RolloutPool, "publish", stale)
    # Without the bound on the first ratio, which would stop it by itself.
    patch.setattr(LearnerGroup, "train", lambda self, step, items, _: train(self, step, items))


def scale_twice(patch: pytest.MonkeyPatch) -> None:
    train = LearnerGroup.train

    def doubled(self, step, items, bound):
        return train(self, step, [replace(item, extra=item.extra * 2) for item in items], bound)

    patch.setattr(LearnerGroup, "train", doubled)


BREAKAGES = [lose_a_micro_batch, keep_stale_weights, scale_twice]


@pytest.mark.parametrize(
    ("variant", "ranks", "rollouts", "stage", "breakage"),
    [
        (*case, breakage)
        for case in (
            ("full", 1, 1, 1),
            ("full", 2, 3, 0),
            ("full", 2, 1, 3),
            ("lora", 1, 1, 1),
            ("updates", 2, 3, 1),
            ("cps", 2, 1, 1),
            ("lag 1", 2, 3, 1),
            ("full", 2, COLOCATED, 3),
        )
        for breakage in BREAKAGES
        if case[2] != COLOCATED or breakage is not keep_stale_weights  # there are no weights on their way
    ],
)
def test_a_broken_loop_does_not(bench, reference, tmp_path, monkeypatch, breakage, variant, ranks, rollouts, stage):
    config = bench.config(tmp_path / "run", variant, f"grpo.zero_stage={stage}")
    breakage(monkeypatch)
    broken = real_loop(bench, config, variant, ranks, rollouts)
    with pytest.raises(AssertionError):
        assert_equal(broken, reference(variant))


def test_the_loop_runs_forward_process_training_without_knowing(bench, tmp_path):
    nft = ["grpo.algorithm=nft", "grpo.nft.times=2", "grpo.steps=2", "grpo.epochs=2", "grpo.nft.kl=0.1"]
    config = bench.config(tmp_path / "run", "full", *nft)
    made = real_loop(bench, config, "nft", 2, 1)
    steps = [e for e in read_events(config.folder / "events.jsonl") if e["event"] == "step"]
    assert [step["updates"] for step in steps] == [2, 2]
    assert all("ratio" not in step and step["drift"] > 0 and step["kl"] >= 0 for step in steps)
    assert any((made.before[name] != made.after[name]).any() for name in made.before)


def test_the_loop_runs_with_guard_kl_own_log_probs_resampling_and_a_second_order_solver(bench, tmp_path):
    options = [
        "grpo.objective={guard: true, kl: 0.1, old_log_probs: recomputed, clip_range: 1e-4}", "grpo.steps=2",
        "grpo.minibatches=2", "grpo.resample=1", "grpo.sampling.schedule.solver=dpm2m", "rewards.advantage=gdpo",
    ]  # fmt: skip
    config = bench.config(tmp_path / "run", "lora", *options)
    made = real_loop(bench, config, "everything", 2, 1)
    steps = [e for e in read_events(config.folder / "events.jsonl") if e["event"] == "step"]
    assert [step["updates"] for step in steps] == [2, 2]
    assert all(step["first_ratio_error"] == 0 and step["kl"] >= 0 for step in steps)
    assert any((made.before[name] != made.after[name]).any() for name in made.before)


def test_stale_weights_stop_the_run_by_themselves(bench, tmp_path, monkeypatch):
    train = LearnerGroup.train
    keep_stale_weights(monkeypatch)
    monkeypatch.setattr(LearnerGroup, "train", train)
    with pytest.raises(NumericsError, match="step 2, the first ratio is off by"):
        real_loop(bench, bench.config(tmp_path / "run", "full"), "full", 1, 1)
