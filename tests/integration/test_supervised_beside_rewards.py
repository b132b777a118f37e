"""SFT's loss beside the policy's: one optimiser step on their weighted sum, however it is spread over ranks."""

import functools
from dataclasses import replace

import pytest
import ray
import torch

from actors.engine import EngineConfig, OptimiserConfig
from actors.learner import Item
from common.errors import CheckpointError, ConfigError
from pipeline.config import load_config
from pipeline.run import Run
from pipeline.train import supervised_items, supervised_program
from policy.adapters import LoraConfig
from policy.folder import starting_policy
from policy.programs import SftConfig, SftProgram
from policy.rl import GrpoConfig, NftConfig, Start
from policy.weights import load_packed
from tests.integration.policies import factory, relative_change, rolled_out, sft_batches, write_policy, write_sft_start

pytestmark = pytest.mark.xdist_group("ray")

LR, WEIGHT, RECORDS = 1e-3, 0.3, 2
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def given(tmp_path_factory, real_dataset):
    """(policy, its SFT program round a transformer, groups, batches of records for three steps)."""
    folder = tmp_path_factory.mktemp("supervised")
    policy = write_policy(folder / "policy")
    vae_stage = write_sft_start(folder / "vae", policy, real_dataset)
    beside = functools.partial(
        SftProgram, config=SftConfig(), vae_stage=vae_stage, dataset=real_dataset, seed=7, start=policy
    )
    groups = rolled_out(policy, real_dataset, 3)
    return policy, beside, [groups] * 3, sft_batches(real_dataset, 3, 3, RECORDS)


def plain(policy, beside, steps, batches, objective, lora):
    """The loop without Ray, DeepSpeed or a combined program: a mean of one loss and a mean of the other."""
    program = factory(policy, objective, lora)()
    module = program.module
    supervised = beside(module, lora=lora)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
    for groups, step in zip(steps, batches, strict=True):
        program.begin_batch(lambda: {name: p.detach().clone() for name, p in trained.items()})
        losses = [program.group_loss(module, micro) for group in groups for micro in program.micro_batches(*group)]
        right = [supervised.loss(module, batch) for batch in step]
        total = sum(loss.total for loss in losses) / sum(loss.count for loss in losses)
        total = total + WEIGHT * sum(loss.total for loss in right) / sum(loss.count for loss in right)
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
    return before, {name: p.detach().clone() for name, p in trained.items()}, float(total.detach())


@pytest.mark.parametrize(
    ("ranks", "stage", "objective", "lora"),
    [
        (1, 1, GrpoConfig(clip_range=1e-3), None),
        (2, 2, GrpoConfig(clip_range=1e-3), None),
        (2, 3, GrpoConfig(clip_range=1e-3), LORA),
        (2, 1, NftConfig(times=2), None),
    ],
    ids=["one", "two-zero2", "two-zero3-lora", "two-nft"],
)
def test_the_weighted_sum_of_both_losses_moves_the_weights_as_plain_torch_does(
    learners, given, ranks, stage, objective, lora
):
    policy, beside, steps, batches = given
    before, after, last = plain(policy, beside, steps, batches, objective, lora)
    make = factory(policy, objective, lora)
    learner = learners(ranks)
    learner.setup(
        functools.partial(make, supervised=functools.partial(beside, lora=lora)),
        OptimiserConfig(lr=LR),
        EngineConfig(zero_stage=stage),
        3,
    )
    for number, (groups, step) in enumerate(zip(steps, batches, strict=True)):
        learner.begin_batch()
        terms = [advantages.size * len(trajectory.steps) for trajectory, advantages in groups]
        items = [
            Item(ray.put(trajectory), count, cost=1.0, calls=len(trajectory.steps), extra=advantages)
            for (trajectory, advantages), count in zip(groups, terms, strict=True)
        ]
        share = WEIGHT * sum(terms) / (RECORDS * len(step))
        record = learner.train(number, [*items, *(Item(batch, 0, 1.0, extra=share) for batch in step)])
    name, index, buffer = learner.publish()
    model = starting_policy(policy, lora, 0)
    assert load_packed(model, index, ray.get(buffer)) == name
    assert relative_change(before, dict(model.state_dict()), after) <= 1e-3
    assert record["loss"] == pytest.approx(last, rel=1e-3)
    assert 0 < record["supervised"] < record["loss"] + 1


def test_without_the_records_the_weights_move_elsewhere(given):
    policy, beside, steps, batches = given
    before, both, _ = plain(policy, beside, steps, batches, GrpoConfig(clip_range=1e-3), None)
    nobody = [[replace(batch) for batch in step] for step in reversed(batches)]
    _, other, _ = plain(policy, beside, steps, nobody, GrpoConfig(clip_range=1e-3), None)
    assert relative_change(before, other, both) > 1e-2


def test_records_go_on_where_sft_ended_and_weigh_what_the_config_says(real_dataset, tmp_path):
    folders = [f"run_dir={tmp_path}", f"dataset={real_dataset}", "tracking.wandb=disabled"]
    config = load_config("tiny", [*folders, "grpo.supervised={weight: 0.5, micro_batches: 3}"])
    run = Run(config)
    try:
        groups = [Item(None, 12, cost=80.0, calls=4), Item(None, 8, cost=40.0, calls=2)]
        first, second = (supervised_items(run, update, groups) for update in (0, 1))
        with pytest.raises(CheckpointError, match=r"stage 'grpo\.supervised' needs the result of 'vae'"):
            supervised_program(run, Start(tmp_path / "policy"))
    finally:
        run.close()
    trained = config.sft.steps * config.sft.micro_batches
    assert [item.payload.position for item in (*first, *second)] == list(range(trained, trained + 6))
    assert all(item.count == 0 and item.calls == 1 for item in first)
    assert sum(item.extra * config.sft.micro_batch for item in first) == pytest.approx(0.5 * 20)
    assert {item.cost for item in first} == {20.0 * config.sft.micro_batch / config.grpo.group}


def test_a_policy_from_elsewhere_cannot_be_shown_this_runs_latents(tmp_path):
    with pytest.raises(ConfigError, match="supervised takes the latents of this run's own VAE stage"):
        load_config("tiny", [f"grpo.start={tmp_path}", "grpo.supervised={weight: 0.5}"])
