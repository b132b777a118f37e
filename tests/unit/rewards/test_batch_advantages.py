"""The advantage rules of a batch against derivations from their formulae, and the laws each of them obeys."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.config import validate
from common.errors import ConfigError, RewardError
from rewards.combine import RewardConfig, TermConfig, batch_advantages, group_advantages, keep_group

NAN = math.nan
RULES = ("terms", "sum", "global", "gdpo")
WHOLE = ("sum", "global", "gdpo")
"""Rules that judge only members with every weighted term."""
UNCLAMPED = 1e9

Batch = list[tuple[np.ndarray, list[float]]]


def found(rule: str, batch: Batch, floor: float = 0.0, clamp: float = UNCLAMPED) -> list[np.ndarray]:
    config = RewardConfig(terms=(TermConfig(name="layer"),), advantage=rule, std_floor=floor, clamp=clamp)
    return batch_advantages(batch, config)


def single(rule: str, *groups: list[float], **options: float) -> list[np.ndarray]:
    """Advantages of groups judged by one term."""
    return found(rule, [(np.array([group]), [1.0]) for group in groups], **options)


# The rules, spelled out: no line of them is shared with the code under test.


def population_std(known: np.ndarray) -> float:
    return math.sqrt(math.fsum((v - math.fsum(known) / len(known)) ** 2 for v in known) / len(known))


def divisor(std: float, floor: float) -> float:
    return max(std, floor) if floor > 0 else std + 1e-8


def z_score(values: np.ndarray, floor: float) -> np.ndarray:
    known = [float(v) for v in values if v == v]
    if len(set(known)) < 2:
        return values * 0
    return (values - math.fsum(known) / len(known)) / divisor(population_std(np.array(known)), floor)


def raw_mean(scores: np.ndarray, weights: list[float]) -> np.ndarray:
    used = [t for t, weight in enumerate(weights) if weight > 0]
    return sum(weights[t] * scores[t] for t in used) / sum(weights[t] for t in used)


def derived_terms(scores: np.ndarray, weights: list[float], floor: float) -> np.ndarray:
    standardised = [z_score(term, floor) for term in scores]
    members = []
    for g in range(scores.shape[1]):
        has = [(w, z[g]) for w, z in zip(weights, standardised, strict=True) if w > 0 and z[g] == z[g]]
        members.append(sum(w * v for w, v in has) / sum(w for w, _ in has) if has else NAN)
    return z_score(np.array(members), 1.0 if floor > 0 else 0.0)


def derived_gdpo(batch: Batch, floor: float) -> list[np.ndarray]:
    sums = [
        sum(w * z_score(term, floor) for w, term in zip(weights, scores, strict=True) if w > 0)
        for scores, weights in batch
    ]
    everyone = np.concatenate(sums)
    known = everyone[everyone == everyone]
    mean, std = math.fsum(known) / len(known), population_std(known)
    below = max(std, 1.0) if floor > 0 else std + 1e-8
    return [s * 0 if len(set(s[s == s])) < 2 else (s - mean) / below for s in sums]


def derived_global(batch: Batch, floor: float) -> list[np.ndarray]:
    means = [raw_mean(scores, weights) for scores, weights in batch]
    everyone = np.concatenate(means)
    below = divisor(population_std(everyone[everyone == everyone]), floor)
    out = []
    for m in means:
        known = m[m == m]
        out.append(m * 0 if len(set(known)) < 2 else (m - math.fsum(known) / len(known)) / below)
    return out


def derived(rule: str, batch: Batch, floor: float, clamp: float) -> list[np.ndarray]:
    if rule == "terms":
        out = [derived_terms(scores, weights, floor) for scores, weights in batch]
    elif rule == "sum":
        out = [z_score(raw_mean(scores, weights), floor) for scores, weights in batch]
    else:
        out = derived_global(batch, floor) if rule == "global" else derived_gdpo(batch, floor)
    return [np.minimum(np.maximum(a, -clamp), clamp) for a in out]


def drawn_batch(seed: int, missing: float = 0.0) -> Batch:
    """Groups of several sizes and numbers of terms on several scales; one of them constant, some terms unweighted."""
    rng = np.random.default_rng(seed)
    batch: Batch = []
    for number in range(int(rng.integers(2, 6))):
        terms, members = int(rng.integers(1, 5)), int(rng.integers(2, 10))
        scores = rng.normal(0.5, 0.3, (terms, members)) * rng.choice([0.1, 1.0, 7.0], (terms, 1))
        if number == 1:
            scores[:] = scores[:, :1]
        scores[rng.random(scores.shape) < missing] = NAN
        weights = rng.uniform(0.2, 2.0, terms) * (rng.random(terms) < 0.8)
        if not weights.any():
            weights[0] = 1.3
        batch.append((scores, weights.tolist()))
    return batch


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES)
def test_advantages_equal_the_formula_of_their_rule(rule, floor, missing):
    for seed in range(40):
        batch = drawn_batch(seed, missing)
        for clamp in (5.0, 0.8):
            pairs = zip(found(rule, batch, floor, clamp), derived(rule, batch, floor, clamp), strict=True)
            for ours, theirs in pairs:
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
def test_one_group_of_one_term_gives_the_published_values_under_every_rule(rule):
    [advantages] = single(rule, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(advantages, [-1.3416407, -0.4472136, 0.4472136, 1.3416407], atol=1e-7)


@pytest.mark.parametrize("rule", ["sum", "global"])
def test_the_offset_of_the_standard_deviation_is_the_published_one(rule):
    [advantages] = single(rule, [0.0, 2e-8])  # std 1e-8, as large as the offset
    np.testing.assert_allclose(advantages, [-0.5, 0.5], rtol=1e-12)


def test_the_rules_differ_in_what_two_groups_of_different_spread_are_worth():
    narrow, wide = [0.0, 1.0], [0.0, 3.0]
    # All rewards 0, 1, 0, 3: mean 1, variance (1 + 0 + 1 + 4) / 4.
    for rule, expected in {
        "terms": ([-1, 1], [-1, 1]),
        "sum": ([-1, 1], [-1, 1]),
        "global": (np.array([-0.5, 0.5]) / 1.5**0.5, np.array([-1.5, 1.5]) / 1.5**0.5),
        "gdpo": ([-1, 1], [-1, 1]),
    }.items():
        for ours, theirs in zip(single(rule, narrow, wide), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_only_the_sum_of_raw_terms_lets_a_term_of_larger_scale_outvote_the_other():
    scores = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 100.0, 100.0]])
    member = {rule: found(rule, [(scores, [1.0, 1.0])])[0][1] for rule in RULES}
    assert member["sum"] < -0.9
    assert member["global"] < -0.9
    assert member["terms"] == pytest.approx(0, abs=1e-6)
    assert member["gdpo"] == pytest.approx(0, abs=1e-6)


def test_gdpo_values_a_group_on_which_both_terms_agree_more_than_one_decided_by_a_single_term():
    agreed = np.array([[0.0, 1.0], [0.0, 1.0]])
    decided_by_one = np.array([[0.0, 1.0], [0.5, 0.5]])
    batch = [(agreed, [1.0, 1.0]), (decided_by_one, [1.0, 1.0])]
    # Sums of z: ±2 and ±1, variance of the batch (4 + 4 + 1 + 1) / 4.
    for ours, theirs in zip(found("gdpo", batch), ([-2, 2], [-1, 1]), strict=True):
        np.testing.assert_allclose(ours, np.array(theirs) / 2.5**0.5, atol=1e-6)
    for ours in found("sum", batch):
        np.testing.assert_allclose(ours, [-1, 1], atol=1e-6)


def test_with_a_floor_gdpo_divides_by_at_least_one():
    # One lively group among flat ones: the batch's std is below 1 and must not blow it up.
    groups = [[0.0, 1.0]] + [[0.5, 0.5]] * 3
    assert single("gdpo", *groups, floor=0.1)[0].tolist() == [-1.0, 1.0]
    np.testing.assert_allclose(single("gdpo", *groups)[0], [-2.0, 2.0], atol=1e-6)


@pytest.mark.parametrize("rule", ["sum", "global"])
def test_a_floor_bounds_the_division_by_a_small_spread(rule):
    scores = np.array([0.900, 0.901, 0.899, 0.900])
    np.testing.assert_allclose(single(rule, scores.tolist(), floor=0.05)[0], (scores - 0.9) / 0.05, atol=1e-12)
    assert np.abs(single(rule, scores.tolist())[0]).max() > 1.4


@pytest.mark.parametrize("rule", WHOLE)
def test_a_member_that_lacks_a_weighted_term_has_no_advantage_unless_terms_are_judged_one_by_one(rule):
    scores = np.array([[0.1, 0.5, 0.9, 0.4], [0.2, NAN, 0.6, 0.8]])
    batch = [(scores, [1.0, 2.0])]
    assert np.isnan(found(rule, batch)[0]).tolist() == [False, True, False, False]
    assert np.isfinite(found("terms", batch)[0]).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_term_without_weight_neither_counts_nor_costs_a_member_its_advantage(rule):
    judged, logged = [0.1, 0.5, 0.9], [NAN, 4.0, -7.0]
    with_it = found(rule, [(np.array([judged, logged]), [2.0, 0.0])])
    np.testing.assert_allclose(with_it[0], found(rule, [(np.array([judged]), [2.0])])[0], atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("error")
def test_a_group_whose_terms_are_only_logged_has_no_advantages(rule):
    logged, judged = (np.array([[0.1, 0.2]]), [0.0]), (np.array([[0.1, 0.2]]), [1.0])
    ours = found(rule, [logged, judged])
    assert np.isnan(ours[0]).all()
    np.testing.assert_array_equal(ours[1], found(rule, [judged])[0])


@pytest.mark.parametrize("rule", ["sum", "global"])
def test_a_member_without_an_advantage_does_not_change_the_others(rule):
    whole = np.array([[0.1, 0.5, 0.9], [0.2, 0.4, 0.1]])
    other = (np.array([[0.3, 0.8]]), [1.0])
    wider = np.concatenate([whole, [[50.0], [NAN]]], axis=1)
    expected = found(rule, [(whole, [1.0, 2.0]), other])
    ours = found(rule, [(wider, [1.0, 2.0]), other])
    np.testing.assert_allclose(ours[0][:-1], expected[0], atol=1e-12)
    np.testing.assert_allclose(ours[1], expected[1], atol=1e-12)


def test_in_gdpo_a_member_that_lacks_one_term_still_counts_where_it_was_scored():
    scores = np.array([[0.0, 1.0, 5.0], [0.0, 1.0, NAN]])
    lone = found("gdpo", [(scores[:, :2], [1.0, 1.0]), (np.array([[0.0, 1.0]]), [1.0])])
    ours = found("gdpo", [(scores, [1.0, 1.0]), (np.array([[0.0, 1.0]]), [1.0])])
    assert np.abs(ours[0][:2] - lone[0]).max() > 0.1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("error")
def test_groups_without_any_score_are_missing_and_leave_the_others_alone(rule):
    dead = (np.full((2, 3), NAN), [1.0, 1.0])
    alive = (np.array([[0.1, 0.5, 0.7], [0.3, 0.1, 0.9]]), [1.0, 1.0])
    ours = found(rule, [dead, alive, dead])
    assert np.isnan(ours[0]).all()
    assert np.isnan(ours[2]).all()
    np.testing.assert_array_equal(ours[1], found(rule, [alive])[0])
    assert np.isnan(found(rule, [dead])[0]).all()
    assert found(rule, []) == []


@pytest.mark.parametrize("rule", RULES)
def test_only_the_batch_rules_look_at_the_other_groups(rule):
    group = (np.array([[0.1, 0.5, 0.9], [0.2, 0.4, 0.1]]), [1.0, 2.0])
    wild = (np.array([[-40.0, 90.0], [-3.0, 8.0]]), [1.0, 2.0])
    constant = (np.array([[0.2, 0.2]] * 2), [1.0, 2.0])
    alone, beside = found(rule, [group])[0], found(rule, [group, wild, constant])[0]
    assert np.array_equal(alone, beside) == (rule in ("terms", "sum"))


@pytest.mark.parametrize("rule", RULES)
def test_single_precision_scores_are_judged_in_double_precision(rule):
    batch = drawn_batch(3)
    single_precision = [(scores.astype(np.float32), weights) for scores, weights in batch]
    rounded = [(scores.astype(np.float64), weights) for scores, weights in single_precision]
    for ours, theirs in zip(found(rule, single_precision), found(rule, rounded), strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("scores", "weights", "words"),
    [
        (np.zeros((2, 3)), [1.0], "one weight per term"),
        (np.zeros((1, 3)), [-1.0], "not negative"),
        (np.array([[0.0, math.inf]]), [1.0], "infinities"),
    ],
)
def test_one_unusable_group_is_refused_under_every_rule(rule, scores, weights, words):
    with pytest.raises(RewardError, match=words):
        found(rule, [(np.array([[0.1, 0.2]]), [1.0]), (scores, weights)])


def test_the_papers_rule_is_the_default_and_an_unknown_one_is_refused_by_name():
    terms = {"terms": [{"name": "layer"}]}
    assert validate(RewardConfig, terms, "test").advantage == "terms"
    assert [validate(RewardConfig, terms | {"advantage": rule}, "test").advantage for rule in RULES] == list(RULES)
    with pytest.raises(ConfigError, match=r"advantage: .*'mean'"):
        validate(RewardConfig, terms | {"advantage": "mean"}, "test")


# Laws. Scores lie on a grid: either equal or apart, so that no law below drowns in rounding.

score = st.integers(-20, 20).map(lambda value: value / 20)


@st.composite
def groups(draw, missing: bool):
    terms, members = draw(st.integers(1, 3)), draw(st.integers(2, 7))
    entry = st.one_of(score, st.just(NAN)) if missing else score
    rows = draw(st.lists(st.lists(entry, min_size=members, max_size=members), min_size=terms, max_size=terms))
    return np.array(rows), draw(st.lists(st.integers(1, 5).map(float), min_size=terms, max_size=terms))


def batches(missing: bool = True):
    return st.lists(groups(missing), min_size=1, max_size=4)


def assert_same(ours, theirs, atol: float = 1e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, equal_nan=True)


@settings(deadline=None)
@given(st.data(), st.sampled_from(RULES), st.sampled_from([0.0, 0.1]))
def test_reordering_the_members_of_a_group_reorders_their_advantages(data, rule, floor):
    # In gdpo, terms that cancel up to rounding are told from those that cancel exactly; the batch's mean, which is 0
    # for whole groups, is what they then differ by.
    batch = data.draw(batches(missing=rule != "gdpo"))
    orders = [data.draw(st.permutations(range(scores.shape[1]))) for scores, _ in batch]
    moved = [(scores[:, order], weights) for (scores, weights), order in zip(batch, orders, strict=True)]
    expected = [a[order] for a, order in zip(found(rule, batch, floor), orders, strict=True)]
    assert_same(found(rule, moved, floor), expected)


@settings(deadline=None)
@given(st.data(), st.sampled_from(RULES), st.sampled_from([0.0, 0.1]), batches())
def test_reordering_the_groups_reorders_their_advantages(data, rule, floor, batch):
    order = data.draw(st.permutations(range(len(batch))))
    expected = found(rule, batch, floor)
    assert_same(found(rule, [batch[i] for i in order], floor), [expected[i] for i in order])


@settings(deadline=None)
@given(st.data(), st.sampled_from(["terms", "sum"]), st.sampled_from([0.0, 0.1]), batches())
def test_a_prompt_that_scores_higher_throughout_gives_the_same_advantages(data, rule, floor, batch):
    moved = [
        (scores + np.array([[data.draw(score)] for _ in scores]), weights) for scores, weights in batch
    ]  # one offset for each group and term
    assert_same(found(rule, moved, floor), found(rule, batch, floor))


@settings(deadline=None)
@given(score, st.sampled_from([0.0, 0.1]), batches())
def test_under_the_global_rule_an_offset_of_all_scores_changes_nothing(offset, floor, batch):
    assert_same(found("global", [(scores + offset, w) for scores, w in batch], floor), found("global", batch, floor))


def test_under_the_global_rule_an_offset_of_one_group_scales_the_whole_batch_by_one_factor():
    first, *others = drawn_batch(5)
    before, after = ([*others, (first[0] + offset, first[1])] for offset in (0.0, 10.0))

    def spread(batch: Batch) -> float:
        return float(np.concatenate([raw_mean(*group) for group in batch]).std()) + 1e-8

    factor = spread(before) / spread(after)
    assert factor < 0.9
    assert_same(found("global", after), [a * factor for a in found("global", before)], atol=1e-9)


@settings(deadline=None)
@given(
    st.sampled_from(RULES),
    st.sampled_from([0.0, 0.05]),
    st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(2, 40),
    batches(),
)
def test_a_group_of_equal_scores_has_exactly_zero_advantage_whatever_stands_beside_it(
    rule, floor, terms, members, others
):
    values, weights = [value for value, _ in terms], [weight for _, weight in terms]
    constant = (np.array([[value] * members for value in values]), weights)
    advantages = found(rule, [*others, constant], floor)[-1]
    assert np.all(advantages == 0.0)
    assert keep_group(advantages, 2) == "zero_variance"


@pytest.mark.parametrize("rule", RULES)
def test_a_group_of_equal_scores_is_exactly_zero_for_any_scale_weights_and_group_size(rule):
    rng = np.random.default_rng(0)
    for _ in range(300):
        terms, members = int(rng.integers(1, 5)), int(rng.integers(2, 20))
        scores = np.repeat(rng.uniform(0, 100, (terms, 1)), members, axis=1)
        for others in ([], drawn_batch(1)):
            advantages = found(rule, [(scores, rng.uniform(0.1, 2, terms).tolist()), *others])[0]
            assert np.all(advantages == 0.0), advantages


@pytest.mark.parametrize("rule", RULES)
def test_terms_that_cancel_leave_no_signal_whatever_the_mean_of_the_batch(rule):
    # A member without its second score counts in the first term alone, so that the sums of its group are not centred.
    beside = (np.array([[0.0, 1.0, 5.0], [0.0, 1.0, NAN]]), [1.0, 1.0])
    rng = np.random.default_rng(0)
    for members in range(3, 12):
        term = rng.uniform(0, 1, members)
        advantages = found(rule, [(np.stack([term, 0.9 - term]), [1.0, 1.0]), beside])
        assert keep_group(advantages[0], 2) == "zero_variance", advantages[0]
        assert keep_group(advantages[1], 2) is None


@settings(deadline=None)
@given(st.sampled_from([0.0, 0.1]), batches())
def test_judging_terms_one_by_one_is_the_papers_code_group_by_group(floor, batch):
    ours = found("terms", batch, floor, clamp=1.3)
    for advantages, (scores, weights) in zip(ours, batch, strict=True):
        np.testing.assert_array_equal(advantages, group_advantages(scores, weights, floor, 1.3))


@settings(deadline=None)
@given(batches())
def test_standardised_sums_are_bounded_by_the_root_of_the_group_size(batch):
    for advantages in found("sum", batch):
        valid = advantages[~np.isnan(advantages)]
        assert np.abs(valid).max(initial=0.0) <= math.sqrt(max(len(valid) - 1, 0)) + 1e-6
        assert abs(valid.sum()) < 1e-6


@settings(deadline=None)
@given(st.sampled_from([0.0, 0.1]), groups(missing=True))
def test_with_a_single_group_the_batch_is_the_group(floor, group):
    assert_same(found("global", [group], floor), found("sum", [group], floor))


@settings(deadline=None)
@given(st.integers(2, 7).flatmap(lambda g: st.lists(st.lists(score, min_size=g, max_size=g), min_size=1, max_size=4)))
def test_for_one_term_and_groups_of_one_size_gdpo_is_the_papers_rule(rows):
    assume(all(len(set(row)) > 1 for row in rows))
    assert_same(single("gdpo", *rows), single("terms", *rows), atol=1e-5)


def spread_of_sums(batch: Batch) -> float:
    """Where the terms of every group cancel, the rule's 1e-8 is all that is left of the batch's spread."""
    sums = np.concatenate([sum(w * z_score(t, 0.0) for w, t in zip(ws, ts, strict=True)) for ts, ws in batch])
    return float(np.nanstd(sums)) if np.isfinite(sums).any() else 0.0


@settings(deadline=None)
@given(batches(missing=False))
def test_gdpo_standardises_the_batch_of_whole_groups(batch):
    assume(spread_of_sums(batch) > 1e-3)
    advantages = np.concatenate(found("gdpo", batch))
    assert abs(advantages.mean()) < 1e-6
    assert advantages.std() == pytest.approx(1, abs=1e-3)


@settings(deadline=None)
@given(st.sampled_from(RULES), st.sampled_from([2.0, 8.0]), batches())
def test_only_the_ratios_of_the_weights_matter(rule, factor, batch):
    assume(rule != "gdpo" or spread_of_sums(batch) > 1e-1)
    heavier = [(scores, [w * factor for w in weights]) for scores, weights in batch]
    assert_same(found(rule, heavier), found(rule, batch))


@settings(deadline=None)
@given(st.sampled_from(RULES), st.sampled_from([0.3, 1.0, 2.0]), batches())
def test_the_clamp_bounds_every_rule_and_changes_nothing_inside(rule, clamp, batch):
    assert_same(found(rule, batch, clamp=clamp), [np.clip(a, -clamp, clamp) for a in found(rule, batch)], atol=0)
