"""Input images bring what an ImageNet network sees in them; targets have zeros there, and nothing else changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from policy.dit import PATCH, SIGHT_CHANNELS, DitConfig, build_dit, to_tokens, velocity
from policy.features import load_efficientnet
from policy.sight import Sight, sight_for
from policy.vae import LatentCodec, VaeConfig, build_vae, set_latent_statistics

CHANNELS, SIDE = 4, 8
SMALL = {"layers": 1, "heads": 2, "head_dim": 12, "rope_axes": (4, 4, 4)}


def picture(seed: int, side: int = 32) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    smooth = torch.tensor(rng.random((1, 4, 5, 5)), dtype=torch.float32)
    return F.interpolate(smooth, (side, side), mode="bilinear")[0].clamp(0, 1)


@pytest.fixture(scope="module")
def sight() -> Sight:
    return Sight()


@pytest.fixture(scope="module")
def seeing() -> torch.nn.Module:
    model = build_dit(DitConfig(**SMALL, sight=True), CHANNELS, 16, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_features_lie_over_the_latents_with_mean_0_and_variance_1_at_each_size_of_the_network(sight):
    features = sight.of([picture(1), picture(2)], 8, 8)
    assert features.shape == (2, SIGHT_CHANNELS, 8, 8)
    finest = features[:, :40]  # at 64 pixels, a stride of 8: one location for each latent, so nothing was interpolated
    assert finest.mean(1).abs().max() < 1e-3
    assert (finest.var(1, unbiased=False) - 1).abs().max() < 1e-2


def test_features_are_the_networks_own_of_the_picture_on_white(sight):
    image = picture(3)
    on_white = image[:3] * image[3:] + 1 - image[3:]
    large = F.interpolate(on_white[None], (64, 64), mode="bicubic").clamp(0, 1)
    third = load_efficientnet().projections(large)[2][0].double().numpy()
    standard = (third - third.mean(0)) / np.sqrt(third.var(0) + 1e-5)
    assert sight.of([image], 8, 8)[0, :40].numpy() == pytest.approx(standard, abs=0.02)  # kept in half precision


def test_a_transparent_picture_looks_the_same_whatever_colours_hide_in_it(sight):
    first, second = picture(4), picture(5)
    first[3], second[3] = 0, 0
    assert torch.equal(sight.of([first], 8, 8), sight.of([second], 8, 8))


def test_what_was_seen_before_is_not_decoded_again_and_equal_whoever_else_was_looked_at(sight):
    fresh, images = Sight(), [picture(6), picture(7)]
    both = fresh.lookup(["a", "b"], lambda: images, 8, 8)
    again = fresh.lookup(["b"], lambda: pytest.fail("decoded again"), 8, 8)
    assert torch.equal(both[1:], again)
    assert torch.equal(both, sight.of(images, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Sight().of(images, 8, 8), both)


def test_no_picture_gives_no_features_of_the_right_shape(sight):
    assert sight.of([], 8, 8).shape == sight.lookup([], list, 8, 8).shape == (0, SIGHT_CHANNELS, 8, 8)


def test_only_the_oldest_pictures_are_forgotten_where_memory_ends():
    fresh = Sight(kept_bytes=2 * 2 * (40 * 8 * 8 + 112 * 4 * 4 + 320 * 2 * 2))  # two pictures in half precision
    for name, seed in (("a", 1), ("b", 2), ("a", 1), ("c", 3)):
        fresh.lookup([name], lambda seed=seed: [picture(seed)], 8, 8)
    fresh.lookup(["a"], lambda: pytest.fail("a was looked at last"), 8, 8)
    asked = []
    fresh.lookup(["b"], lambda: asked.append(True) or [picture(2)], 8, 8)
    assert asked


def test_targets_of_a_model_that_sees_are_zero_where_inputs_bring_features(seeing):
    generator = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 1, CHANNELS, SIDE, SIDE, generator=generator)
    inputs = torch.randn(2, 1, CHANNELS + SIGHT_CHANNELS, SIDE, SIDE, generator=generator)
    text, sigma = torch.randn(2, 3, 16, generator=generator), torch.tensor([0.3, 0.8])
    found = velocity(seeing, noisy, sigma, inputs, text)
    assert found.shape == noisy.shape
    blank = torch.zeros(2, 1, SIGHT_CHANNELS, SIDE, SIDE)
    tokens = torch.cat([to_tokens(torch.cat([noisy, blank], 2)), to_tokens(inputs)], dim=1)
    places = [[(1, SIDE // PATCH, SIDE // PATCH)] * 2] * 2
    (output,) = seeing(
        hidden_states=tokens, encoder_hidden_states=text, timestep=sigma, img_shapes=places, return_dict=False
    )
    torch.testing.assert_close(to_tokens(found), output[:, : tokens.shape[1] // 2], atol=1e-6, rtol=1e-5)


def test_a_task_without_inputs_has_its_velocity_too(seeing):
    noisy, text = torch.randn(2, 1, CHANNELS, SIDE, SIDE), torch.randn(2, 3, 16)
    none = torch.zeros(2, 0, CHANNELS + SIGHT_CHANNELS, SIDE, SIDE)
    assert velocity(seeing, noisy, torch.tensor([0.5, 0.5]), none, text).shape == noisy.shape


def test_the_codec_of_a_model_that_sees_gives_both_and_of_another_latents_alone(seeing):
    vae = build_vae(VaeConfig(channels=(8, 8, 8), latent_channels=CHANNELS, norm_groups=4), seed=0)
    set_latent_statistics(vae, torch.zeros(CHANNELS), torch.ones(CHANNELS))
    blind = build_dit(DitConfig(**SMALL), CHANNELS, 16, seed=1)
    assert sight_for(blind) is None
    codec = LatentCodec(vae, sight_for(seeing))
    images = [picture(8), picture(9)]
    stack = codec.encode_stack(images, 32, 32)
    assert stack.shape == (2, CHANNELS + SIGHT_CHANNELS, 8, 8)
    assert torch.equal(stack[:, :CHANNELS], LatentCodec(vae, sight_for(blind)).encode_stack(images, 32, 32))
    assert torch.equal(stack[:, CHANNELS:], Sight().of(images, 8, 8))
    assert codec.encode_stack([], 32, 32).shape == (0, CHANNELS + SIGHT_CHANNELS, 8, 8)
    assert codec.channels == CHANNELS
