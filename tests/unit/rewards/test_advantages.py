"""Advantages against the literal formula, and the laws they obey."""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.config import validate
from common.errors import ConfigError, RewardError
from rewards.base import Scores
from rewards.combine import RewardConfig, group_advantages, keep_group, scalar_rewards, stack_scores

NAN = math.nan


def literal_advantages(scores: list[list[float]], weights: list[float], clamp: float) -> list[float]:
    """OmniAlpha's code rule, spelled out: z per term over its valid members, weighted mean, z again, clamp.

    Equal values give 0, as they do without rounding.
    """

    def z(values: list[float]) -> list[float]:
        valid = [v for v in values if not math.isnan(v)]
        if len(set(valid)) < 2:
            return [v if math.isnan(v) else 0.0 for v in values]
        mean = math.fsum(valid) / len(valid)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in valid) / len(valid))
        return [(v - mean) / (std + 1e-8) for v in values]

    standardised = [z(term) for term in scores]
    combined = []
    for member in range(len(scores[0])):
        pairs = [(w, t[member]) for w, t in zip(weights, standardised, strict=True) if not math.isnan(t[member])]
        combined.append(sum(w * v for w, v in pairs) / sum(w for w, _ in pairs) if pairs else NAN)
    return [v if math.isnan(v) else max(-clamp, min(clamp, v)) for v in z(combined)]


# Scores on a grid: either equal or apart, so that no law below drowns in rounding.
score = st.integers(-20, 20).map(lambda value: value / 20)


@st.composite
def groups(draw, missing: bool = True):
    terms, members = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    entry = st.one_of(score, st.just(NAN)) if missing else score
    scores = draw(st.lists(st.lists(entry, min_size=members, max_size=members), min_size=terms, max_size=terms))
    weights = draw(st.lists(st.integers(1, 5).map(float), min_size=terms, max_size=terms))
    return np.array(scores), np.array(weights)


@settings(deadline=None)
@given(groups())
def test_advantages_equal_the_literal_formula_of_the_papers_code(group):
    scores, weights = group
    combined = literal_advantages(scores.tolist(), weights.tolist(), 1e9)
    # Terms that cancel exactly leave rounding noise in either order of summation; the rule's 1e-8 keeps it tiny.
    np.testing.assert_allclose(
        group_advantages(scores, weights, 0.0, 5.0), np.clip(combined, -5, 5), atol=1e-6, equal_nan=True
    )


def test_a_group_worked_by_hand():
    # Term 1: mean 2, population std √(8/3), z = (−√1.5, 0, √1.5). Term 2 is constant and contributes 0 to everyone.
    scores = np.array([[0.0, 2.0, 4.0], [0.7, 0.7, 0.7]])
    step = 1.5**0.5
    found = group_advantages(scores, [1.0, 1.0], 0.0, 5.0)
    np.testing.assert_allclose(found, [-step, 0.0, step], atol=1e-6)


@settings(deadline=None)
@given(groups(), st.randoms(use_true_random=False))
def test_reordering_the_members_reorders_the_advantages(group, random):
    scores, weights = group
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    for floor in (0.0, 0.1):
        expected = group_advantages(scores, weights, floor, 5.0)[order]
        np.testing.assert_allclose(group_advantages(scores[:, order], weights, floor, 5.0), expected, atol=1e-6)


@settings(deadline=None)
@given(groups(), st.integers(1, 50), score)
def test_without_a_floor_the_scale_and_offset_of_a_term_do_not_matter(group, scale, offset):
    scores, weights = group
    # A tiny floor gives the mean of the terms before it is normalised again. Where the terms cancel, all that is left
    # is what the rule's 1e-8 adds, which does depend on the scale and which the second normalisation blows up.
    assume(not np.isnan(scores).all())
    assume(np.nanstd(group_advantages(scores, weights, 1e-300, 1e9)) > 1e-2)
    moved = scores.copy()
    moved[0] = moved[0] * scale + offset
    expected = group_advantages(scores, weights, 0.0, 5.0)
    np.testing.assert_allclose(group_advantages(moved, weights, 0.0, 5.0), expected, atol=1e-3)


@settings(deadline=None)
@given(groups(), st.integers(2, 9))
def test_only_the_ratios_of_the_weights_matter(group, factor):
    scores, weights = group
    expected = group_advantages(scores, weights, 0.0, 5.0)
    np.testing.assert_allclose(group_advantages(scores, weights * factor, 0.0, 5.0), expected, atol=1e-6)
    np.testing.assert_allclose(scalar_rewards(scores, weights * factor), scalar_rewards(scores, weights), atol=1e-12)


