"""Intervals of paired differences: coverage, width, and what they refuse."""

import math

import numpy as np
import pytest

from common.errors import DataError
from rewards.statistics import cluster_mean_interval, cluster_t_interval, paired_bootstrap


def crossed(rng: np.random.Generator, side: int, photo: float, thing: float, noise: float) -> np.ndarray:
    """side × side records of mean 0 with photo, object and record effects of the given standard deviations."""
    return (
        photo * rng.standard_normal((side, 1))
        + thing * rng.standard_normal((1, side))
        + noise * rng.standard_normal((side, side))
    ).ravel()


def names(side: int) -> tuple[list[str], list[str]]:
    rows, columns = np.divmod(np.arange(side * side), side)
    return [f"photo{row}" for row in rows], [f"object{column}" for column in columns]


def width(interval: tuple[float, float, float]) -> float:
    return interval[2] - interval[1]


def test_the_interval_covers_the_true_mean_where_the_imagewise_one_does_not():
    rng = np.random.default_rng(0)
    side, trials = 15, 150
    photos, objects = names(side)
    records = [str(index) for index in range(side * side)]
    covered = {"two-way": 0, "imagewise": 0}
    for trial in range(trials):
        differences = crossed(rng, side, photo=1.0, thing=1.0, noise=1.0)
        _, low, high = paired_bootstrap(differences, photos, objects, draws=200, seed=trial)
        covered["two-way"] += low <= 0 <= high
        _, low, high = cluster_mean_interval(differences, records, draws=200, seed=trial)
        covered["imagewise"] += low <= 0 <= high
    assert 0.88 <= covered["two-way"] / trials <= 0.995
    assert covered["imagewise"] / trials < 0.6


