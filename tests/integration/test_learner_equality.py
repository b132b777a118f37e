"""The distributed learner takes the very steps that a plain torch loop takes on the same groups."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.engine import EngineConfig, OptimiserConfig
from actors.learner import Item, LearnerGroup
from common.errors import CheckpointError, NumericsError
from policy.adapters import LoraConfig
from policy.folder import load_transformer, starting_policy
from policy.rl import GrpoConfig, NftConfig
from policy.weights import digest, load_packed, unpack
from tests.integration.policies import (
    OBJECTIVE,
    factory,
    plain_torch_weights,
    relative_change,
    rolled_out,
    write_policy,
)

pytestmark = pytest.mark.xdist_group("ray")

LR = 1e-3
STEPS = 5


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def steps(policy, real_dataset):
    """Five optimiser steps with ragged numbers of groups."""
    groups = rolled_out(policy, real_dataset, groups=6)
    return [groups[:3], groups[3:], groups[1:3], groups[2:6], groups[:5]]


@pytest.fixture(scope="module")
def reference(policy, steps):
    return plain_torch_weights(policy, steps, LR)


def items(groups) -> list[Item]:
    return [
        Item(
            ray.put(trajectory),
            count=advantages.size * len(trajectory.steps),
            cost=len(trajectory.text_TD),
            calls=2,
            extra=advantages,
        )
        for trajectory, advantages in groups
    ]


def train(learner: LearnerGroup, policy: Path, steps, stage: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
    make = factory(policy)
    learner.setup(make, OptimiserConfig(lr=LR), EngineConfig(zero_stage=stage), len(steps))
    records = [learner.train(number, items(groups)) for number, groups in enumerate(steps)]
    name, index, buffer = learner.publish()
    model = load_transformer(policy)
    assert load_packed(model, index, ray.get(buffer)) == name
    return dict(model.state_dict()), records


@pytest.mark.parametrize(
    ("objective", "lora", "stage"),
    [
        (GrpoConfig(clip_range=1e-3, guard=True), None, 1),
        (GrpoConfig(clip_range=1e-3, kl=10.0), None, 3),
        (GrpoConfig(clip_range=1e-3, kl=10.0, guard=True), LoraConfig(rank=4), 1),
        (GrpoConfig(clip_range=1e-3, kl=10.0), LoraConfig(rank=4), 3),
        (NftConfig(times=2), None, 1),
        (NftConfig(times=2, kl=1.0), LoraConfig(rank=4), 2),
    ],
    ids=["guard", "kl", "guard-kl-lora", "kl-lora-zero3", "nft", "nft-kl-lora"],
)
def test_every_objective_moves_the_weights_as_plain_torch_does(learners, policy, steps, objective, lora, stage):
    before, after = plain_torch_weights(policy, steps, LR, objective, lora)
    learner = learners(2)
    make = factory(policy, objective, lora)
    learner.setup(make, OptimiserConfig(lr=LR), EngineConfig(zero_stage=stage), len(steps))
    for number, groups in enumerate(steps):
        learner.begin_batch()
        record = learner.train(number, items(groups))
    assert ("kl" in record) == bool(objective.kl)
    name, index, buffer = learner.publish()
    model = starting_policy(policy, lora, 0)
    assert load_packed(model, index, ray.get(buffer)) == name
    moved = {key: value for key, value in model.state_dict().items() if key in before}
    assert relative_change(before, moved, after) <= 1e-3


@pytest.mark.parametrize("stage", [1, 3])
def test_in_bfloat16_the_first_ratio_is_exactly_one_where_both_sides_compute_in_it(
    learners, policy, real_dataset, steps, stage
):
    coarse = rolled_out(policy, real_dataset, groups=3, precision="bfloat16")
    fine = [trajectory.window_GWMCHW for trajectory, _ in steps[0]]
    assert not any(np.array_equal(group.window_GWMCHW, other) for (group, _), other in zip(coarse, fine, strict=False))
    learner = learners(2)
    learner.setup(factory(policy), OptimiserConfig(lr=LR), EngineConfig(zero_stage=stage, precision="bfloat16"), 1)
    assert learner.recompute(items(coarse))[1] == 0.0
    assert learner.train(0, items(coarse), ratio_bound=0.0)["max_ratio_error"] == 0.0
    # In float32 the same rollouts are those of another policy.
    learner.setup(factory(policy), OptimiserConfig(lr=LR), EngineConfig(zero_stage=stage), 1)
    with pytest.raises(NumericsError, match="the first ratio is off by"):
        learner.train(0, items(coarse), ratio_bound=1e-6)


def test_a_first_ratio_beyond_its_bound_stops_before_the_step_and_says_by_how_much(learners, policy, steps):
    learner, groups = learners(1), items(steps[0])
    learner.setup(factory(policy), OptimiserConfig(lr=LR), EngineConfig(zero_stage=1), 2)
    learner.train(0, groups, 1e-6)
    moved, _, _ = learner.publish()
    with pytest.raises(NumericsError, match=r"step 2, the first ratio is off by \d.*bound 1.0e-06, and nothing was"):
        learner.train(1, groups, 1e-6)
    assert learner.publish()[0] == moved


@pytest.mark.parametrize(
    ("objective", "lora", "stage", "ema"),
    [
        (GrpoConfig(clip_range=1e-3, kl=10.0), LoraConfig(rank=4), 1, 0.5),
        (GrpoConfig(clip_range=1e-3, kl=10.0), LoraConfig(rank=4), 3, 0.0),
        (GrpoConfig(clip_range=1e-3, kl=10.0), None, 2, 0.0),
        (NftConfig(times=2), LoraConfig(rank=4), 0, 0.0),
        (NftConfig(times=2), None, 3, 0.0),
    ],
    ids=["kl-lora-ema", "kl-lora-zero3", "kl-full-zero2", "nft-lora-zero0", "nft-full-zero3"],
)
def test_a_resumed_learner_takes_the_steps_of_an_uninterrupted_one(
    learners, policy, steps, tmp_path, objective, lora, stage, ema
):
    learner, make = learners(2), factory(policy, objective, lora)
    engine = EngineConfig(zero_stage=stage, ema=ema)

    def advance(numbers) -> None:
        for number in numbers:
            learner.begin_batch()
            learner.train(number, items(steps[number]))

    learner.setup(make, OptimiserConfig(lr=LR), engine, 4)
    advance([0, 1])
    learner.save(tmp_path)
    advance([2, 3])
    expected = learner.publish()[0]
    learner.export(tmp_path / "through")
    learner.setup(make, OptimiserConfig(lr=LR), engine, 4)
    assert learner.publish()[0] != expected
    learner.restore(tmp_path)
    advance([2, 3])
    assert learner.publish()[0] == expected
    learner.export(tmp_path / "resumed")
    handed_on = (digest(load_transformer(tmp_path / name).state_dict()) for name in ("through", "resumed"))
    assert len(set(handed_on)) == 1


@pytest.mark.parametrize(
    ("objective", "lora", "written", "resumed", "ema"),
    [
        (OBJECTIVE, None, (2, 0), (1, 0), 0.0),
        (OBJECTIVE, None, (1, 1), (2, 1), 0.5),
        (OBJECTIVE, None, (2, 2), (1, 2), 0.0),
        (OBJECTIVE, None, (2, 3), (1, 3), 0.5),
        (OBJECTIVE, None, (1, 3), (2, 3), 0.0),
        (OBJECTIVE, LoraConfig(rank=4), (2, 1), (1, 1), 0.5),
        (OBJECTIVE, LoraConfig(rank=4), (1, 2), (2, 2), 0.0),
        (OBJECTIVE, LoraConfig(rank=4), (1, 3), (2, 3), 0.5),
        (OBJECTIVE, LoraConfig(rank=4), (2, 3), (1, 0), 0.0),
        (OBJECTIVE, None, (1, 0), (2, 3), 0.0),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_training_goes_on_with_another_number_of_ranks_or_zero_stage(
    learners, policy, steps, tmp_path, objective, lora, written, resumed, ema
):
    """(ranks, ZeRO stage) that wrote the state, and that go on from it."""
    make = factory(policy, objective, lora)

    def start(ranks: int, stage: int) -> LearnerGroup:
        learner = learners(ranks)
        learner.setup(make, OptimiserConfig(lr=LR), EngineConfig(zero_stage=stage, ema=ema), 4)
        return learner

    def advance(learner: LearnerGroup, numbers) -> None:
        for number in numbers:
            learner.begin_batch()
            learner.train(number, items(steps[number]))

    def weights(learner: LearnerGroup) -> dict[str, torch.Tensor]:
        _, index, buffer = learner.publish()
        return dict(unpack(index, ray.get(buffer)))

    def handed_on(learner: LearnerGroup, name: str) -> dict[str, torch.Tensor]:
        learner.export(tmp_path / name)
        return dict(load_transformer(tmp_path / name).state_dict())

    through = start(*written)
    advance(through, [0, 1])
    through.save(tmp_path)
    saved, before = weights(through), handed_on(through, "saved")
    advance(through, [2, 3])
    expected, averaged = weights(through), handed_on(through, "through")

    learner = start(*resumed)
    learner.restore(tmp_path)
    assert digest(weights(learner)) == digest(saved)
    advance(learner, [2, 3])
    assert relative_change(saved, weights(learner), expected) <= 1e-5
    assert relative_change(before, handed_on(learner, "resumed"), averaged) <= 1e-5


def test_a_commit_of_an_earlier_version_resumes_with_its_number_of_ranks_and_is_refused_with_another(
    learners, policy, steps, tmp_path
):
    """Earlier versions committed DeepSpeed's own checkpoint."""
    engine, learner = EngineConfig(zero_stage=1), learners(2)
    learner.setup(factory(policy), OptimiserConfig(lr=LR), engine, 4)
    learner.train(0, items(steps[0]))
    folder = str(tmp_path)
    ray.get(
        [
            rank.__ray_call__.remote(lambda self: self._engine.engine.save_checkpoint(folder, "engine", {}, False))
            for rank in learner._ranks
        ]
    )
    learner.train(1, items(steps[1]))
    expected = learner.publish()[0]
    learner.setup(factory(policy), OptimiserConfig(lr=LR), engine, 4)
    learner.restore(tmp_path)
    learner.train(1, items(steps[1]))
    assert learner.publish()[0] == expected
    other = learners(1)
    other.setup(factory(policy), OptimiserConfig(lr=LR), engine, 4)
    with pytest.raises(CheckpointError, match="an earlier version wrote it: resume with the number of learner ranks"):
        other.restore(tmp_path)


