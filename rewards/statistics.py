"""Confidence intervals for paired comparisons whose records share photos and objects, and the Fréchet distance of
feature clouds.

Records made from one photo or one object err together. Resampling records as if they were independent then gives
intervals that are too narrow.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import stats

from common.errors import DataError

_DRAWS_AT_ONCE = 64  # bounds the weights held in memory at 64 per record


def paired_bootstrap(
    differences_N: Sequence[float] | np.ndarray,
    photo_groups: Sequence[str | None],
    object_groups: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval by the two-way "pigeonhole" bootstrap (Owen 2007, Annals of Applied
    Statistics 1(2)).

    Photos and objects are resampled with replacement, independently of each other. In a draw a record weighs the
    product of how often its photo and its object were drawn; a record without a photo only the latter.

    The interval errs on the careful side: noise of single records counts up to three times in the variance. That is
    negligible where photos or objects recur and their effects dominate, and makes the interval √3 too wide where
    every record has its own photo and its own object; use :func:`cluster_mean_interval` there. With few clusters
    (under about 20) it is too narrow, as every percentile bootstrap.

    Args:
        differences_N: one finite paired difference per record.
        photo_groups: identity of each record's photo; None where it has none (synthetic background).
        object_groups: identity of each record's object.
        draws: number of bootstrap draws.
        seed: equal seeds give equal intervals.

    Returns:
        (mean, low, high) in the unit of the differences. low and high are NaN where there is only one photo and one
        object: one cluster says nothing about others.

    Raises:
        DataError: no records, lengths that differ, a difference that is not finite, or no object.
    """
    differences = _check(differences_N, photo_groups, object_groups, draws)
    mean = float(differences.mean())
    photos, objects = _count(photo_groups), _count(object_groups)
    if photos <= 1 and objects <= 1:
        return mean, float("nan"), float("nan")
    low, high = np.percentile(_drawn_means(differences, photo_groups, object_groups, draws, seed), (2.5, 97.5))
    return mean, float(low), float(high)