@pytest.mark.parametrize(("photo", "thing"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_the_interval_is_wider_than_the_imagewise_one_when_clusters_correlate(photo, thing):
    differences = crossed(np.random.default_rng(1), 15, photo, thing, noise=0.3)
    photos, objects = names(15)
    imagewise = cluster_mean_interval(differences, [str(index) for index in range(225)], seed=0)
    assert width(paired_bootstrap(differences, photos, objects, seed=0)) > 2 * width(imagewise)


def test_the_width_agrees_with_the_variance_of_the_crossed_model():
    side, photo, thing, noise = 40, 1.0, 0.5, 0.5
    differences = crossed(np.random.default_rng(2), side, photo, thing, noise)
    grid = differences.reshape(side, side)
    photos, objects = names(side)
    # Estimated variance of the mean: cluster means over photos plus those over objects.
    variance = grid.mean(axis=1).var() / side + grid.mean(axis=0).var() / side
    assert width(paired_bootstrap(differences, photos, objects, seed=0)) == pytest.approx(
        2 * 1.96 * math.sqrt(variance), rel=0.12
    )


def test_where_every_record_has_its_own_clusters_the_interval_is_root_three_too_wide():
    differences = np.random.default_rng(3).standard_normal(400)
    own = [str(index) for index in range(400)]
    ratio = width(paired_bootstrap(differences, own, own, seed=0)) / width(cluster_mean_interval(differences, own))
    assert ratio == pytest.approx(math.sqrt(3), rel=0.1)


def test_without_photos_only_objects_are_resampled():
    differences = np.random.default_rng(4).standard_normal(60)
    objects = [str(index // 3) for index in range(60)]
    assert paired_bootstrap(differences, [None] * 60, objects, seed=5) == cluster_mean_interval(
        differences, objects, seed=5
    )


def test_a_record_without_a_photo_ignores_the_photos_draws():
    # Photo records all differ by 0, the photoless one by 1: its weight alone moves the mean.
    found = paired_bootstrap([0.0, 0.0, 1.0], ["a", "b", None], ["x", "y", "z"], draws=500)
    assert found[0] == pytest.approx(1 / 3)
    assert found[1] == 0.0
    assert found[2] == 1.0


def test_the_mean_is_that_of_the_records_and_lies_in_the_interval():
    differences = np.random.default_rng(6).standard_normal(225) + 3
    mean, low, high = paired_bootstrap(differences, *names(15))
    assert mean == pytest.approx(differences.mean())
    assert low < mean < high


def test_equal_seeds_give_equal_intervals_and_others_nearly():
    differences = np.random.default_rng(7).standard_normal(225)
    first, again = (paired_bootstrap(differences, *names(15), seed=1) for _ in range(2))
    other = paired_bootstrap(differences, *names(15), seed=2)
    assert first == again
    assert first != other
    assert other == pytest.approx(first, abs=0.05)


def test_shifting_and_scaling_the_differences_shifts_and_scales_the_interval():
    differences = np.random.default_rng(8).standard_normal(225)
    base = np.array(paired_bootstrap(differences, *names(15)))
    np.testing.assert_allclose(paired_bootstrap(2 * differences + 1, *names(15)), 2 * base + 1, atol=1e-9)


def test_a_draw_that_misses_every_record_is_replaced():
    for seed in range(20):
        _, low, high = paired_bootstrap([1.0, 2.0], ["a", "b"], ["x", "y"], draws=1, seed=seed)
        assert 1.0 <= low == high <= 2.0


def test_one_cluster_has_no_interval():
    mean, low, high = paired_bootstrap([1.0, 2.0], ["a", "a"], ["x", "x"])
    assert mean == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    ("differences", "photos", "objects", "draws", "words"),
    [
        ([], [], [], 10, "one number per record"),
        ([1.0, 2.0], ["a"], ["x", "y"], 10, "one of each per record"),
        ([1.0, math.nan], ["a", "b"], ["x", "y"], 10, "difference 1 is nan"),
        ([1.0, 2.0], ["a", "b"], ["x", None], 10, "without an object"),
        ([1.0, 2.0], ["a", "b"], ["x", "y"], 0, "at least one draw"),
    ],
)
def test_unusable_records_are_refused(differences, photos, objects, draws, words):
    with pytest.raises(DataError, match=words):
        paired_bootstrap(differences, photos, objects, draws)


def test_the_t_interval_agrees_with_the_percentile_one_where_there_are_many_clusters():
    differences = crossed(np.random.default_rng(9), 40, photo=1.0, thing=0.5, noise=0.5)
    t, percentile = (f(differences, *names(40), seed=0) for f in (cluster_t_interval, paired_bootstrap))
    assert t[0] == pytest.approx(percentile[0], rel=1e-12)  # numpy may sum in another order on another processor
    assert t == pytest.approx(percentile, abs=0.08)


def test_at_high_confidence_few_clusters_are_not_believed_by_the_t_interval():
    """Four objects on one side of 0: chance in one of eight cases, and no percentile interval can say so."""
    differences, objects = [0.1, 0.2, 0.3, 0.2], list("abcd")
    assert cluster_mean_interval(differences, objects)[1] > 0
    _, low, high = cluster_t_interval(differences, [None] * 4, objects, confidence=0.999)
    assert low < 0 < high


@pytest.mark.parametrize("confidence", [0.95, 0.995])
@pytest.mark.parametrize("own", [True, False], ids=["own photos", "shared photos"])
def test_the_t_interval_covers_the_true_mean_as_often_as_it_says(confidence, own):
    draw, trials, side, missed = np.random.default_rng(10), 300, 5, 0
    for trial in range(trials):
        if own:
            differences, photos = draw.standard_normal(10), [str(k) for k in range(10)]
            objects = photos
        else:
            differences, (photos, objects) = crossed(draw, side, photo=1.0, thing=1.0, noise=0.2), names(side)
        _, low, high = cluster_t_interval(differences, photos, objects, confidence, draws=150, seed=trial)
        missed += not low <= 0 <= high
    assert missed / trials <= (1 - confidence) + 3 * math.sqrt((1 - confidence) / trials)


def test_where_every_record_has_its_own_clusters_the_t_interval_is_not_too_wide():
    differences = np.random.default_rng(3).standard_normal(400)
    own = [str(index) for index in range(400)]
    assert width(cluster_t_interval(differences, own, own)) == pytest.approx(2 * 1.96 / 20, rel=0.1)
    photos = [str(index // 4) for index in range(400)]
    plain = cluster_t_interval(differences, photos, own)
    assert plain == cluster_t_interval(differences, [None] * 400, photos)


def test_the_t_interval_refuses_what_it_cannot_use_and_is_none_for_one_cluster():
    for objects in (["x", "y", "z"], ["x", "y", "y"], ["x", "x", "x"]):
        assert math.isnan(cluster_t_interval([1.0, 2.0, 3.0], ["a", "a", "a"], objects)[1])
    with pytest.raises(DataError, match="confidence 1"):
        cluster_t_interval([1.0, 2.0], ["a", "b"], ["x", "y"], confidence=1.0)
    with pytest.raises(DataError, match="one of each per record"):
        cluster_t_interval([1.0, 2.0], ["a"], ["x", "y"])
