import pytest
import torch
from tiny_models import CHANNELS, VAE, measured_vae, normal

from common.errors import CheckpointError
from policy.vae import LatentCodec, VaeConfig, build_vae, set_latent_statistics


def layers(batch=2, size=8, seed=0):
    return torch.rand(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


def live_vae():
    """A VAE whose alpha has left its opaque start."""
    vae = measured_vae()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        vae.decoder.conv_out.weight[3].copy_(torch.randn(vae.decoder.conv_out.weight[3].shape, generator=generator))
    return vae


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_a_fresh_decoder_is_fully_opaque_on_any_latent(scale):
    with torch.no_grad():
        output = build_vae(VAE, seed=3).decode(normal(3, CHANNELS, 4, 4) * scale).sample
    assert output.shape == (3, 4, 8, 8)
    assert torch.equal(output[:, 3], torch.ones(3, 8, 8))
    assert float(output[:, :3].std()) > 0


def test_a_fresh_encoder_does_not_see_alpha():
    vae, pixels = build_vae(VAE, seed=3), layers() * 2 - 1
    clear = pixels.clone()
    clear[:, 3] = -1
    with torch.no_grad():
        seen, blind = (vae.encode(image).latent_dist for image in (pixels, clear))
        other = vae.encode(pixels.flip(1)).latent_dist
    assert torch.equal(seen.mean, blind.mean)
    assert torch.equal(seen.logvar, blind.logvar)
    assert not torch.equal(seen.mean, other.mean)


def test_the_opaque_start_can_be_left_by_training():
    vae, pixels = build_vae(VAE, seed=3), layers() * 2 - 1
    output = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    ((output - pixels) ** 2).mean().backward()
    assert float(vae.decoder.conv_out.weight.grad[3].abs().max()) > 0
    assert float(vae.decoder.conv_out.bias.grad[3].abs()) > 0
    assert float(vae.encoder.conv_in.weight.grad[:, 3].abs().max()) > 0


def test_a_fresh_vae_follows_from_its_seed_and_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once, again, other = (build_vae(VAE, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(once.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("channels", "factor"), [((8,), 1), ((8, 8), 2), ((8, 8, 16), 4)])
def test_each_further_entry_of_channels_halves_the_latents(channels, factor):
    config = VaeConfig(channels=channels, latent_channels=CHANNELS, norm_groups=4)
    vae = build_vae(config, seed=0)
    set_latent_statistics(vae, torch.zeros(CHANNELS), torch.ones(CHANNELS))
    codec = LatentCodec(vae)
    assert config.factor == codec.factor == factor
    latents = codec.encode(layers(size=16))
    assert latents.shape == (2, CHANNELS, 16 // factor, 16 // factor)
    assert codec.decode(latents).shape == (2, 4, 16, 16)


def test_encoded_latents_are_posterior_means_normalised_by_the_stored_statistics():
    codec, pixels = LatentCodec(measured_vae()), layers()
    with torch.no_grad():
        raw = measured_vae().eval().encode(pixels * 2 - 1).latent_dist.mean
    for channel, (mean, std) in enumerate(
        zip(torch.linspace(-0.5, 0.5, CHANNELS), torch.linspace(0.5, 2.0, CHANNELS), strict=True)
    ):
        assert torch.allclose(codec.encode(pixels)[:, channel], (raw[:, channel] - mean) / std, atol=1e-6)
    assert torch.equal(codec.encode(pixels), codec.encode(pixels))


def test_decoding_undoes_the_normalisation_and_clamps_to_layers():
    codec, latents = LatentCodec(live_vae()), normal(2, CHANNELS, 4, 4) * 20
    shift, scale = torch.linspace(-0.5, 0.5, CHANNELS), torch.linspace(0.5, 2.0, CHANNELS)
    with torch.no_grad():
        raw = live_vae().eval().decode(latents * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).sample
    decoded = codec.decode(latents)
    assert torch.allclose(decoded, ((raw + 1) / 2).clamp(0, 1), atol=1e-5)
    assert float(decoded.min()) == 0
    assert float(decoded.max()) == 1
    assert torch.equal(codec.decode(codec.encode(layers())), codec.decode(codec.encode(layers())))


def test_latents_normalised_with_their_own_statistics_have_mean_zero_and_spread_one():
    vae, pixels = build_vae(VAE, seed=0), layers(batch=16)
    with torch.no_grad():
        raw = vae.eval().encode(pixels * 2 - 1).latent_dist.mean
    set_latent_statistics(vae, raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0))
    latents = LatentCodec(vae).encode(pixels)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_a_vae_without_measured_statistics_is_refused_with_what_to_do():
    with pytest.raises(CheckpointError, match="run `omnialpha vae` to measure them"):
        LatentCodec(build_vae(VAE, seed=0))


def test_a_codec_freezes_its_vae():
    codec = LatentCodec(measured_vae())
    assert not codec.vae.training
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())
    assert not codec.encode(layers()).requires_grad
