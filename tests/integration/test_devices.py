"""Actors and programs on a device other than the CPU: all of it lies where it has to, and numbers are the CPU's."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import actors.learner
import actors.reward
import actors.rollout
from actors.colocated import ColocatedRank
from actors.devices import own_device
from actors.learner import LearnerRank
from actors.reward import RewardActor
from actors.rollout import RolloutActor, RolloutSetup
from common.errors import ClusterError
from data.records import RecordDataset
from data.sampler import Draw
from policy.adapters import LoraConfig
from policy.dit import DitConfig, build_dit
from policy.folder import load_transformer, starting_policy
from policy.group import GroupRequest, Recording
from policy.latents import encode_records, split_work
from policy.perceptual import PerceptualDistance
from policy.programs import Batch, Program, SftConfig, SftProgram
from policy.rl import GrpoConfig, GrpoProgram, NftConfig, Start
from policy.schedule import ScheduleConfig
from policy.text import TEXT_DIM
from policy.vae import build_vae
from policy.vae_program import VaeLossConfig, VaeProgram
from policy.weights import digest, pack
from rewards.base import build, reward_batch, run_scorer
from rewards.combine import RewardConfig, TermConfig
from tests.integration.policies import KERNEL, SAMPLING, VAE, factory, relative_change, write_policy, write_sft_start
from tests.pretended_device import pretended_device

TERMS = tuple(TermConfig(name=name) for name in ("layer", "boundary", "composition", "background"))
LORA = LoraConfig(rank=2)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended_device() as device:
        yield device


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


def setup(policy, dataset) -> RolloutSetup:
    return RolloutSetup(Start(policy), dataset, 7, SAMPLING, KERNEL, recording=Recording(means=True))


def request(dataset, task: str = "layer_decomposition") -> GroupRequest:
    index = int(RecordDataset(dataset, "train").positions(task)[0])
    return GroupRequest(step=1, group=0, index=index, members=2)


def published(policy) -> tuple:
    return 0, *pack(load_transformer(policy).state_dict())


def step(program: Program, loss: Callable[[], list]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of the losses, and the gradients brought back."""
    program.module.zero_grad()
    total = torch.stack([found.total for found in loss()]).sum()
    total.backward()
    return float(total.detach()), {
        name: p.grad.detach().cpu() for name, p in program.module.named_parameters() if p.grad is not None
    }


def assert_same(here: tuple, there: tuple) -> None:
    assert here[0] == pytest.approx(there[0], rel=1e-6)
    assert here[1].keys() == there[1].keys()
    assert here[1]
    assert relative_change({name: torch.zeros(()) for name in here[1]}, there[1], here[1]) < 1e-4


def test_the_device_of_the_tests_refuses_what_a_gpu_refuses(device):
    here, there = torch.ones(2), torch.ones(2, device=device)
    assert there.device.type == (there + there).device.type == device.type
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="one tensor is on elsewhere:0 and another on cpu"):
        here + there
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()


