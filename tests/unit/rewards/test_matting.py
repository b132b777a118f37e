"""Scorers made of the matting benchmark's errors, against brute-force derivations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, RewardError
from rewards.base import RewardBatch, build, registered, run_scorer
from rewards.combine import RewardConfig, TermConfig, active_terms
from rewards.matting import connectedness, connectivity_error, gradient_error, gradient_magnitude

SIZE = 24
NAMES = ("alpha_mad", "alpha_overlap", "alpha_gradient", "alpha_connectivity", "alpha_sharpness", "fringe")


def disc(radius: float, soft: float = 2.0, centre: float = SIZE / 2) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.clip((radius - np.hypot(x - centre, y - centre)) / soft + 0.5, 0, 1)


def layer(alpha: np.ndarray, colour=(0.8, 0.3, 0.1)) -> torch.Tensor:
    planes = [np.full_like(alpha, value) for value in colour]
    return torch.tensor(np.stack([*planes, alpha]), dtype=torch.float32)


def batch(members: list[torch.Tensor], truth: torch.Tensor, roles=("foreground",), inputs=()) -> RewardBatch:
    stack = torch.stack([m if m.ndim == 4 else m[None] for m in members])
    target = truth if truth.ndim == 4 else truth[None]
    return RewardBatch("automatic_matting", "", roles, stack, target, tuple(inputs), ("image",) * len(inputs))


def values(name: str, given_batch: RewardBatch) -> np.ndarray:
    scores = run_scorer(name, build(name), given_batch)
    assert scores.reasons == (None,) * given_batch.members
    return scores.values_G


def brute_gradient(alpha: np.ndarray) -> np.ndarray:
    """Convolution with sampled derivatives of a Gaussian, pixel by pixel."""
    reach = int(4 * 1.4 + 0.5)
    offsets = np.arange(-reach, reach + 1)
    smooth = np.exp(-(offsets**2) / (2 * 1.4**2))
    smooth /= smooth.sum()
    slope = -offsets / 1.4**2 * smooth
    padded = np.pad(alpha, reach, mode="edge")
    out = np.zeros((2, *alpha.shape))
    for i in range(alpha.shape[0]):
        for j in range(alpha.shape[1]):
            patch = padded[i : i + 2 * reach + 1, j : j + 2 * reach + 1]
            out[0, i, j] = slope[::-1] @ patch @ smooth
            out[1, i, j] = smooth @ patch @ slope[::-1]
    return np.hypot(*out)


def brute_levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Highest threshold up to which a pixel stays in the largest common region, by flood fill."""
    level = np.full(a.shape, -1.0)
    for step in range(1, 11):
        common = {tuple(p) for p in np.argwhere((a >= step / 10) & (b >= step / 10))}
        regions = []
        while common:
            todo, region = [common.pop()], set()
            while todo:
                i, j = todo.pop()
                region.add((i, j))
                near = {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)} & common
                common -= near
                todo += near
            regions.append(region)
        largest = max(regions, key=len, default=set())
        for i in range(a.shape[0]):
            for j in range(a.shape[1]):
                if level[i, j] < 0 and (i, j) not in largest:
                    level[i, j] = (step - 1) / 10
    level[level < 0] = 1.0
    return level


def test_gradients_equal_an_explicit_convolution():
    np.testing.assert_allclose(gradient_magnitude(disc(7)), brute_gradient(disc(7)), atol=1e-9)
    expected = ((brute_gradient(disc(7)) - brute_gradient(disc(5))) ** 2).sum() / 1000
    assert gradient_error(disc(7), disc(5)) == pytest.approx(expected, rel=1e-9)


def test_connectedness_equals_a_flood_fill():
    truth, guess = disc(8), np.maximum(disc(8) * 0.7, disc(2.5, centre=3.5))
    level = brute_levels(guess, truth)
    for alpha, degree in zip((guess, truth), connectedness(guess, truth), strict=True):
        excess = alpha - level
        np.testing.assert_allclose(degree, 1 - excess * (excess >= 0.15), atol=1e-9)
    expected = np.abs(np.subtract(*connectedness(guess, truth))).sum() / 1000
    assert connectivity_error(guess, truth) == pytest.approx(expected, rel=1e-12)
    assert expected > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_scores_highest_and_worse_alphas_lower(name):
    truth = layer(disc(7))
    near, far = layer(disc(6.6, 4.0)), layer(disc(3.5, 12.0), (0.1, 0.3, 0.9))
    best, middle, worst = values(name, batch([truth, near, far], truth))
    assert best > middle > worst or (name == "fringe" and best == middle > worst)
    if name != "alpha_sharpness":
        assert best == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_scores_stay_between_0_and_1_for_any_alpha(seed):
    draw = np.random.default_rng(seed)
    pair = [layer(draw.random((SIZE, SIZE)) ** draw.choice([0.2, 1, 5])) for _ in range(2)]
    for name in NAMES:
        scores = values(name, batch(pair, pair[1]))
        assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_empty_and_full_layers_are_scored(name, alpha):
    flat = layer(np.full((SIZE, SIZE), alpha))
    assert values(name, batch([flat, layer(disc(6))], flat))[0] == pytest.approx(1.0)


