import math

import derivations
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import normal

from policy.objectives import (
    BACKGROUND_MEAN,
    BACKGROUND_MEAN_SQUARE,
    alpha_blend_mse,
    clipped_loss,
    flow_matching_pair,
    gaussian_kl,
    shifted_times,
)
from policy.schedule import ScheduleConfig

elements = st.lists(
    st.tuples(st.floats(-0.3, 0.3), st.floats(-5.0, -1e-3) | st.just(0.0) | st.floats(1e-3, 5.0)).filter(
        lambda e: abs(abs(math.exp(e[0]) - 1) - 0.1) > 1e-6
    ),
    min_size=1,
    max_size=12,
)


def loss_of(log_ratios, advantages, clip_range=0.1):
    old = torch.linspace(-1.0, 0.5, len(log_ratios), dtype=torch.float64)
    new = (old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    return new, clipped_loss(new - old, torch.tensor(advantages, dtype=torch.float64), clip_range)


def test_clipped_loss_reproduces_the_numbers_published_by_the_peers():
    # The published row has A = −6, clamped to −5 before the loss.
    _, result = loss_of([2e-4, -2e-4, 2e-4, -2e-4], [1.0, 1.0, -1.0, -5.0], 1e-4)
    assert result.losses_B.tolist() == pytest.approx([-1.0001, -0.99980002, 1.00020002, 4.9995], abs=5e-9)
    assert result.clipped_B.tolist() == [True, False, False, True]


@given(elements)
def test_clipped_loss_equals_its_definition_case_by_case(drawn):
    log_ratios, advantages = zip(*drawn, strict=True)
    _, result = loss_of(log_ratios, advantages)
    expected = [derivations.clipped(a, d, 0.1) for d, a in drawn]
    assert result.losses_B.tolist() == pytest.approx([loss for loss, _ in expected], abs=1e-9)
    assert result.clipped_B.tolist() == [gone for _, gone in expected]
    assert result.ratios_B.tolist() == pytest.approx(np.exp(log_ratios).tolist(), abs=1e-9)


@given(elements)
def test_exactly_the_clipped_elements_have_lost_their_gradient(drawn):
    log_ratios, advantages = zip(*drawn, strict=True)
    new, result = loss_of(log_ratios, advantages)
    result.losses_B.sum().backward()
    pulled = [a != 0 and not gone for a, gone in zip(advantages, result.clipped_B.tolist(), strict=True)]
    assert [g != 0 for g in new.grad.tolist()] == pulled
    assert not result.ratios_B.requires_grad


@given(elements, st.randoms(use_true_random=False))
def test_clipped_loss_treats_every_element_by_itself(drawn, random):
    order = list(range(len(drawn)))
    random.shuffle(order)
    log_ratios, advantages = (torch.tensor(part, dtype=torch.float64) for part in zip(*drawn, strict=True))
    here, there = (clipped_loss(log_ratios[k], advantages[k], 0.1) for k in (slice(None), order))
    assert torch.equal(here.losses_B[order], there.losses_B)
    assert torch.equal(here.clipped_B[order], there.clipped_B)
    assert torch.equal(here.ratios_B[order], there.ratios_B)


@given(elements)
def test_the_clipped_loss_is_never_below_the_free_one(drawn):
    log_ratios, advantages = zip(*drawn, strict=True)
    _, result = loss_of(log_ratios, advantages)
    free = -np.array(advantages) * np.exp(log_ratios)
    assert bool((result.losses_B.detach().numpy() >= free - 1e-12).all())


def test_an_unchanged_policy_has_ratio_one_nothing_clipped_and_the_plain_gradient():
    new, result = loss_of([0.0, 0.0, 0.0], [2.0, -3.0, 0.0], 1e-6)
    result.losses_B.sum().backward()
    assert result.ratios_B.tolist() == [1.0, 1.0, 1.0]
    assert result.losses_B.tolist() == [-2.0, 3.0, 0.0]
    assert result.clipped_B.tolist() == [False, False, False]
    assert new.grad.tolist() == [-2.0, 3.0, 0.0]


def test_the_rectified_flow_pair_is_the_point_on_the_line_and_its_direction():
    clean, noise = normal(3, 2, 4, 4, 4, seed=1), normal(3, 2, 4, 4, 4, seed=2)
    times = torch.tensor([0.0, 0.3, 1.0])
    point, target = flow_matching_pair(clean, noise, times)
    assert torch.equal(point[0], clean[0])
    assert torch.equal(point[2], noise[2])
    expected = 0.7 * clean[1].double().numpy() + 0.3 * noise[1].double().numpy()
    assert point[1].numpy() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(target, noise - clean)


@given(st.floats(0.0, 0.9), st.integers(0, 1000))
def test_the_target_velocity_carries_any_point_of_the_line_to_its_ends(time, seed):
    clean, noise = normal(1, 1, 2, 2, 2, seed=seed).double(), normal(1, 1, 2, 2, 2, seed=seed + 1).double()
    point, velocity = flow_matching_pair(clean, noise, torch.tensor([time], dtype=torch.float64))
    assert (point - time * velocity).numpy() == pytest.approx(clean.numpy(), abs=1e-12)
    assert (point + (1 - time) * velocity).numpy() == pytest.approx(noise.numpy(), abs=1e-12)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), st.floats(0.2, 10.0))
