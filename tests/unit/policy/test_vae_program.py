"""The VAE's perceptual and adversarial terms on real images."""

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_models import VAE

from common.errors import ConfigError
from data.records import RecordDataset
from data.sampler import Draw
from pipeline.config import load_config
from policy.folder import load_vae, save_vae
from policy.objectives import alpha_blend_mse
from policy.perceptual import PerceptualDistance
from policy.programs import Batch
from policy.vae import build_vae
from policy.vae_program import VaeLossConfig, VaeProgram, adaptive_weight, make_started_program


def program(dataset, channels: int = 4, **weights) -> VaeProgram:
    return VaeProgram(build_vae(VAE, seed=1, image_channels=channels), VaeLossConfig(**weights), dataset, seed=0)


def batch(dataset, position: int = 0, count: int = 4) -> Batch:
    positions = RecordDataset(dataset, "train").positions("layer_decomposition")
    return Batch(position, Draw("layer_decomposition", positions[:count]))


def gradients(made: VaeProgram, micro: Batch) -> dict[str, torch.Tensor]:
    made.module.zero_grad()
    made.loss(made.module, micro).total.backward()
    return {name: p.grad.clone() for name, p in made.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("channels", [3, 4])
def test_the_discriminator_learns_to_tell_reconstructions_from_images(real_dataset, channels):
    made = program(real_dataset, channels, adversarial=1e-9)
    optimiser = torch.optim.Adam(made.module.critic.parameters(), lr=3e-3)
    losses = []
    for position in range(40):
        optimiser.zero_grad()
        loss = made.loss(made.module, batch(real_dataset, position % 2))
        loss.total.backward()
        optimiser.step()
        losses.append(loss.stats["critic"] / loss.count)
    assert losses[0] == pytest.approx(1, abs=0.2)
    assert losses[-1] < 0.3


def test_the_vae_moves_against_the_discriminator_and_the_discriminator_does_not_help_it(real_dataset):
    micro = batch(real_dataset)
    weak, strong = (gradients(program(real_dataset, adversarial=weight), micro) for weight in (1e-9, 1.0))
    critic = [name for name in weak if name.startswith("critic.")]
    assert critic
    assert all(torch.allclose(weak[name], strong[name]) for name in critic)  # from its own loss alone
    plain = gradients(program(real_dataset), micro)
    assert not any(name.startswith("critic.") for name in plain)
    apart = max(float((strong[name] - plain[name]).abs().max()) for name in plain)
    assert apart > 1e-4
    for name, value in plain.items():  # an adversarial weight near nothing changes nothing
        torch.testing.assert_close(weak[name], value, atol=1e-6, rtol=1e-4)


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    output = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    others, fooling = (output**2).mean(), -5 * output[:, :3].mean()
    (pull,) = torch.autograd.grad(fooling, output, retain_graph=True)
    weight = adaptive_weight(others, output, pull.norm())
    lengths = [torch.autograd.grad(x, output, retain_graph=True)[0].norm() for x in (others, weight * fooling)]
    torch.testing.assert_close(*lengths, rtol=1e-2, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(1e9 * (output**2).mean(), output, torch.zeros(())) == 1e4


def test_the_program_weighs_by_the_gradients_at_its_reconstruction(real_dataset):
    made, micro = program(real_dataset, adversarial=1.0), batch(real_dataset)
    found = made.loss(made.module, micro)
    pixels, seed = made._pixels(micro)
    output = made.module(pixels, seed)
    x = output.pixels_BCHW
    alpha = (pixels[:, 3:] + 1) / 2
    others = alpha_blend_mse(x, pixels) + 0.5 * ((x[:, :3] - pixels[:, :3]).abs() * alpha).mean() / 2
    others = others + 0.5 * (x[:, 3:] - pixels[:, 3:]).abs().mean() / 2
    lengths = [torch.autograd.grad(loss, x, retain_graph=True)[0].norm() for loss in (others, output.fooling)]
    assert found.stats["adaptive"] / found.count == pytest.approx(float(lengths[0] / lengths[1]), rel=0.01)


def test_an_exported_vae_has_no_discriminator(real_dataset, tmp_path):
    made = program(real_dataset, adversarial=0.5)
    made.export(tmp_path, {name: value.clone() for name, value in made.module.state_dict().items()})
    loaded = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae", local_files_only=True)
    theirs, ours = loaded.state_dict(), made.module.vae.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_the_perceptual_term_is_the_distance_of_blends_on_black_and_white_and_moves_the_vae(real_dataset):
    made, micro = program(real_dataset, perceptual=1.0), batch(real_dataset)
    found = made.loss(made.module, micro)
    pixels, seed = made._pixels(micro)
    with torch.no_grad():
        rebuilt = (made.module(pixels, seed).pixels_BCHW + 1) / 2
        image, distance = (pixels + 1) / 2, PerceptualDistance()
        expected = []
        for k in range(len(image)):
            for ground in (0.0, 1.0):
                shown, truth = (x[k, :3] * x[k, 3:] + ground * (1 - x[k, 3:]) for x in (rebuilt, image))
                expected.append(float(distance(shown[None, None], truth[None])))
    assert found.stats["perceptual"] / found.count == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    with_term, without = gradients(made, micro), gradients(program(real_dataset), micro)
    assert max(float((with_term[name] - without[name]).abs().max()) for name in without) > 1e-4


def test_places_without_any_activation_have_a_finite_gradient():
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    PerceptualDistance().paired(image, torch.rand(1, 3, 64, 64)).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_paired_distances_are_those_of_each_image_to_its_own_truth():
    generator = torch.Generator().manual_seed(0)
    images, truths = (torch.rand(3, 3, 64, 64, generator=generator) for _ in range(2))
    distance = PerceptualDistance()
    whole = distance(images[:, None].expand(3, 3, 3, 64, 64), truths)
    torch.testing.assert_close(distance.paired(images, truths).double(), whole.diagonal(), rtol=1e-4, atol=1e-6)


def test_an_adversarial_term_under_zero_3_is_refused():
    with pytest.raises(ConfigError, match="set zero_stage to 2 or less"):
        load_config("tiny", ["vae.loss.adversarial=0.1", "vae.zero_stage=3"])


def test_training_the_decoder_alone_leaves_every_latent_as_it_was(real_dataset, tmp_path):
    save_vae(tmp_path / "start", build_vae(VAE, seed=1))
    made = make_started_program(VaeLossConfig(), real_dataset, 0, tmp_path / "start", "decoder")
    trained = {name: p for name, p in made.module.named_parameters() if p.requires_grad}
    optimiser, losses = torch.optim.Adam(trained.values(), lr=3e-3), []
    for position in range(12):
        optimiser.zero_grad()
        loss = made.loss(made.module, batch(real_dataset, position % 2))
        loss.total.backward()
        optimiser.step()
        losses.append(float(loss.total.detach()) / loss.count)
    assert losses[-1] < losses[0]
    made.export(tmp_path / "new", {name: p.detach() for name, p in trained.items()})
    old, new = load_vae(tmp_path / "start"), load_vae(tmp_path / "new")
    pixels, _ = made._pixels(batch(real_dataset))
    assert torch.equal(old.encode(pixels).latent_dist.parameters, new.encode(pixels).latent_dist.parameters)
    assert not torch.equal(
        old.decode(old.encode(pixels).latent_dist.mean).sample, new.decode(old.encode(pixels).latent_dist.mean).sample
    )
    for name, value in new.decoder.state_dict().items():
        assert torch.equal(value, made.module.vae.decoder.state_dict()[name]), name