def test_old_log_probs_can_be_the_learners_own(learners, policy, steps):
    learner, groups = learners(2), items(steps[3])
    learner.setup(factory(policy), OptimiserConfig(lr=LR), EngineConfig(zero_stage=3), 2)
    _, delivered = learner.recompute(groups)
    assert delivered == 0.0  # the learner still holds the policy that sampled the groups
    learner.train(0, groups)
    fresh, error = learner.recompute(groups)
    assert error > 0.0
    assert learner.train(1, fresh)["max_ratio_error"] == 0.0


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_ranks_move_the_weights_as_plain_torch_does(learners, policy, steps, reference, ranks, stage):
    before, after = reference
    weights, records = train(learners(ranks), policy, steps, stage)
    assert relative_change(before, weights, after) <= 1e-3
    assert records[0]["max_ratio_error"] == 0.0  # the replay of the rollout's own policy is exact
    assert records[1]["max_ratio_error"] > 0.0  # and is not once the policy has moved


def test_one_rank_and_two_move_the_weights_alike(learners, policy, steps, reference):
    before, _ = reference
    one, _ = train(learners(1), policy, steps, 1)
    two, _ = train(learners(2), policy, steps, 1)
    assert relative_change(before, two, one) <= 1e-3


def test_a_dropped_micro_batch_would_be_noticed(learners, policy, steps, reference):
    """The same comparison fails when one group of one step loses its last micro-batch."""
    before, after = reference
    trajectory, advantages = steps[0][0]
    broken = trajectory.__class__(**{**trajectory.__dict__, "steps": trajectory.steps[:-1]})
    dropped = [[(broken, advantages), *steps[0][1:]], *steps[1:]]
    weights, _ = train(learners(2), policy, dropped, 1)
    assert relative_change(before, weights, after) > 1e-2
    # Through the product's own accounting the same loss of a micro-batch cannot even finish a step.
    lost = [Item(ray.put(broken), advantages.size * 2, 1.0, calls=2, extra=advantages)]
    with pytest.raises(NumericsError, match="did not train on"):
        learners(2).train(0, lost)


