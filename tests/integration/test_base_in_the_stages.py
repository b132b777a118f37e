"""A real base, tiny, under the programs of the stages: SFT on cached latents and conditions, export, rollouts."""

import numpy as np
import pytest
import torch
import yaml
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image

from actors.rollout import RolloutActor, RolloutSetup
from common.commit import begin, commit
from common.events import EventLog
from data.records import RecordDataset
from data.sampler import Draw
from data.seeding import seed_for
from pipeline.cli import main
from pipeline.config import load_config
from policy.adapters import LoraConfig, trained
from policy.base import check_base
from policy.dit import to_tokens, velocity
from policy.edit import EditConfig, EditPolicy
from policy.folder import load_vae, save_vae
from policy.group import GroupRequest
from policy.kernels import KernelConfig
from policy.latents import LatentCache, encode_records
from policy.objectives import flow_matching_pair, shifted_times
from policy.programs import Batch, SftConfig, make_sft_program
from policy.qwen import QwenEncoder
from policy.rl import GrpoConfig, GrpoProgram, Start
from policy.schedule import SamplingConfig, ScheduleConfig, WindowConfig
from policy.weights import pack
from tests.unit.data.helpers import make_record, write_dataset
from tests.unit.policy.tiny_base import stock_pipeline, write_base
from tests.unit.policy.tiny_models import DIT

TASKS = ("automatic_matting", "object_removal", "layer_decomposition")
SIZE = 32
LORA = LoraConfig(rank=2)
SAMPLING = SamplingConfig(schedule=ScheduleConfig(steps=4), window=WindowConfig(size=2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    records = [make_record(task, number, SIZE) for number, task in enumerate(TASKS * 2)]
    return write_dataset(tmp_path_factory.mktemp("data"), records)


@pytest.fixture(scope="module")
def vae_stage(tmp_path_factory, base, dataset):
    """What the VAE stage leaves where it takes the base's VAE as it is."""
    folder = tmp_path_factory.mktemp("vae")
    save_vae(folder / "model", load_vae(base))
    (folder / "latents").mkdir()
    data = RecordDataset(dataset, "train")
    owned = frozenset(digest for index in range(len(data)) for digest in data.digests(index))
    encode_records(folder / "model", data, range(len(data)), owned, folder / "latents" / "0.safetensors")
    return folder


def sft(base, vae_stage, dataset, dropout=0.0, lora=LORA):
    return make_sft_program(DIT, base, lora, SftConfig(prompt_dropout=dropout), vae_stage, dataset, seed=3)


def batch(dataset, task="object_removal"):
    indices = RecordDataset(dataset, "train").positions(task)
    return Batch(5, Draw(task, np.asarray(indices[:2])))


def test_the_sft_loss_is_the_rectified_flow_under_the_base_encoders_states(base, vae_stage, dataset):
    program = sft(base, vae_stage, dataset)
    micro = batch(dataset)
    found = program.loss(program.module, micro)

    data, encoder = RecordDataset(dataset, "train"), QwenEncoder(base)
    statistics = load_vae(base).config
    cache = LatentCache(vae_stage / "latents", statistics.latents_mean, statistics.latents_std)
    records = [data.record(int(index)) for index in micro.draw.indices]
    inputs, targets = (
        torch.stack([cache.stack(image.digest for image in images(record)) for record in records])
        for images in (lambda record: record.inputs, lambda record: record.targets)
    )
    generator = torch.Generator().manual_seed(seed_for(3, "sft", micro.position))
    noise = torch.randn(targets.shape, generator=generator)
    times = shifted_times(torch.rand(2, generator=generator), 3.0)
    noisy, wanted = flow_matching_pair(targets, noise, times)
    total = 0.0
    for k, record in enumerate(records):  # one by one: no padding
        text = encoder.encode(record.prompt, record.decode().inputs)[None]
        with torch.no_grad():
            output = velocity(program.module, noisy[k : k + 1], times[k : k + 1], inputs[k : k + 1], text)
        total += float(((output - wanted[k : k + 1]) ** 2).mean())
    assert found.count == 2
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-4)


def test_conditions_are_encoded_once_and_dropped_prompts_keep_their_pictures(base, vae_stage, dataset, monkeypatch):
    program = sft(base, vae_stage, dataset, dropout=1.0)
    micro = batch(dataset, "layer_decomposition")
    first = float(program.loss(program.module, micro).total.detach())
    kept = len(list((vae_stage / "conditions").iterdir()))
    again = sft(base, vae_stage, dataset, dropout=1.0)
    monkeypatch.setattr(again._text._encoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert float(again.loss(again.module, micro).total.detach()) == first
    assert len(list((vae_stage / "conditions").iterdir())) == kept
    one, other = (again._states(int(index), "") for index in micro.draw.indices)
    assert not torch.equal(one, other)  # of the empty prompt with either record's picture


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "all weights"])
def test_what_sft_exports_is_a_base_with_its_weights(base, vae_stage, dataset, tmp_path, lora):
    program = sft(base, vae_stage, dataset, lora=lora)
    weights = {
        name: value + 0.05 for name, value in trained(program.module.state_dict(), lora=lora is not None).items()
    }
    program.export(tmp_path / "model", weights)
    check_base(tmp_path / "model")
    picture = torch.rand(4, 40, 30)
    config = EditConfig(steps=2, size=64, guidance=1.0)
    before, after = (
        EditPolicy(folder).latents(1, [picture], "Cut out the disc.", config) for folder in (base, tmp_path / "model")
    )
    assert float((before - after).abs().max()) > 1e-3