def test_shifted_times_follow_the_formula_and_keep_order_and_ends(uniform, shift):
    drawn = torch.tensor([0.0, *sorted(uniform), 1.0], dtype=torch.float64)
    times = shifted_times(drawn, shift)
    assert times.tolist() == pytest.approx([derivations.shifted(u, shift) for u in drawn.tolist()], abs=1e-12)
    assert times[0] == 0
    assert times[-1] == pytest.approx(1, abs=1e-15)
    assert bool((times.diff() >= -1e-15).all())


def test_shift_one_leaves_training_times_alone_and_larger_ones_add_noise():
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shifted_times(uniform, 1.0), uniform, rtol=0, atol=1e-7)
    assert bool((shifted_times(uniform, 3.0) >= uniform).all())


def test_training_times_and_sampling_levels_share_one_shift():
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert shifted_times(grid, 3.0).tolist() == pytest.approx(ScheduleConfig(steps=10, shift=3.0).sigmas(), abs=1e-12)


def rgba(seed, batch=2, size=5, spread=2.2):
    """Values of a decoder: mostly inside [−1, 1], some outside."""
    return (
        torch.rand(batch, 4, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    ) * spread


def test_background_statistics_are_those_of_alphavae_and_belong_to_some_distribution():
    assert BACKGROUND_MEAN == (-0.0357, -0.0811, -0.1797)
    assert BACKGROUND_MEAN_SQUARE == (0.3163, 0.3060, 0.3634)
    for mean, mean_square in zip(BACKGROUND_MEAN, BACKGROUND_MEAN_SQUARE, strict=True):
        assert mean_square > mean**2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("reference", [derivations.expected_blend_mse, derivations.two_point_blend_mse])
def test_alpha_blend_mse_is_the_expectation_over_backgrounds(reference, dtype, tolerance):
    output, target = rgba(0).to(dtype), rgba(1).to(dtype)
    expected = np.mean(
        [
            reference(a.double().numpy(), b.double().numpy(), BACKGROUND_MEAN, BACKGROUND_MEAN_SQUARE)
            for a, b in zip(output, target, strict=True)
        ]
    )
    assert float(alpha_blend_mse(output, target)) == pytest.approx(expected, abs=tolerance)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_both_derivations_of_the_blend_agree_and_it_is_never_negative(a, b):
    pair = rgba(a, batch=1)[0].numpy(), rgba(b, batch=1)[0].numpy()
    explicit = derivations.expected_blend_mse(*pair, BACKGROUND_MEAN, BACKGROUND_MEAN_SQUARE)
    brute = derivations.two_point_blend_mse(*pair, BACKGROUND_MEAN, BACKGROUND_MEAN_SQUARE)
    assert explicit == pytest.approx(brute, abs=1e-12)
    loss = float(alpha_blend_mse(*(torch.tensor(part)[None] for part in pair)))
    assert loss == pytest.approx(brute, abs=1e-12)
    assert loss >= 0


def test_alpha_blend_mse_does_not_see_colour_under_full_transparency():
    output, target = rgba(2), rgba(3)
    output[:, 3], target[:, 3] = -1.0, -1.0
    assert float(alpha_blend_mse(output, target)) == 0


def test_alpha_blend_mse_of_opaque_images_is_the_plain_colour_error():
    output, target = rgba(4), rgba(5)
    output[:, 3], target[:, 3] = 1.0, 1.0
    plain = float(((output[:, :3] - target[:, :3]) ** 2).mean())
    assert float(alpha_blend_mse(output, target)) == pytest.approx(plain, abs=1e-12)


def test_gaussian_kl_equals_torchs_own():
    mean, logvar = normal(2, 4, 3, 3, seed=6).double(), normal(2, 4, 3, 3, seed=7).double()
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert float(gaussian_kl(mean, logvar)) == pytest.approx(float(theirs.mean()), abs=1e-12)
    assert float(gaussian_kl(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))) == 0