def test_ranks_without_work_take_part_with_weight_zero(learners, policy, steps, reference):
    single = [groups[:1] for groups in steps]
    before, after = plain_torch_weights(policy, single, LR)
    weights, _ = train(learners(2), policy, single, 1)
    assert relative_change(before, weights, after) <= 1e-3


def test_terms_lost_between_driver_and_loss_stop_the_run(learners, policy, steps):
    make = factory(policy)
    learner = learners(1)
    learner.setup(make, OptimiserConfig(lr=LR), EngineConfig(zero_stage=1), 1)
    trajectory, advantages = steps[0][0]
    with pytest.raises(NumericsError, match="step 1: the ranks did not train on the 99 terms"):
        learner.train(0, [Item(ray.put(trajectory), count=99, cost=1.0, calls=2, extra=advantages)])


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_group(learners, policy, steps):
    make = factory(policy)
    learner = learners(1)
    learner.setup(make, OptimiserConfig(lr=LR), EngineConfig(zero_stage=1), 1)
    trajectory, advantages = steps[0][0]
    with pytest.raises(NumericsError, match=r"step 1, group 7\.3: loss is inf before the optimiser step"):
        learner.train(0, [Item(ray.put(trajectory), 6, 1.0, calls=2, extra=advantages - np.inf, name="group 7.3")])
    name, _, _ = learner.publish()
    assert name == digest(load_transformer(policy).state_dict())


def test_a_member_without_score_is_left_out_of_loss_and_count(learners, policy, steps):
    trajectory, advantages = steps[0][0]
    marked = advantages.copy()
    marked[1] = np.nan
    before, after = plain_torch_weights(policy, [[(trajectory, marked)]], LR)
    make = factory(policy)
    learner = learners(1)
    learner.setup(make, OptimiserConfig(lr=LR), EngineConfig(zero_stage=1), 1)
    learner.train(0, [Item(ray.put(trajectory), count=4, cost=1.0, calls=2, extra=marked)])
    _, index, buffer = learner.publish()
    model = load_transformer(policy)
    load_packed(model, index, ray.get(buffer))
    assert relative_change(before, dict(model.state_dict()), after) <= 1e-3
