import pytest
import torch
from tiny_models import CHANNELS, live_dit, measured_vae

from common.errors import CheckpointError, ConfigError, NumericsError
from data.tasks import TASKS, get_task
from policy.adapters import LoraConfig, add_lora, save_adapter, trained
from policy.folder import load_transformer, load_vae, save_policy, save_vae
from policy.infer import InferConfig, Policy
from policy.sampling import Condition, denoise, member_noise
from policy.schedule import ScheduleConfig
from policy.text import TEXT_DIM
from policy.vae import LatentCodec

SIZE = 16
STEPS = ScheduleConfig(steps=3)
PROMPT = "Cut out a red apple."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    save_policy(path, measured_vae(), live_dit(text_dim=TEXT_DIM))
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return Policy(folder)


def pictures(task, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, SIZE, SIZE, generator=generator) for _ in get_task(task).inputs]


def sample(policy, task="mask_matting", prompt=PROMPT, inputs=None, **settings):
    config = InferConfig(**({"schedule": STEPS, "size": SIZE} | settings))
    return policy.infer(get_task(task), pictures(task) if inputs is None else inputs, prompt, config)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_its_layers_in_the_unit_range(policy, task):
    layers = sample(policy, task, count=2)
    assert layers.shape == (2, len(get_task(task).targets), 4, SIZE, SIZE)
    assert layers.min() >= 0
    assert layers.max() <= 1
    assert layers.std() > 0.01


@pytest.mark.parametrize("solver", ["euler", "dpm2m"])
def test_a_sample_is_the_ode_from_noise_under_the_encoded_condition(folder, policy, text_encoder, solver):
    schedule = ScheduleConfig(steps=4, shift=2.0, solver=solver)
    inputs = pictures("mask_matting")
    codec = LatentCodec(load_vae(folder))
    latents = torch.stack([codec.encode(image[None])[0] for image in inputs])
    initial = member_noise((1, CHANNELS, SIZE // 2, SIZE // 2), 5, 0, 0, 0, "sample")[None]
    condition = Condition(latents[None], text_encoder.encode(PROMPT)[None])
    model = load_transformer(folder).eval()
    expected = denoise(model, condition, initial, schedule.sigmas(), solver=solver).latents_BMCHW
    got = sample(policy, inputs=inputs, schedule=schedule, seed=5)
    torch.testing.assert_close(got[0], codec.decode(expected[0]), atol=1e-5, rtol=1e-4)


def test_the_seed_decides_and_a_sample_does_not_depend_on_how_many_are_drawn(policy):
    three = sample(policy, seed=4, count=3)
    assert torch.equal(sample(policy, seed=4, count=2), three[:2])
    assert not torch.equal(sample(policy, seed=5), three[:1])
    assert not torch.equal(three[0], three[1])


def test_prompt_inputs_steps_and_shift_all_matter(policy):
    base = sample(policy)
    assert not torch.equal(sample(policy, prompt="Cut out a bus."), base)
    assert not torch.equal(sample(policy, inputs=pictures("mask_matting", seed=1)), base)
    assert not torch.equal(sample(policy, inputs=pictures("mask_matting")[::-1]), base)
    assert not torch.equal(sample(policy, schedule=ScheduleConfig(steps=4)), base)
    assert not torch.equal(sample(policy, schedule=ScheduleConfig(steps=3, shift=1.0)), base)


def test_the_adapter_of_the_folder_takes_part(tmp_path, policy):
    model, lora = live_dit(text_dim=TEXT_DIM), LoraConfig(rank=2)
    save_policy(tmp_path, measured_vae(), model)
    add_lora(model, lora, seed=0)
    weights = {name: torch.full_like(value, 0.05) for name, value in trained(model.state_dict(), lora=True).items()}
    save_adapter(tmp_path, weights, lora)
    assert not torch.allclose(sample(Policy(tmp_path)), sample(policy), atol=1e-3)


def test_a_size_that_does_not_split_into_patches_is_refused_with_the_multiple(folder, policy):
    with pytest.raises(ConfigError, match=r"size 18 must be a multiple of 4 \(VAE factor 2 x patch 2\) for"):
        sample(policy, size=18)
    assert policy.patch == 4


@pytest.mark.parametrize("inputs", [[], [torch.zeros(4, SIZE, SIZE)], [torch.zeros(4, SIZE, SIZE * 2)] * 2])
def test_inputs_that_do_not_fit_the_task_or_the_size_are_refused(policy, inputs):
    with pytest.raises(ConfigError, match=r"mask_matting takes 2 images \(image, mask\), each \(4, 16, 16\); got"):
        sample(policy, inputs=inputs)


def test_a_folder_without_a_policy_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no vae/ here"):
        Policy(tmp_path / "nowhere")
    save_vae(tmp_path, measured_vae())
    with pytest.raises(CheckpointError, match="no transformer/ here"):
        Policy(tmp_path)


def test_a_model_that_gives_no_numbers_is_an_error_not_a_picture(tmp_path):
    broken = live_dit(text_dim=TEXT_DIM)
    with torch.no_grad():
        broken.proj_out.bias[0] = float("nan")
    save_policy(tmp_path, measured_vae(), broken)
    with pytest.raises(NumericsError, match="values that are not numbers"):
        sample(Policy(tmp_path))
