"""Local credit against the formula spelled out in loops, and the laws it obeys."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tasks import TASKS
from rewards.base import build, run_scorer
from rewards.combine import RewardConfig, TermConfig, batch_advantages, keep_group, step_advantages
from rewards.contract import example_group
from rewards.credit import Credited, grid, local_advantages
from rewards.similarity import psnr, psnr_map, ssim, ssim_map

RULES = ("terms", "sum", "global", "gdpo")
NAN = math.nan


def literal_credit(map_GLhw, reach, layers):
    """Every cell's share of the score, by four loops."""
    members, own, height, width = map_GLhw.shape
    out = np.zeros((members, layers, height, width))
    sigma = reach * max(height, width)
    for g, layer, y, x in np.ndindex(out.shape):
        for v, u in np.ndindex(height, width):
            near = math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * sigma**2))
            out[g, layer, y, x] += near * map_GLhw[g, layer if own > 1 else 0, v, u]
    return out / (own * height * width)


def rms(values):
    present = values[np.isfinite(values)]
    return math.sqrt(math.fsum(present**2) / len(present)) if len(present) else 0.0


def literal_group(scores, weights, maps, reach, rule):
    layers = max([m.shape[1] for m in maps if m is not None], default=1)
    shape = max(
        [(len(scores[0]), layers, *m.shape[2:]) for m in maps if m is not None], default=(len(scores[0]), 1, 1, 1)
    )
    credits = []
    for row, m in zip(scores, maps, strict=True):
        credit = (
            np.broadcast_to(np.reshape(row, (-1, 1, 1, 1)), shape) if m is None else literal_credit(m, reach, layers)
        )
        credit = np.array(credit, float)
        credit[~np.isfinite(row)] = NAN
        credit -= np.nanmean(credit, axis=0)
        credits.append(credit / (rms(credit) + 1e-8) if rule in ("terms", "gdpo") else credit)
    out = np.full(shape, NAN)
    for g in range(shape[0]):
        there = [(w, c[g]) for w, c, row in zip(weights, credits, scores, strict=True) if w and np.isfinite(row[g])]
        if len(there) == sum(w > 0 for w in weights) or (rule == "terms" and there):
            out[g] = sum(w * c for w, c in there) / sum(w for w, _ in there)
    return out


def draw_groups(seed, count=3):
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        members, layers = int(rng.integers(3, 6)), int(rng.integers(1, 4))
        scores = rng.standard_normal((3, members))
        if rng.random() < 0.5:
            scores[int(rng.integers(3)), int(rng.integers(members))] = NAN
        maps = [rng.standard_normal((members, layers, 4, 5)), rng.standard_normal((members, 1, 4, 5)), None]
        groups.append(Credited(scores, rng.random(3) + 0.1, maps))
    return groups


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_advantages_of_cells_are_those_of_the_formula(rule, seed):
    groups = draw_groups(seed)
    found = local_advantages(groups, 0.3, rule, 0.0, 5.0)
    literal = [literal_group(g.scores_TG, g.weights_T, g.maps_T, 0.3, rule) for g in groups]
    together = rms(np.concatenate([values.ravel() for values in literal])) + 1e-8
    for ours, theirs in zip(found, literal, strict=True):
        divisor = rms(theirs) + 1e-8 if rule in ("terms", "sum") else together
        np.testing.assert_allclose(ours, np.clip(theirs / divisor, -5, 5), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["terms", "sum"])
def test_an_infinite_reach_on_one_layer_is_one_advantage_for_all_of_it(rule):
    rng = np.random.default_rng(2)
    maps = [rng.standard_normal((6, 1, 4, 5)) for _ in range(2)]
    scores = np.stack([m.mean((1, 2, 3)) + 3.0 for m in maps])
    [found] = local_advantages([Credited(scores, [1.0, 2.0], maps)], 1e6, rule, 0.0, 5.0)
    config = RewardConfig(terms=(TermConfig(name="layer"),), advantage=rule)
    [whole] = batch_advantages([(scores, [1.0, 2.0])], config)
    np.testing.assert_allclose(found, np.broadcast_to(whole[:, None, None, None], found.shape), atol=1e-6)