def test_a_disconnected_island_costs_connectivity_more_than_the_same_alpha_beside_the_object():
    truth = disc(6, centre=8)
    island, rim = truth.copy(), truth.copy()
    island[18:22, 18:22] = 1.0
    outside = np.argwhere(truth == 0)
    closest = outside[np.argsort(np.hypot(*(outside - 8).T))[:16]]
    rim[tuple(closest.T)] = 0.14  # within the tolerance of what is connected
    far, near = values("alpha_connectivity", batch([layer(island), layer(rim)], layer(truth)))
    assert far < near == pytest.approx(1.0)


def test_the_overlap_is_the_soft_dice_and_showing_nothing_is_no_better_than_another_object():
    truth, nothing, other = disc(4, centre=6), np.zeros((SIZE, SIZE)), disc(4, centre=18)
    half = np.where(np.arange(SIZE) < 6, truth, 0)
    shown = batch([layer(half), layer(nothing), layer(other)], layer(truth))
    dice = 2 * np.minimum(half, truth).sum() / (half.sum() + truth.sum())
    np.testing.assert_allclose(values("alpha_overlap", shown), [dice, 0.0, 0.0], atol=1e-6)
    _, left_out, wrong = values("alpha_mad", shown)  # which errs less by not trying
    assert left_out > wrong


def test_a_halo_of_background_colour_lowers_the_fringe_score_only():
    truth = layer(disc(7))
    halo = truth.clone()
    edge = (truth[3] > 0.05) & (truth[3] < 0.95)
    halo[:3, edge] = torch.tensor([[0.0], [0.9], [0.9]])
    clean, spoilt = values("fringe", batch([truth, halo], truth))
    assert clean == pytest.approx(1.0)
    assert spoilt < 0.8
    same, again = values("alpha_gradient", batch([truth, halo], truth))
    assert same == again


def test_recomposition_is_the_mean_difference_to_the_input_on_white():
    back, front = layer(np.ones((SIZE, SIZE)), (0.2, 0.4, 0.6)), layer(disc(7))
    scene = torch.cat([front[:3] * front[3:] + back[:3] * (1 - front[3:]), torch.ones(1, SIZE, SIZE)])
    wrong = layer(np.zeros((SIZE, SIZE)))
    roles = ("background", "foreground")
    made = batch([torch.stack([back, front]), torch.stack([back, wrong])], torch.stack([back, front]), roles, [scene])
    good, bad = values("recomposition", made)
    assert good == pytest.approx(1.0, abs=1e-6)
    assert bad == pytest.approx(1 - float((scene[:3] - back[:3]).abs().mean()), abs=1e-6)


def test_a_task_without_what_a_scorer_needs_is_declined_with_what_to_do():
    scene = layer(np.ones((SIZE, SIZE)))
    only_background = batch([scene], scene, ("background",))
    for name in (*NAMES, "recomposition"):
        with pytest.raises(RewardError, match="name the tasks it is for in the term's `tasks`"):
            getattr(build(name), "score", build(name))(only_background)


def test_all_of_them_are_registered():
    assert {*NAMES, "recomposition"} <= set(registered())


def test_a_term_judges_the_tasks_it_names():
    terms = (TermConfig(name="layer"), TermConfig(name="fringe", tasks=("mask_matting",)), TermConfig(name="alpha_mad"))
    config = RewardConfig(terms=terms)
    assert active_terms(config, "mask_matting") == (0, 1, 2)
    assert active_terms(config, "automatic_matting") == (0, 2)
    limited = RewardConfig(terms=(TermConfig(name="layer", tasks=("object_removal",)),))
    assert active_terms(limited, "automatic_matting") == ()
    assert active_terms(limited, "object_removal") == (0,)


def test_a_term_for_an_unknown_task_is_refused():
    with pytest.raises((ConfigError, ValueError), match="matting_automatic"):
        TermConfig(name="fringe", tasks=("matting_automatic",))


def test_errors_of_the_benchmark_are_zero_for_the_truth():
    assert gradient_error(disc(7), disc(7)) == 0
    assert connectivity_error(disc(7), disc(7)) == 0
    assert math.isfinite(connectivity_error(np.zeros((4, 4)), np.ones((4, 4))))