def test_a_group_is_rolled_out_from_a_base_and_replayed_with_ratio_one(base, dataset):
    start = Start(base, LORA, seed=1)
    kernel, objective = KernelConfig(), GrpoConfig()
    program = GrpoProgram(start, objective, kernel, SAMPLING.schedule.sigmas())
    actor = RolloutActor(RolloutSetup(start, dataset, 7, SAMPLING, kernel), threads=1)
    actor.load(0, *pack(trained(program.module.state_dict(), lora=True)))
    index = int(RecordDataset(dataset, "train").positions("object_removal")[0])
    _, group, pixels = actor.sample(GroupRequest(step=1, group=0, index=index, members=3))
    assert pixels.layers_GLCHW.shape == (3, 1, 4, SIZE, SIZE)
    states = actor._text.encode(pixels.prompt, [torch.tensor(image) for image in pixels.inputs])
    assert np.array_equal(group.text_TD, states.numpy())
    for micro in program.micro_batches(group, np.array([1.0, 0.0, -1.0])):
        assert program.loss(program.module, micro).stats["max_ratio_error"] == 0


@pytest.fixture
def trained_run(base, vae_stage, dataset, tmp_path):
    """What a run on the base leaves behind once its SFT stage has moved the adapter."""
    program, run = sft(base, vae_stage, dataset), tmp_path / "run"
    temporary = begin(run / "sft" / "final")
    moved = {name: value + 0.05 for name, value in trained(program.module.state_dict(), lora=True).items()}
    program.export(temporary / "model", moved)
    commit(temporary, run / "sft" / "final", {"step": 1})
    config = load_config("tiny", [f"run_dir={run}", f"dataset={dataset}", f"vae.start={base}"])
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    EventLog(run / "events.jsonl", 1).close()
    return run


@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_stock_diffusers_samples_from_what_the_export_command_writes_what_the_runs_policy_samples_here(
    base, trained_run, tmp_path, monkeypatch, form
):
    out, side, prompt = tmp_path / "out", 64, "Cut out the disc."
    assert main(["export", str(trained_run), str(out), "--form", form]) == 0
    for constant in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(stock, constant, side * side)
    pipeline = stock_pipeline(out if form == "diffusers" else base)
    if form == "lora":
        pipeline.load_lora_weights(str(out / "lora"))
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    tokens = pipeline(
        image=[Image.fromarray(pixels)], prompt=prompt, true_cfg_scale=1.0, height=side, width=side,
        num_inference_steps=3, generator=torch.Generator().manual_seed(3), output_type="latent",
    ).images  # fmt: skip
    picture = torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(255))
    config = EditConfig(steps=3, guidance=1.0, size=side, seed=3)
    ours, untrained = (
        to_tokens(EditPolicy(folder).latents(1, [picture], prompt, config))
        for folder in (trained_run / "sft" / "final" / "model", base)
    )
    torch.testing.assert_close(ours, tokens, atol=1e-5, rtol=0)
    assert float((untrained - tokens).abs().max()) > 1e-3
