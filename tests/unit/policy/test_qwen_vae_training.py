"""Alignment of Qwen-Image's own VAE class, from its opaque conversion, on real images."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from tiny_models import normal, qwen_vae

from common.errors import CheckpointError, ConfigError
from data.records import RecordDataset
from data.sampler import Draw
from pipeline.config import load_config
from policy.folder import load_vae, save_vae
from policy.programs import Batch
from policy.vae import opaque, posterior, reconstruction
from policy.vae_program import VaeLossConfig, make_started_program

STEPS = 48


@pytest.fixture
def start(tmp_path):
    save_vae(tmp_path / "start", opaque(qwen_vae()))
    return tmp_path / "start"


def batch(dataset, position=0, count=4):
    positions = RecordDataset(dataset, "train").positions("layer_decomposition")
    return Batch(position, Draw("layer_decomposition", positions[:count]))


def train(made, dataset, steps=STEPS):
    """Steps on two batches in turn; the stats of each and the weights that trained."""
    weights = {name: p for name, p in made.module.named_parameters() if p.requires_grad}
    optimiser, stats = torch.optim.Adam(weights.values(), lr=1e-2), []
    for position in range(steps):
        optimiser.zero_grad()
        loss = made.loss(made.module, batch(dataset, position % 2))
        loss.total.backward()
        optimiser.step()
        found = {name: value / loss.count for name, value in loss.stats.items()}
        stats.append(found | {"total": float(loss.total.detach()) / loss.count})
    return stats, {name: p.detach() for name, p in weights.items()}


def test_training_starts_opaque_with_no_distance_to_the_reference_and_improves_colour_and_alpha(start, real_dataset):
    made = make_started_program(VaeLossConfig(reference=1e-4), real_dataset, 0, start, "all")
    pixels, seed = made._pixels(batch(real_dataset))
    with torch.no_grad():
        assert torch.equal(made.module(pixels, seed).pixels_BCHW[:, 3:], torch.ones_like(pixels[:, 3:]))
        rgb, blends = qwen_vae(), made._blends(pixels)
        assert len(blends) == 2 * len(pixels)
        theirs = posterior(rgb, blends[:, :3]).parameters
        torch.testing.assert_close(posterior(made.module.vae, blends).parameters, theirs, atol=1e-6, rtol=0)
    stats, _ = train(made, real_dataset)
    assert stats[0]["reference"] == 0
    assert stats[-1]["reference"] > 0
    for part in ("total", "blend", "alpha"):
        assert stats[-1][part] < 0.8 * stats[1][part], part  # of the same batch


def test_every_weight_that_trains_has_a_gradient_and_only_those_of_motion_are_left_out(start, real_dataset):
    made = make_started_program(VaeLossConfig(reference=1e-4, adversarial=0.1), real_dataset, 0, start, "all")
    train(made, real_dataset, steps=1)  # at the very start alpha's path to the encoder is closed
    made.module.zero_grad()
    made.loss(made.module, batch(real_dataset)).total.backward()
    assert [name for name, p in made.module.named_parameters() if p.requires_grad and p.grad is None] == []
    left_out = [name for name, p in made.module.named_parameters() if not p.requires_grad]
    assert left_out
    assert all(".time_conv." in name for name in left_out)


@pytest.mark.parametrize("part", ["decoder", "all"])
def test_what_is_exported_is_of_the_class_and_loads_with_the_weights_that_trained(start, real_dataset, tmp_path, part):
    made = make_started_program(VaeLossConfig(), real_dataset, 0, start, part)
    _, weights = train(made, real_dataset, steps=3)
    made.export(tmp_path / "new", weights)
    new = AutoencoderKLQwenImage.from_pretrained(tmp_path / "new", subfolder="vae", local_files_only=True).eval()
    old = load_vae(start)
    assert new.config.input_channels == 4
    assert (new.config.latents_mean, new.config.latents_std) == (old.config.latents_mean, old.config.latents_std)
    before, after = old.state_dict(), new.state_dict()
    assert all(torch.equal(after[name], weights.get(f"vae.{name}", value)) for name, value in before.items())
    pixels, _ = made._pixels(batch(real_dataset))
    with torch.no_grad():
        kept = torch.equal(posterior(old, pixels).parameters, posterior(new, pixels).parameters)
        assert kept == (part == "decoder")
        latents = posterior(old, pixels).mean
        assert not torch.equal(reconstruction(old, latents), reconstruction(new, latents))


@torch.no_grad()
def test_clamped_the_reconstruction_is_what_the_class_decodes():
    vae, latents = opaque(qwen_vae()), 100 * normal(2, 4, 3, 5)
    ours = reconstruction(vae, latents)
    assert float(ours[:, :3].abs().max()) > 1  # or the clamp would say nothing
    assert torch.equal(ours.clamp(-1, 1), vae.decode(latents[:, :, None]).sample[:, :, 0])


def test_an_alpha_above_one_can_still_fall():
    vae = opaque(qwen_vae()).requires_grad_(True)
    with torch.no_grad():
        vae.decoder.conv_out.bias[3] = 1.5
    latents = normal(1, 4, 2, 2)
    vae.decode(latents[:, :, None]).sample[:, 3].mean().backward()
    assert float(vae.decoder.conv_out.bias.grad[3]) == 0  # the trap
    reconstruction(vae, latents)[:, 3].mean().backward()
    assert float(vae.decoder.conv_out.bias.grad[3]) == pytest.approx(1)


def test_an_rgb_vae_is_refused_with_the_command_that_converts_it(real_dataset, tmp_path):
    save_vae(tmp_path, qwen_vae())
    with pytest.raises(CheckpointError, match=r"vae: has 3 image channels.*omnialpha vae-convert"):
        make_started_program(VaeLossConfig(), real_dataset, 0, tmp_path, "all")


@pytest.mark.parametrize("part", ["decoder", "all"])
def test_training_on_without_a_start_is_refused(part):
    with pytest.raises(
        ConfigError, match=r"train says what of an earlier VAE trains on: name its folder in vae\.start"
    ):
        load_config("tiny", [f"vae.train={part}"])