@settings(deadline=None)
@given(groups())
def test_advantages_have_mean_zero_and_are_bounded_by_the_root_of_the_group_size(group):
    scores, weights = group
    advantages = group_advantages(scores, weights, 0.0, 1e9)
    valid = advantages[~np.isnan(advantages)]
    assume(len(valid))
    assert abs(valid.mean()) < 1e-6
    assert np.abs(valid).max() <= math.sqrt(max(len(valid) - 1, 0)) + 1e-6


@settings(deadline=None)
@given(groups())
def test_a_member_is_dropped_exactly_when_every_term_misses_it(group):
    scores, weights = group
    dropped = np.isnan(group_advantages(scores, weights, 0.0, 5.0))
    np.testing.assert_array_equal(dropped, np.isnan(scores).all(axis=0))


@settings(deadline=None)
@given(groups())
def test_a_dropped_member_does_not_change_the_others(group):
    scores, weights = group
    wider = np.concatenate([scores, np.full((len(scores), 1), NAN)], axis=1)
    np.testing.assert_allclose(
        group_advantages(wider, weights, 0.0, 5.0)[:-1], group_advantages(scores, weights, 0.0, 5.0), atol=1e-6
    )


def test_a_missing_score_is_not_a_score_of_zero():
    scores = np.array([[0.8, 0.9, NAN, 0.85], [0.1, 0.2, 0.9, 0.3]])
    as_zero = np.nan_to_num(scores)
    assert group_advantages(scores, [1.0, 1.0], 0.0, 5.0)[2] > 1.0
    assert group_advantages(as_zero, [1.0, 1.0], 0.0, 5.0)[2] < 0.5


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-12, 0.7 + 1e-9, -5.0])
@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_constant_groups_have_exactly_zero_advantage(value, floor):
    for members in range(1, 20):
        scores = np.full((3, members), value)
        assert np.all(group_advantages(scores, np.ones(3), floor, 5.0) == 0.0)
        assert keep_group(group_advantages(scores, np.ones(3), floor, 5.0), 1) == "zero_variance"


def test_the_clamp_binds_from_a_group_of_twenty_seven():
    def best(members: int) -> float:
        scores = np.zeros((1, members))
        scores[0, 0] = 1.0
        return group_advantages(scores, [1.0], 0.0, 5.0)[0]

    assert best(26) == pytest.approx(5.0, abs=1e-6)
    assert best(26) < 5.0
    assert best(27) == 5.0


def test_without_a_floor_a_near_constant_term_is_blown_up_and_with_one_it_stays_small():
    scores = np.array([[0.900, 0.901, 0.899, 0.900]])
    assert np.abs(group_advantages(scores, [1.0], 0.0, 5.0)).max() > 1.4
    floored = group_advantages(scores, [1.0], 0.05, 5.0)
    np.testing.assert_allclose(floored, (scores[0] - scores[0].mean()) / 0.05, atol=1e-12)


def test_a_floor_shrinks_a_near_constant_term_beside_a_lively_one():
    lively, flat = [0.1, 0.9, 0.5, 0.5], [0.501, 0.499, 0.502, 0.498]
    only_lively = group_advantages(np.array([lively, [0.5] * 4]), [1.0, 1.0], 0.05, 5.0)
    both = group_advantages(np.array([lively, flat]), [1.0, 1.0], 0.05, 5.0)
    np.testing.assert_allclose(both, only_lively, atol=0.05)


def test_with_a_floor_the_second_division_is_by_at_least_one():
    # Both terms have std above the floor; their mean has std < 1 and must not be blown up again.
    scores = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    np.testing.assert_allclose(group_advantages(scores, [1.0, 1.0], 0.1, 5.0), [-1, 0, 0, 1], atol=1e-12)
    root = 2**0.5
    np.testing.assert_allclose(group_advantages(scores, [1.0, 1.0], 0.0, 5.0), [-root, 0, 0, root], atol=1e-6)


def test_a_term_of_weight_zero_does_not_count_even_where_it_is_the_only_one():
    scores = np.array([[0.1, 0.2, NAN], [9.0, 1.0, 5.0]])
    advantages = group_advantages(scores, [1.0, 0.0], 0.0, 5.0)
    np.testing.assert_allclose(advantages[:2], [-1.0, 1.0], atol=1e-6)
    assert math.isnan(advantages[2])


