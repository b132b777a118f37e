"""The Fréchet distance of feature clouds against SciPy's matrix root and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from common.errors import DataError
from rewards.statistics import frechet_distance, frechet_distance_of_moments


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, literally."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(covariance_a @ covariance_b).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b - 2 * root))


def cloud(count: int, size: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, size)) @ rng.standard_normal((size, size)) + shift


@pytest.mark.parametrize(("n", "m"), [(40, 60), (200, 30), (300, 300)])
def test_it_equals_the_matrix_root_formula(n, m):
    a, b = cloud(n, 7, 0), cloud(m, 7, 1, shift=0.3)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


def test_with_fewer_samples_than_features_it_equals_the_formula_in_the_features_that_vary():
    # Rotating a cloud that fills 5 dimensions into 50 leaves all distances as they are.
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((50, 50)))[0][:5]
    a, b = cloud(20, 5, 0), cloud(12, 5, 1, shift=0.5)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(by_matrix_root(a, b), rel=1e-8)


def test_it_equals_the_closed_form_for_independent_features():
    deviations = np.array([[1.0, 2.0, 0.5], [3.0, 1.0, 0.5]])
    expected = np.square([0.5, 0, -1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    moments = [np.zeros(3), np.diag(deviations[0] ** 2), np.array([0.5, 0, -1]), np.diag(deviations[1] ** 2)]
    assert frechet_distance_of_moments(*moments) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [4, 100])
def test_samples_and_their_moments_have_the_same_distance(count):
    a, b = cloud(count, 6, 0), cloud(2 * count, 6, 1, shift=-1)
    moments = [entry for x in (a, b) for entry in (x.mean(axis=0), np.cov(x, rowvar=False))]
    assert frechet_distance_of_moments(*moments) == pytest.approx(frechet_distance(a, b), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 12), m=st.integers(2, 12), size=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_it_is_symmetric_never_negative_and_zero_for_a_cloud_and_itself(n, m, size, seed):
    a, b = cloud(n, size, seed), cloud(m, size, seed + 1)
    scale = np.square(a).mean() + np.square(b).mean()
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9 * scale * size)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * scale * size)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.1, 10))
def test_moving_a_cloud_costs_the_squared_way_and_scaling_both_scales_it(seed, factor):
    a, b = cloud(9, 4, seed), cloud(7, 4, seed + 1)
    way = np.random.default_rng(seed).standard_normal(4)
    assert frechet_distance(a, a + way) == pytest.approx(np.square(way).sum(), rel=1e-6)
    assert frechet_distance(factor * a, factor * b) == pytest.approx(factor**2 * frechet_distance(a, b), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), r"first features have shape \(1, 3\); pass at least two samples"),
        (np.zeros((5, 3)), np.zeros(3), "second features"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "all finite"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "3 and 4 features; use one extractor"),
    ],
)
def test_clouds_that_cannot_be_compared_are_one_message(a, b, words):
    with pytest.raises(DataError, match=words):
        frechet_distance(a, b)


def test_moments_that_are_none_are_one_message():
    mean, unit = np.zeros(2), np.eye(2)
    with pytest.raises(DataError, match="not symmetric and positive"):
        frechet_distance_of_moments(mean, unit, mean, np.diag([1.0, -1.0]))
    with pytest.raises(DataError, match="not symmetric and positive"):
        frechet_distance_of_moments(mean, np.array([[1.0, 0.5], [0.0, 1.0]]), mean, unit)
    with pytest.raises(DataError, match=r"covariance shape \(3, 3\)"):
        frechet_distance_of_moments(mean, np.eye(3), mean, unit)
