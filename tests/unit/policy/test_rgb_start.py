"""Stage 0: an RGB VAE, and what opaque initialisation makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHANNELS, VAE, normal

from policy.objectives import gaussian_kl_between
from policy.vae import build_vae, opaque


@pytest.fixture(scope="module")
def rgb():
    return build_vae(VAE, seed=3, image_channels=3).eval()


def pixels(batch=2, size=8):
    return torch.rand(batch, 4, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_a_converted_vae_encodes_colours_as_the_rgb_one_did_whatever_alpha_says(rgb):
    image = pixels()
    theirs = rgb.encode(image[:, :3]).latent_dist
    ours = opaque(rgb).eval().encode(image).latent_dist
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.logvar, theirs.logvar, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_converted_vae_decodes_the_rgb_ones_colours_and_says_fully_opaque(rgb):
    latents = normal(3, CHANNELS, 4, 4)
    theirs, ours = rgb.decode(latents).sample, opaque(rgb).eval().decode(latents).sample
    assert ours.shape == (3, 4, 8, 8)
    torch.testing.assert_close(ours[:, :3], theirs, atol=1e-6, rtol=0)
    assert torch.equal(ours[:, 3], torch.ones(3, 8, 8))


def test_conversion_leaves_the_rgb_vae_as_it_was(rgb):
    before = {name: value.clone() for name, value in rgb.state_dict().items()}
    made = opaque(rgb)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in rgb.state_dict().items())
    assert rgb.config.in_channels == rgb.config.out_channels == 3


def test_the_converted_vaes_alpha_learns(rgb):
    vae, image = opaque(rgb), pixels()
    ((vae.decode(vae.encode(image).latent_dist.mean).sample - image) ** 2).mean().backward()
    assert float(vae.decoder.conv_out.weight.grad[3].abs().max()) > 0
    assert float(vae.encoder.conv_in.weight.grad[:, 3].abs().max()) > 0


def numpy_kl(mean, logvar, other_mean, other_logvar):
    """KL between two Gaussians, element by element, from the definition log(s2/s1) + (s1² + (m1 − m2)²)/(2 s2²) − ½."""
    s1, s2 = np.exp(logvar / 2), np.exp(other_logvar / 2)
    return np.mean(np.log(s2 / s1) + (s1**2 + (mean - other_mean) ** 2) / (2 * s2**2) - 0.5)


def test_the_reference_kl_is_that_of_two_gaussians():
    posterior, reference = normal(2, 2 * CHANNELS, 3, 3).double(), normal(2, 2 * CHANNELS, 3, 3).flip(0).double()
    expected = numpy_kl(*(part.numpy() for part in (*posterior.chunk(2, 1), *reference.chunk(2, 1))))
    assert abs(float(gaussian_kl_between(posterior, reference)) - expected) < 1e-9


@given(st.integers(0, 2**31))
def test_the_reference_kl_is_zero_to_itself_and_never_negative(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    assert float(gaussian_kl_between(a, a)) == 0
    assert float(gaussian_kl_between(a, b)) >= 0
