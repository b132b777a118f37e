"""What a whole set of layers looks like: features whose clouds are compared by a Fréchet distance.

Features are the pooled ones of EfficientNet-Lite0 of a layer on black and on white, averaged, and projected by a fixed
random map to a few directions. Squared distances keep their expectation under the map (Johnson & Lindenstrauss 1984),
and clouds of some twenty samples have covariances that mean something. Distances of other extractors, FID's among
them, are on another scale.
"""

from functools import lru_cache

import numpy as np
import torch

from data.rgba import blend
from policy.features import POOLED_DIM, load_efficientnet
from rewards.statistics import frechet_distance

DIRECTIONS = 32
"""Features of a layer after the projection."""
BACKGROUNDS = (0.0, 1.0)
DIGITS = 5
"""Significant digits that are kept: looks are stored as text."""

Cloud = tuple[tuple[float, ...], ...]
"""A record's layers, each with its ``DIRECTIONS`` features."""


@torch.no_grad()
def layer_features(layers_LCHW: torch.Tensor) -> Cloud:
    """Features of every layer.

    Args:
        layers_LCHW: float in [0, 1], straight alpha, any size.
    """
    network = load_efficientnet()
    pooled_LD = torch.stack([network(blend(layers_LCHW, value)).pooled_NC for value in BACKGROUNDS]).mean(0)
    projected = pooled_LD.double().numpy() @ _projection()
    return tuple(tuple(float(f"{value:.{DIGITS}g}") for value in row) for row in projected)


def cloud_distance(clouds: list[Cloud], truths: list[Cloud], weights_N: np.ndarray) -> float:
    """Fréchet distance between predicted and true layers of N records, of which each counts ``weights_N`` (integers)
    times; NaN with fewer than two layers."""
    times = np.asarray(weights_N, dtype=np.intp)
    predicted, true = (
        [row for cloud, count in zip(side, times, strict=True) for _ in range(count) for row in cloud]
        for side in (clouds, truths)
    )
    if min(len(predicted), len(true)) < 2:
        return float("nan")
    return frechet_distance(np.array(predicted), np.array(true))


@lru_cache(maxsize=1)
def _projection() -> np.ndarray:
    """(1280, 32), the same in every process."""
    draw = np.random.default_rng(0).standard_normal((POOLED_DIM, DIRECTIONS))
    return draw / np.sqrt(DIRECTIONS)