def test_a_rollout_actor_on_a_device_samples_the_groups_of_one_on_the_cpu(policy, real_dataset, device, monkeypatch):
    here = RolloutActor(setup(policy, real_dataset), threads=1)
    monkeypatch.setattr(actors.rollout, "own_device", lambda gpus: device)
    there = RolloutActor(setup(policy, real_dataset), threads=1, gpus=1.0)
    assert there._model.device == device
    assert here.load(*published(policy)) == there.load(*published(policy))
    for task in ("text_to_rgba", "referring_matting", "layer_decomposition"):
        (_, a, first), (_, b, second) = (actor.sample(request(real_dataset, task)) for actor in (here, there))
        for name in ("inputs_NCHW", "text_TD", "window_GWMCHW", "log_probs_GW", "clean_GMCHW", "means_GWMCHW"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(first.layers_GLCHW, second.layers_GLCHW, atol=1e-5)
    shown = [actor.generate("test", [0], ScheduleConfig(steps=2))[1][0].layers_GLCHW for actor in (here, there)]
    np.testing.assert_allclose(*shown, atol=1e-5)
    assert there.load_folder(policy) == here.load_folder(policy)
    assert there._model.device == device


def test_a_sampler_with_somebodys_model_leaves_the_device_with_all_else_and_samples_the_same_when_it_is_back(
    policy, real_dataset, device, monkeypatch
):
    monkeypatch.setattr(actors.rollout, "own_device", lambda gpus: device)
    trained = starting_policy(policy, None, 0).to(device)
    sampler = RolloutActor(setup(policy, real_dataset), 1, 1.0, trained)
    sampler.adopt(trained, 4)
    meta, first, _ = sampler.sample(request(real_dataset, "referring_matting"))
    assert meta.version == 4
    sampler.move(torch.device("cpu"))
    assert sampler._codec.device.type == "cpu"
    assert trained.device == device
    assert all(parameter.requires_grad for parameter in trained.parameters())
    sampler.move(device)
    _, second, _ = sampler.sample(request(real_dataset, "referring_matting"))
    np.testing.assert_array_equal(first.clean_GMCHW, second.clean_GMCHW)


@pytest.mark.parametrize("offload", [False, True])
def test_a_rank_that_samples_has_the_device_to_itself_while_it_trains_where_that_is_asked_for(
    policy, real_dataset, device, monkeypatch, offload
):
    monkeypatch.setattr(actors.rollout, "own_device", lambda gpus: device)
    monkeypatch.setattr(actors.learner, "own_device", lambda gpus: device)
    trained = starting_policy(policy, None, 0).to(device)
    rank = ColocatedRank(0, 1, 1.0, offload)
    rank._engine = SimpleNamespace(engine=trained, module=trained)  # DeepSpeed knows no such device
    meanwhile = list[str]()
    monkeypatch.setattr(LearnerRank, "train", lambda self, *_: meanwhile.append(self._sampler._codec.device.type))
    asked = request(real_dataset, "referring_matting")
    first, second = (
        (rank.sample(setup(policy, real_dataset), asked, version)[1], rank.train(None))[0] for version in (0, 1)
    )
    assert meanwhile == ["cpu" if offload else device.type] * 2
    np.testing.assert_array_equal(first.clean_GMCHW, second.clean_GMCHW)


def test_a_rank_that_samples_holds_nothing_of_what_it_trained_while_it_loads_a_policy(
    policy, real_dataset, monkeypatch
):
    rank = ColocatedRank(0, 1)
    trained = starting_policy(policy, None, 0)
    rank._engine = SimpleNamespace(engine=trained, module=trained)
    trained.destroy = lambda: None
    rank.sample(setup(policy, real_dataset), request(real_dataset), 0)
    held, there = weakref.ref(trained), list[bool]()
    del trained

    def load(*arguments):
        gc.collect()
        there.append(held() is not None)
        return load_transformer(*arguments)

    monkeypatch.setattr(actors.rollout, "load_transformer", load)
    name = rank.load_folder(setup(policy, real_dataset), policy)
    assert there == [False]
    assert name == ColocatedRank(0, 1).load_folder(setup(policy, real_dataset), policy)
    assert len(rank.generate(setup(policy, real_dataset), "test", [0], ScheduleConfig(steps=2), -1)[1]) == 1


def test_a_reward_actor_on_a_device_scores_as_one_on_the_cpu(policy, real_dataset, device, monkeypatch):
    actor = RolloutActor(setup(policy, real_dataset), threads=1)
    actor.load(*published(policy))
    _, _, pixels = actor.sample(request(real_dataset))
    config = RewardConfig(terms=TERMS)
    here = RewardActor(config, threads=1)
    monkeypatch.setattr(actors.reward, "own_device", lambda gpus: device)
    there = RewardActor(config, threads=1, gpus=0.5)
    for a, b in zip(here.score(pixels), there.score(pixels), strict=True):
        assert a.reasons == b.reasons == (None, None)
        np.testing.assert_allclose(a.values_G, b.values_G, rtol=1e-6)
    single = replace(pixels, layers_GLCHW=pixels.layers_GLCHW[:1])
    assert [m.metrics for m in here.measure([single], True)] == [m.metrics for m in there.measure([single], True)]


def test_scorers_with_networks_of_their_own_follow_the_layers(policy, real_dataset, device, tiny_clip):
    actor = RolloutActor(setup(policy, real_dataset), threads=1)
    actor.load(*published(policy))
    _, _, pixels = actor.sample(request(real_dataset, "referring_matting"))
    for name, params in (("prompt_fidelity", {}), ("clip", {"folder": tiny_clip}), ("background", {})):
        if name == "background":
            _, _, pixels = actor.sample(request(real_dataset, "object_removal"))
        scorer = build(name, params)
        here, there = (run_scorer(name, scorer, reward_batch(pixels, where)) for where in ("cpu", device))
        assert there.reasons == (None, None)
        np.testing.assert_allclose(here.values_G, there.values_G, rtol=1e-6)


OBJECTIVES = {
    "clipped": (GrpoConfig(clip_range=1e-3), None),
    "guarded, with KL to a frozen copy": (GrpoConfig(clip_range=1e-3, guard=True, kl=0.1), None),
    "an adapter, with KL": (GrpoConfig(clip_range=1e-3, kl=0.1), LORA),
    "forward process, with KL": (NftConfig(times=2, kl=0.1), None),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rl_programs_on_a_device_give_the_losses_and_gradients_of_the_cpu(name, policy, real_dataset, device):
    objective, lora = OBJECTIVES[name]
    actor = RolloutActor(replace(setup(policy, real_dataset), recording=replace(objective.recording, means=True)), 1)
    actor.load(*published(policy))
    _, group, _ = actor.sample(request(real_dataset))
    found = []
    for where in ("cpu", device):
        program = factory(policy, objective, lora)()
        program.place(torch.device(where))
        assert program.module.device == torch.device(where)
        micros = program.micro_batches(group, np.array([1.0, -0.5]))
        found.append(step(program, lambda made=program, micros=micros: [made.loss(made.module, m) for m in micros]))
        if isinstance(program, GrpoProgram):
            again, error = program.recompute(program.module, group)
            np.testing.assert_allclose(again.log_probs_GW, group.log_probs_GW, rtol=1e-6)
            assert error < 1e-6
    assert_same(*found)


def test_sft_on_a_device_gives_the_losses_and_gradients_of_the_cpu(policy, real_dataset, device, tmp_path):
    stage, data = write_sft_start(tmp_path / "vae", policy, real_dataset), RecordDataset(real_dataset, "train")
    batches = [
        Batch(position, Draw(task, data.positions(task)[:2]))
        for position, task in enumerate(("text_to_rgba", "referring_matting", "layer_decomposition"))
    ]
    for sight in (False, True):
        found, pictures = [], []
        for where in ("cpu", device):
            network = DitConfig(layers=1, heads=2, head_dim=12, rope_axes=(4, 4, 4), sight=sight)
            transformer = build_dit(network, 4, TEXT_DIM, seed=2)
            torch.nn.init.ones_(transformer.proj_out.weight)
            program = SftProgram(transformer, SftConfig(prompt_dropout=0.5), stage, real_dataset, seed=1)
            program.place(torch.device(where))
            found.append(step(program, lambda made=program: [made.loss(made.module, batch) for batch in batches]))
            pictures.append(program.draw(program.module, [0, 1], ScheduleConfig(steps=2)).tobytes())
        assert_same(*found)
        assert pictures[0] == pictures[1]


def test_the_vae_on_a_device_gives_the_losses_and_gradients_of_the_cpu(real_dataset, device):
    config = VaeLossConfig(reference=0.1, perceptual=0.1, adversarial=0.1)
    micro = Batch(
        0, Draw("layer_decomposition", RecordDataset(real_dataset, "train").positions("layer_decomposition")[:2])
    )
    for channels in (4, 3):
        found = []
        for where in ("cpu", device):
            program = VaeProgram(build_vae(VAE, 1, channels), config, real_dataset, seed=0)
            program.place(torch.device(where))
            found.append(step(program, lambda made=program: [made.loss(made.module, micro)]))
        assert_same(*found)


def test_latents_encoded_on_a_device_are_those_of_the_cpu(policy, real_dataset, device, tmp_path):
    data = RecordDataset(real_dataset, "train")
    ((indices, owned),) = split_work(data, 1)
    files = [tmp_path / "here.safetensors", tmp_path / "there.safetensors"]
    sums = [
        encode_records(policy, data, indices[:4], owned, path, where)
        for path, where in zip(files, ("cpu", device), strict=True)
    ]
    torch.testing.assert_close(sums[0].sum_C, sums[1].sum_C, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(load_file(path)["latents"] for path in files))


def test_weights_on_a_device_are_packed_and_named_like_those_in_host_memory(policy, device):
    here = load_transformer(policy)
    name, (index, buffer) = digest(here.state_dict()), pack(here.state_dict())
    there = here.to(device)
    assert digest(there.state_dict()) == name
    again, same = pack(there.state_dict())
    assert again == index
    np.testing.assert_array_equal(same, buffer)


def test_the_perceptual_distance_is_measured_where_the_images_lie(device):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distance = PerceptualDistance()
    there = distance.paired(images.to(device), images.flip(0).to(device))
    assert there.device == device
    torch.testing.assert_close(there.cpu(), distance.paired(images, images.flip(0)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_a_gpu_that_torch_cannot_use_is_named_with_the_node_and_the_remedy(ray_cluster):
    assert own_device(0.0) == torch.device("cpu")
    with pytest.raises(
        ClusterError, match=r"node .*: an actor has reserved 0.5 GPUs and torch .* can use none; install"
    ):
        own_device(0.5)
