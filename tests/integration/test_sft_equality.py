"""Mixed-task SFT on two ranks takes the steps of a plain torch loop on the same batches."""

import functools
from dataclasses import replace

import pytest
import ray

from actors.engine import EngineConfig, OptimiserConfig
from actors.learner import Item, LearnerGroup
from common.errors import NumericsError
from policy.adapters import LoraConfig
from policy.dit import DitConfig
from policy.folder import starting_policy
from policy.programs import SftConfig, make_sft_program
from policy.weights import load_packed
from tests.integration.policies import (
    plain_sft_weights,
    relative_change,
    sft_batches,
    write_policy,
    write_sft_start,
)

pytestmark = pytest.mark.xdist_group("ray")

LR = 1e-3
STEPS = 3
MICRO_BATCHES = {1: 2, 3: 5}
"""By backward calls of the busier rank; with 5 the other rank has one less and repeats one with weight 0."""
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def factories(tmp_path_factory, real_dataset):
    """Makes of the same program, with all weights trained and with LoRA."""
    folder = tmp_path_factory.mktemp("sft")
    policy = write_policy(folder / "policy")
    vae_stage = write_sft_start(folder / "vae", policy, real_dataset)
    objective = SftConfig(prompt_dropout=0.5)
    return {
        lora: functools.partial(make_sft_program, DitConfig(), policy, lora, objective, vae_stage, real_dataset, 7)
        for lora in (None, LORA)
    }


@pytest.fixture(scope="module")
def reference(factories, real_dataset):
    """(batches, weights before, weights after) of the plain loop, by LoRA and backward calls; each computed once."""

    @functools.cache
    def get(lora, calls):
        batches = sft_batches(real_dataset, STEPS, MICRO_BATCHES[calls])
        return batches, *plain_sft_weights(factories[lora], batches, LR)

    return get


def trained(learner: LearnerGroup, make, steps, engine: EngineConfig):
    learner.setup(make, OptimiserConfig(lr=LR), engine, len(steps))
    for number, batches in enumerate(steps):
        items = [Item(batch, len(batch.draw.indices), 1.0, name=batch.draw.task) for batch in batches]
        learner.train(number, items)
    name, index, buffer = learner.publish()
    _, policy, lora, *_ = make.args
    model = starting_policy(policy, lora, 0)
    assert load_packed(model, index, ray.get(buffer)) == name
    return dict(model.state_dict())


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_mixed_tasks_move_the_weights_as_plain_torch_does(learners, factories, reference, stage, lora, calls):
    batches, before, after = reference(lora, calls)
    assert len({batch.draw.task for step in batches for batch in step}) > 1
    weights = trained(learners(2), factories[lora], batches, EngineConfig(zero_stage=stage))
    assert relative_change(before, weights, after) <= 1e-3


@pytest.mark.parametrize(("stage", "lora"), [(1, None), (3, LORA)], ids=["full", "lora-zero3"])
def test_recomputed_activations_move_the_weights_alike(learners, factories, reference, stage, lora):
    batches, before, after = reference(lora, 3)
    engine = EngineConfig(zero_stage=stage, gradient_checkpointing=True)
    assert relative_change(before, trained(learners(2), factories[lora], batches, engine), after) <= 1e-3


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_dropped_micro_batch_would_be_noticed(learners, factories, reference, lora):
    """The same comparison fails when one step of the learner loses one of its micro-batches."""
    batches, before, after = reference(lora, 3)
    dropped = [batches[0][:-1], *batches[1:]]
    assert relative_change(before, trained(learners(2), factories[lora], dropped, EngineConfig()), after) > 1e-2
    # Records lost between driver and loss do not even pass for a step.
    lost = replace(batches[0][0], draw=replace(batches[0][0].draw, indices=batches[0][0].draw.indices[:-1]))
    with pytest.raises(NumericsError, match="did not train on"):
        learners(2).train(0, [Item(lost, len(lost.draw.indices) + 1, 1.0)])