def test_scalar_rewards_are_weighted_means_of_the_terms_a_member_has():
    scores = np.array([[1.0, NAN, NAN], [0.5, 0.25, NAN]])
    np.testing.assert_array_equal(scalar_rewards(scores, [3.0, 1.0]), [0.875, 0.25, NAN])


@pytest.mark.parametrize(
    ("scores", "weights", "words"),
    [
        (np.zeros((2, 3)), [1.0], "one weight per term"),
        (np.zeros(3), [1.0], "pass scores"),
        (np.zeros((0, 3)), [], "at least one term"),
        (np.zeros((1, 3)), [-1.0], "not negative"),
        (np.zeros((1, 3)), [NAN], "finite"),
        (np.array([[0.0, math.inf]]), [1.0], "infinities"),
    ],
)
def test_unusable_scores_or_weights_are_refused(scores, weights, words):
    with pytest.raises(RewardError, match=words):
        group_advantages(scores, weights, 0.0, 5.0)


@pytest.mark.parametrize(
    ("advantages", "min_group", "reason"),
    [
        ([1.0, -1.0, NAN], 2, None),
        ([1.0, -1.0, NAN], 3, "below_min_group"),
        ([NAN, NAN], 2, "below_min_group"),
        ([], 2, "below_min_group"),
        ([0.0, 0.0, NAN], 2, "zero_variance"),
        ([1e-9, -1e-9], 2, "zero_variance"),
        ([1e-3, -1e-3], 2, None),
    ],
)
def test_groups_are_kept_or_dropped_with_a_reason(advantages, min_group, reason):
    assert keep_group(np.array(advantages), min_group) == reason


def test_terms_that_cancel_leave_no_signal():
    scores = np.array([[0.1, 0.7, 0.4, 0.3], [-0.1, -0.7, -0.4, -0.3]])
    assert keep_group(group_advantages(scores, [1.0, 1.0], 0.0, 5.0), 2) == "zero_variance"


def scores_of(name: str, values: list[float]) -> Scores:
    reasons = tuple("judge timed out" if math.isnan(value) else None for value in values)
    return Scores(name, np.array(values), reasons)


def test_stacking_keeps_missing_scores_or_stops_with_their_reason():
    scores = [scores_of("layer", [0.1, 0.2]), scores_of("judge", [0.3, NAN])]
    np.testing.assert_array_equal(stack_scores(scores, "drop", "step 3"), [[0.1, 0.2], [0.3, NAN]])
    with pytest.raises(RewardError, match="step 3, group 7: reward 'judge' has no score for member 1: judge timed out"):
        stack_scores(scores, "fail", "step 3, group 7")


def test_terms_of_different_groups_do_not_stack():
    with pytest.raises(RewardError, match=r"score \[1, 2\] members"):
        stack_scores([scores_of("layer", [0.1]), scores_of("judge", [0.3, 0.1])], "drop", "step 3")


def test_a_config_of_terms_reads_from_plain_values():
    config = validate(
        RewardConfig,
        {
            "terms": [
                {"name": "layer", "params": {"metrics": ["ssim"]}},
                {"name": "mine", "scorer": "scorer.py:f", "weight": 2},
            ]
        },
        "test",
    )
    assert [(term.source, term.weight) for term in config.terms] == [("layer", 1.0), ("scorer.py:f", 2.0)]
    assert (config.std_floor, config.clamp, config.min_group, config.missing) == (0.0, 5.0, 2, "drop")
    assert validate(RewardConfig, json.loads(config.model_dump_json()), "again") == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"terms": []}, "terms"),
        ({"terms": [{"name": "layer"}, {"name": "layer"}]}, "'layer' occurs more than once"),
        ({"terms": [{"name": "layer", "weight": -1.0}]}, "weight"),
        ({"terms": [{"name": "layer", "weight": 0.0}]}, "every term has weight 0"),
        ({"terms": [{"name": "layer", "wieght": 1.0}]}, "did you mean 'weight'"),
        ({"terms": [{"name": "layer"}], "min_group": 1}, "min_group"),
        ({"terms": [{"name": "layer"}], "missing": "zero"}, "missing"),
        ({"terms": [{"name": "layer"}], "clamp": 0.0}, "clamp"),
        ({"terms": [{"name": "layer"}], "std_floor": -0.1}, "std_floor"),
    ],
)
def test_unusable_configs_name_the_field(values, words):
    with pytest.raises(ConfigError, match=words):
        validate(RewardConfig, values, "test")