def cluster_t_interval(
    differences_N: Sequence[float] | np.ndarray,
    photo_groups: Sequence[str | None],
    object_groups: Sequence[str],
    confidence: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean and an interval for confidences near 1: mean ± t·s with the standard error s of :func:`paired_bootstrap`.

    A percentile interval cannot be had at such confidences: with few clusters its ends are those of the single
    clusters, and it excludes 0 at any confidence when they happen to lie on one side. Student's t has one degree of
    freedom less than there are photos or objects, whichever are fewer, and s is scaled up by √(n/(n−1)). Where every
    record has its own photo, or its own object, only the other is resampled: the two-way draws would count the noise
    of single records several times.

    Args, returns and raises as :func:`paired_bootstrap`; low and high are NaN with fewer than two photos (where
    records have any) or objects.
    """
    differences = _check(differences_N, photo_groups, object_groups, draws)
    return cluster_t_interval_of(
        lambda weights_N: float(weights_N @ differences / weights_N.sum()),
        photo_groups,
        object_groups,
        confidence,
        draws,
        seed,
    )


def cluster_t_interval_of(
    statistic: Callable[[np.ndarray], float],
    photo_groups: Sequence[str | None],
    object_groups: Sequence[str],
    confidence: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The interval of :func:`cluster_t_interval` for any statistic of a set of records.

    Args:
        statistic: takes how often each record counts, (N,) integers as floats, not all 0. Draws for which it is NaN are
            left out.

    Returns:
        (the statistic of all records, low, high).
    """
    if not 0 < confidence < 1:
        raise DataError(f"an interval of confidence {confidence} cannot be drawn; choose one between 0 and 1")
    size = len(object_groups)
    value = statistic(np.ones(size))
    if _count(photo_groups) == size:
        photo_groups = [None] * size
    elif _count(object_groups) == size and None not in photo_groups:
        object_groups = [str(photo) for photo in photo_groups]
        photo_groups = [None] * size
    clusters = min(count for count in (_count(photo_groups), _count(object_groups)) if count)
    if clusters < 2:
        return value, float("nan"), float("nan")
    drawn = [statistic(weights_N) for weights_N in _draws(photo_groups, object_groups, draws, seed)]
    error = float(np.nanstd(drawn))
    reach = stats.t.ppf((1 + confidence) / 2, clusters - 1) * error * math.sqrt(clusters / (clusters - 1))
    return value, value - float(reach), value + float(reach)


def cluster_mean_interval(
    values_N: Sequence[float] | np.ndarray, groups: Sequence[str], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval by the one-way cluster bootstrap: whole groups are resampled.

    Args, returns and raises as :func:`paired_bootstrap`, of which it is the case without photos.
    """
    return paired_bootstrap(values_N, [None] * len(values_N), groups, draws, seed)


def _check(
    differences_N: Sequence[float] | np.ndarray,
    photo_groups: Sequence[str | None],
    object_groups: Sequence[str],
    draws: int,
) -> np.ndarray:
    differences = np.asarray(differences_N, np.float64)
    if differences.ndim != 1 or not len(differences):
        raise DataError(f"bootstrap got differences of shape {differences.shape}; pass one number per record")
    if len(photo_groups) != len(differences) or len(object_groups) != len(differences):
        raise DataError(
            f"bootstrap got {len(differences)} differences, {len(photo_groups)} photos and {len(object_groups)} "
            "objects; pass one of each per record (None for no photo)"
        )
    if not np.all(np.isfinite(differences)):
        position = int(np.flatnonzero(~np.isfinite(differences))[0])
        raise DataError(f"difference {position} is {differences[position]}; leave out pairs without both values")
    if any(name is None for name in object_groups):
        raise DataError("bootstrap got a record without an object; give every record an object group")
    if draws < 1:
        raise DataError(f"bootstrap needs at least one draw, got {draws}; 2000 is usual")
    return differences


def _drawn_means(
    differences: np.ndarray, photo_groups: Sequence[str | None], object_groups: Sequence[str], draws: int, seed: int
) -> np.ndarray:
    """The mean in each of ``draws`` two-way bootstrap draws."""
    weights_DN = np.stack(list(_draws(photo_groups, object_groups, draws, seed)))
    return np.asarray((weights_DN @ differences) / weights_DN.sum(axis=1))


def _draws(
    photo_groups: Sequence[str | None], object_groups: Sequence[str], draws: int, seed: int
) -> Iterator[np.ndarray]:
    """How often each record counts, (N,), in each of ``draws`` two-way bootstrap draws."""
    photos, photo_N = _index([name for name in photo_groups if name is not None])
    objects, object_N = _index(object_groups)
    has_photo_N = np.array([name is not None for name in photo_groups])
    rng = np.random.default_rng(seed)
    missing = draws
    while missing > 0:
        size = min(missing, _DRAWS_AT_ONCE)
        weights_DN = rng.multinomial(objects, np.full(objects, 1 / objects), size)[:, object_N].astype(np.float64)
        if photos:
            weights_DN[:, has_photo_N] *= rng.multinomial(photos, np.full(photos, 1 / photos), size)[:, photo_N]
        # In sparse designs a draw can miss every record. It has no mean; another takes its place.
        kept = weights_DN[weights_DN.sum(axis=1) > 0]
        missing -= len(kept)
        yield from kept


def _count(names: Sequence[str | None]) -> int:
    """Number of distinct names."""
    return len(set(names) - {None})


def _index(names: Sequence[str]) -> tuple[int, np.ndarray]:
    """Number of distinct names, and for each entry the number of its name."""
    distinct = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return len(distinct), np.array([distinct[name] for name in names], dtype=np.intp)


def frechet_distance(features_a_ND: np.ndarray, features_b_MD: np.ndarray) -> float:
    """Squared Fréchet distance of two clouds of features, taken as Gaussians (Dowson & Landau 1982; as FID, Heusel et
    al. 2017, arXiv 1706.08500): |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), covariances over n − 1.

    It grows as the clouds get smaller, even between samples of one distribution: compare equal counts only. The matrix
    root is never formed: tr (Σ_a Σ_b)^½ is the sum of the singular values of A·Bᵀ, A and B the centred features
    divided by √(n − 1), so that fewer samples than dimensions are cheap and no worse conditioned.

    Args:
        features_a_ND: N ≥ 2 samples of D features.
        features_b_MD: M ≥ 2 samples of the same features.

    Returns:
        A number ≥ 0, in squared units of the features; 0 for equal means and covariances.

    Raises:
        DataError: fewer than two samples, other shapes, or values that are not finite.
    """
    centred, means = [], []
    for name, features in (("first", features_a_ND), ("second", features_b_MD)):
        values = np.asarray(features, np.float64)
        if values.ndim != 2 or len(values) < 2 or not np.all(np.isfinite(values)):
            raise DataError(
                f"Fréchet distance: the {name} features have shape {values.shape}; pass at least two samples (samples, "
                "features), all finite"
            )
        means.append(values.mean(axis=0))
        centred.append((values - means[-1]) / np.sqrt(len(values) - 1))
    (mean_a, mean_b), (a_ND, b_MD) = means, centred
    if len(mean_a) != len(mean_b):
        raise DataError(f"Fréchet distance of {len(mean_a)} and {len(mean_b)} features; use one extractor for both")
    cross = np.linalg.svd(_fewer_rows(a_ND) @ _fewer_rows(b_MD).T, compute_uv=False).sum()
    distance = np.square(mean_a - mean_b).sum() + np.square(a_ND).sum() + np.square(b_MD).sum() - 2 * cross
    return max(0.0, float(distance))


def _fewer_rows(values_ND: np.ndarray) -> np.ndarray:
    """At most D rows with the same products of columns: the triangular factor where there are more."""
    return values_ND if len(values_ND) <= values_ND.shape[1] else np.asarray(np.linalg.qr(values_ND, mode="r"))


def frechet_distance_of_moments(
    mean_a_D: np.ndarray, covariance_a_DD: np.ndarray, mean_b_D: np.ndarray, covariance_b_DD: np.ndarray
) -> float:
    """:func:`frechet_distance` from means and covariances, as kept for a reference set whose features are too many.

    Raises:
        DataError: shapes that do not fit, or a covariance that is not symmetric and positive semi-definite.
    """
    roots = []
    for name, mean_D, covariance_DD in (("first", mean_a_D, covariance_a_DD), ("second", mean_b_D, covariance_b_DD)):
        covariance = np.asarray(covariance_DD, np.float64)
        if covariance.shape != (len(mean_D), len(mean_D)) or len(mean_a_D) != len(mean_b_D):
            raise DataError(
                f"Fréchet distance: the {name} mean has {len(mean_D)} features and its covariance shape "
                f"{covariance.shape}; pass D numbers and (D, D) of the same features for both"
            )
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        largest = max(float(values[-1]), np.finfo(np.float64).tiny)
        if not np.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9 * largest) or values[0] < -1e-6 * largest:
            raise DataError(f"Fréchet distance: the {name} covariance is not symmetric and positive; was it summed up?")
        roots.append(np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T)  # RᵀR is the covariance
    a, b = roots
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    apart = np.asarray(mean_a_D, np.float64) - np.asarray(mean_b_D, np.float64)
    return max(0.0, float(np.square(apart).sum() + np.square(a).sum() + np.square(b).sum() - 2 * cross))