@pytest.mark.parametrize("rule", ["terms", "sum"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_terms_that_know_no_place_have_the_advantages_of_whole_samples(rule, seed):
    rng = np.random.default_rng(seed)
    scores, weights = rng.standard_normal((2, 5)), list(rng.random(2) + 0.1)
    config = RewardConfig(terms=(TermConfig(name="layer"),), advantage=rule)
    [local] = step_advantages([Credited(scores, weights, (None, None))], config, 0.1)
    [whole] = step_advantages([Credited(scores, weights, (None, None))], config, None)
    assert local.shape == (5,)
    np.testing.assert_allclose(local, whole, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_what_happens_far_away_does_not_count(rule):
    rng = np.random.default_rng(4)
    near = rng.standard_normal((4, 2, 8, 8))
    far = near.copy()
    far[:, :, :, 7] += 100 * rng.standard_normal((4, 2, 8))
    found = []
    for m in (near, far):
        [values] = local_advantages([Credited(m.mean((1, 2, 3))[None], [1.0], [m])], 0.05, rule, 0.0, 1e9)
        found.append(values[:, :, :, 0])
    one, other = (values / np.abs(values).max() for values in found)  # the divisor is the whole group's
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_what_a_layer_alone_contributes_credits_that_layer_and_what_all_do_credits_all():
    own, joint = np.zeros((2, 3, 4, 4)), np.zeros((2, 1, 4, 4))
    own[0, 1], joint[0] = 1.0, 1.0
    [found] = local_advantages([Credited(np.array([[0.3, 0.0]]), [1.0], [own])], 0.2, "terms", 0.0, 5.0)
    assert (found[0, 1] > 0).all()
    assert (found[:, [0, 2]] == 0).all()
    scores, maps = np.array([[0.3, 0.0], [1.0, 0.0]]), [own, joint]
    [found] = local_advantages([Credited(scores, [1.0, 1.0], maps)], 0.2, "terms", 0.0, 5.0)
    assert (found[0] > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_group_of_equal_members_has_no_signal(rule):
    same = np.broadcast_to(np.random.default_rng(1).standard_normal((1, 2, 4, 4)), (5, 2, 4, 4))
    [found] = local_advantages([Credited(np.full((1, 5), 0.7), [1.0], [same])], 0.1, rule, 0.0, 5.0)
    assert (found == 0).all()
    assert keep_group(found, 2) == "zero_variance"


def test_a_member_without_any_score_has_no_advantage_anywhere_and_leaves_the_others_alone():
    maps = np.random.default_rng(1).standard_normal((4, 1, 3, 3))
    scores = maps.mean((1, 2, 3))[None]
    [alone] = local_advantages([Credited(scores[:, :3], [1.0], [maps[:3]])], 0.2, "terms", 0.0, 5.0)
    scores[0, 3], maps[3] = NAN, NAN
    [found] = local_advantages([Credited(scores, [1.0], [maps])], 0.2, "terms", 0.0, 5.0)
    assert np.isnan(found[3]).all()
    np.testing.assert_allclose(found[:3], alone, atol=1e-12)
    assert keep_group(found, 3) is None
    assert keep_group(found, 4) == "below_min_group"


def test_a_floor_keeps_small_differences_small():
    maps = 1e-4 * np.random.default_rng(1).standard_normal((4, 1, 3, 3))
    for rule in RULES:
        [found] = local_advantages([Credited(maps.mean((1, 2, 3))[None], [1.0], [maps])], 0.2, rule, 0.1, 5.0)
        assert 0 < np.abs(found).max() < 0.01


@pytest.mark.parametrize(
    ("size", "cells", "expected"), [((64, 64), 16, (16, 16)), ((48, 64), 16, (12, 16)), ((1024, 8), 16, (16, 1))]
)
def test_cells_are_square_as_far_as_that_goes(size, cells, expected):
    assert grid(*size, cells) == expected


def images(members, *shape):
    generator = torch.Generator().manual_seed(3)
    truths = torch.rand(*shape, generator=generator)
    noise = torch.randn(members, *shape, generator=generator)
    strengths = torch.linspace(0, 0.4, members).reshape(-1, *(1,) * len(shape))
    return (truths + strengths * noise).clamp(0, 1), truths


def test_the_mean_of_the_ssim_map_is_ssim():
    predictions, truths = images(4, 2, 3, 40, 36)
    found = ssim_map(predictions, truths).double().mean((-2, -1))
    torch.testing.assert_close(found, ssim(predictions, truths), atol=2e-5, rtol=0)


@pytest.mark.parametrize("ceiling", [50.0, 12.0])
def test_means_of_the_psnr_map_differ_as_psnr_does_even_at_its_ceiling(ceiling):
    predictions, truths = images(5, 2, 3, 20, 24)
    contributed = psnr_map(predictions, truths, ceiling).double().mean((-2, -1))
    values = (psnr(predictions, truths) / ceiling).clamp(0, 1)
    torch.testing.assert_close(contributed - contributed[:1], values - values[:1], atol=1e-5, rtol=0)


def test_equal_members_contribute_nothing_to_psnr():
    predictions, truths = images(2, 3, 20, 24)
    found = psnr_map(predictions[1:].repeat(3, 1, 1, 1), truths, 50.0)
    assert float(found.abs().max()) < 1e-6


JUDGED = {
    "layer": sorted(TASKS),
    "composition": [name for name, task in sorted(TASKS.items()) if "image" in task.inputs],
    "boundary": [name for name, task in sorted(TASKS.items()) if "foreground" in task.targets],
    "alpha_mad": [name for name, task in sorted(TASKS.items()) if "foreground" in task.targets],
    "alpha_overlap": [name for name, task in sorted(TASKS.items()) if "foreground" in task.targets],
    "recomposition": ["layer_decomposition"],
}


@pytest.mark.parametrize(("term", "task"), [(term, task) for term, tasks in JUDGED.items() for task in tasks])
def test_contributions_of_shipped_terms_add_up_to_their_scores(term, task):
    scores = run_scorer(term, build(term, {}), example_group(task), cells=8)
    assert scores.reasons == (None,) * 4
    assert scores.cells_GLhw.shape[2:] == (8, 6)
    contributed = scores.cells_GLhw.astype(float).mean((1, 2, 3))
    np.testing.assert_allclose(contributed - contributed[0], scores.values_G - scores.values_G[0], atol=2e-5)


def test_a_perceptual_network_says_nothing_about_places():
    scores = run_scorer("layer", build("layer", {"metrics": ["ssim", "perceptual"]}), example_group("mask_matting"), 8)
    assert scores.cells_GLhw is None
    assert np.isfinite(scores.values_G).all()


class Broken:
    def __init__(self, contributions):
        self.contributions = lambda batch: contributions(batch)

    def score(self, batch):
        return [0.1, 0.2, 0.3, 0.4]


def test_contributions_of_another_shape_cost_the_term_its_scores():
    scores = run_scorer("mine", Broken(lambda batch: torch.zeros(4, 7, 3, 3)), example_group("mask_matting"), 8)
    assert np.isnan(scores.values_G).all()
    assert "contributions returned (4, 7, 3, 3), expected a tensor of shape (4, 1, 64, 48)" in scores.reasons[0]


def test_contributions_that_are_not_finite_cost_that_member_its_score():
    def maps(batch):
        found = torch.zeros(4, 1, 64, 48)
        found[2, 0, 5, 5] = NAN
        return found

    scores = run_scorer("mine", Broken(maps), example_group("mask_matting"), 8)
    assert scores.reasons == (None, None, "its contributions are not finite", None)
    assert np.isnan(scores.values_G[2])


def test_nobody_is_asked_for_contributions_without_local_credit():
    def never(batch):
        raise AssertionError

    scores = run_scorer("mine", Broken(never), example_group("mask_matting"))
    assert scores.reasons == (None,) * 4
