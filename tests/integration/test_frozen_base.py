"""An adapter over a base that is kept in bfloat16: half the memory, and the same algorithm."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from actors.engine import EngineConfig, OptimiserConfig
from actors.learner import Item, LearnerGroup
from actors.rollout import RolloutActor, RolloutSetup
from data.records import RecordDataset
from pipeline.stage_config import GrpoStageConfig, SftStageConfig
from policy.adapters import LoraConfig, trained
from policy.folder import load_transformer, starting_policy
from policy.group import GroupRequest, GroupTrajectory
from policy.precision import computing
from policy.rl import GrpoConfig, Start
from policy.schedule import ScheduleConfig
from policy.weights import pack, unpack
from tests.integration.policies import KERNEL, SAMPLING, factory, relative_change, write_policy

LORA = LoraConfig(rank=4, base_dtype="bfloat16")
OBJECTIVE = GrpoConfig(clip_range=1e-3, kl=0.1)
OPTIMISER = OptimiserConfig(lr=1e-3)
STEPS = 2


@dataclass(frozen=True)
class Rolled:
    actor: RolloutActor
    groups: list[tuple[GroupTrajectory, np.ndarray]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def rolled(policy, real_dataset) -> Rolled:
    """Groups of an actor whose base is in bfloat16."""
    setup = RolloutSetup(Start(policy, LORA), real_dataset, 7, SAMPLING, KERNEL, precision="bfloat16")
    actor = RolloutActor(setup, threads=1)
    actor.load(0, *pack(trained(starting_policy(policy, LORA, 0).state_dict(), lora=True)))
    places, draw = RecordDataset(real_dataset, "train").positions("layer_decomposition"), np.random.default_rng(5)
    asked = [GroupRequest(step=1, group=k, index=int(places[k]), members=3) for k in range(3)]
    return Rolled(actor, [(actor.sample(request)[1], draw.standard_normal(3)) for request in asked])


def dtypes(model: torch.nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the frozen and of the trained weights."""
    frozen, moving = ([p.dtype for p in model.parameters() if p.requires_grad is flag] for flag in (False, True))
    return set(frozen), set(moving)


def test_the_base_is_kept_in_bfloat16_and_the_adapter_in_float32(policy, tmp_path):
    model = starting_policy(policy, LORA, seed=0)
    assert dtypes(model) == ({torch.bfloat16}, {torch.float32})
    program = factory(policy, OBJECTIVE, LORA)()
    program.export(tmp_path / "out", trained(program.module.state_dict(), lora=True))
    stored = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / stored).read_bytes() == (policy / stored).read_bytes()  # what rounds is never stored
    again = load_transformer(tmp_path / "out", "bfloat16").state_dict()
    assert {value.dtype for name, value in again.items() if "lora" in name} == {torch.float32}
    assert {value.dtype for name, value in again.items() if "lora" not in name} == {torch.bfloat16}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_all_zero_stages_train_the_adapter_as_plain_torch_does_from_a_first_ratio_of_exactly_one(
    policy, rolled, stage, ranks, own_learner
):
    program = factory(policy, OBJECTIVE, LORA)()
    before = {name: p.detach().clone() for name, p in program.module.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in program.module.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for _ in range(STEPS):
        optimiser.zero_grad()
        losses = []
        for micro in (micro for group in rolled.groups for micro in program.micro_batches(*group)):
            with computing("bfloat16"):  # one each, as autocast adds gradients up in bfloat16 within one
                losses.append(program.loss(program.module, micro))
        (torch.stack([loss.total for loss in losses]).sum() / sum(loss.count for loss in losses)).backward()
        torch.nn.utils.clip_grad_norm_(program.module.parameters(), 1.0)
        optimiser.step()
    after = {name: p.detach().clone() for name, p in program.module.named_parameters() if p.requires_grad}

    learner: LearnerGroup = own_learner(ranks)
    learner.setup(factory(policy, OBJECTIVE, LORA), OPTIMISER, EngineConfig(zero_stage=stage, precision="bfloat16"), 2)
    items = [
        Item(g, 3 * len(g.steps), float(len(g.steps)), len(g.steps), extra, str(k))
        for k, (g, extra) in enumerate(rolled.groups)
    ]
    first = learner.train(0, items, ratio_bound=0.0)
    assert first["max_ratio_error"] == 0.0
    learner.train(1, items)
    found = published(learner)
    # Of eight bits: where sums run in another order, last bits differ and Adam's first steps make much of them.
    assert relative_change(before, found, after) < 5e-3


def published(learner: LearnerGroup) -> dict[str, torch.Tensor]:
    import ray

    _, index, buffer = learner.publish()
    return dict(unpack(index, ray.get(buffer)))


@pytest.fixture(scope="module")
def own_learner(ray_cluster):
    """Learner groups by number of ranks; the same one serves all tests of a number."""
    from actors.cluster import ClusterConfig, RoleConfig

    groups: dict[int, LearnerGroup] = {}

    def group(ranks: int) -> LearnerGroup:
        if ranks not in groups:
            groups[ranks] = LearnerGroup(ClusterConfig(learner=RoleConfig(actors=ranks, cpus=1)))
        return groups[ranks]

    yield group
    for made in groups.values():
        made.close()


def test_an_evaluation_samples_on_the_base_that_was_trained_on(policy, rolled):
    name = rolled.actor.load_folder(policy)
    assert dtypes(rolled.actor._model)[0] == {torch.bfloat16}
    _, (shown,) = rolled.actor.generate("test", [0], ScheduleConfig(steps=2))
    assert np.isfinite(shown.layers_GLCHW).all()
    assert rolled.actor.load_folder(policy) == name


@pytest.mark.parametrize("stage", [SftStageConfig, GrpoStageConfig])
def test_a_base_in_bfloat16_without_products_in_bfloat16_is_refused(stage, policy):
    settings = {"start": policy, "lora": LORA, "steps": 1, "optimiser": OPTIMISER, "tasks": {"automatic_matting": 1}}
    assert stage(**settings, precision="bfloat16").lora == LORA
    with pytest.raises(ValidationError, match="set the stage's precision to bfloat16"):
        stage(**settings)
