"""The matting benchmark's perceptual alpha errors and scorers made of them (Rhemann et al., CVPR 2009).

The benchmark reports sums over pixels; a reward must not grow with the picture, so the scorers here are means or
ratios in [0, 1] with 1 for a perfect alpha. All of them judge foreground layers only.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.errors import RewardError
from data.rgba import over
from rewards.base import RewardBatch, register
from rewards.terms import boundary_radius, soft_band

GRADIENT_SIGMA = 1.4
"""Width in pixels of the Gaussian whose derivatives measure gradients."""

THRESHOLDS = np.arange(11) / 10
"""Levels of alpha at which connectedness is looked at."""

CONNECTIVITY_TOLERANCE = 0.15
"""Alpha that a pixel may exceed its connected level by without counting as disconnected."""

_CORNERS = np.ones((3, 3))


def gradient_magnitude(alpha_HW: np.ndarray) -> np.ndarray:
    """Magnitude of the Gaussian-smoothed gradient, float64; borders repeat the edge pixel."""
    return ndimage.gaussian_gradient_magnitude(alpha_HW.astype(np.float64), GRADIENT_SIGMA, mode="nearest")


def connectedness(prediction_HW: np.ndarray, truth_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degree φ in [0, 1] to which each pixel of (prediction, truth) hangs together with what both agree on.

    A pixel's level is the highest threshold up to which it lies in the largest region where both alphas reach the
    threshold; φ = 1 − d where the alpha exceeds its level by d ≥ 0.15, else 1.
    """
    level = np.full(truth_HW.shape, -1.0)
    for below, threshold in itertools.pairwise(THRESHOLDS):
        labels, count = ndimage.label((prediction_HW >= threshold) & (truth_HW >= threshold), structure=_CORNERS)
        inside = np.zeros(truth_HW.shape, bool)
        if count:
            inside = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
        level[(level < 0) & ~inside] = below
    level[level < 0] = 1.0

    def degree(alpha_HW: np.ndarray) -> np.ndarray:
        excess = alpha_HW - level
        return 1.0 - np.where(excess >= CONNECTIVITY_TOLERANCE, excess, 0.0)

    return degree(prediction_HW), degree(truth_HW)


def gradient_error(prediction_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    """The benchmark's Grad: sum of squared differences of gradient magnitudes / 1000."""
    return float(np.square(gradient_magnitude(prediction_HW) - gradient_magnitude(truth_HW)).sum() / 1000)


def connectivity_error(prediction_HW: np.ndarray, truth_HW: np.ndarray) -> float:
    """The benchmark's Conn: sum of differences of connectedness / 1000."""
    predicted, true = connectedness(prediction_HW, truth_HW)
    return float(np.abs(predicted - true).sum() / 1000)


def _alphas(batch: RewardBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(predictions_GKHW, truths_KHW) of the foreground layers, float64."""
    assert batch.targets_LCHW is not None
    layers = _foregrounds(batch, name)
    return batch.layers_GLCHW[:, layers, 3].double().numpy(), batch.targets_LCHW[layers, 3].double().numpy()


def _foregrounds(batch: RewardBatch, name: str) -> list[int]:
    if not batch.foregrounds:
        raise RewardError(
            f"{name} needs a foreground layer, task {batch.task!r} has roles {batch.roles}; name the tasks it is "
            "for in the term's `tasks`"
        )
    return list(batch.foregrounds)


def _each(batch: RewardBatch, name: str, measure: Callable[[np.ndarray, np.ndarray], float]) -> Tensor:
    """Mean over foreground layers of ``measure(prediction_HW, truth_HW)`` for every member, (G,)."""
    predictions_GKHW, truths_KHW = _alphas(batch, name)
    return torch.tensor(
        [np.mean([measure(p, t) for p, t in zip(member, truths_KHW, strict=True)]) for member in predictions_GKHW]
    )


def _needs(*names: str) -> Callable:
    def mark(function: Callable) -> Callable:
        function.needs = frozenset(names)  # type: ignore[attr-defined]
        return function

    return mark


def _contributed(contributions: Callable[[RewardBatch], Tensor]) -> Callable:
    """Gives a scoring function the map of what each pixel contributed to its score (:mod:`rewards.credit`)."""

    def mark(function: Callable) -> Callable:
        function.contributions = contributions  # type: ignore[attr-defined]
        return function

    return mark


def _alpha_differences(batch: RewardBatch) -> Tensor:
    """−|α̂ − α| of each pixel of foreground layers, (G, L, H, W)."""
    predictions_GKHW, truths_KHW = _alphas(batch, "alpha_mad")
    found = torch.zeros_like(batch.layers_GLCHW[:, :, 3])
    share = found.shape[1] / len(truths_KHW)
    found[:, _foregrounds(batch, "alpha_mad")] = torch.tensor(-share * np.abs(predictions_GKHW - truths_KHW)).to(found)
    return found


@register("alpha_mad")
@_needs("targets")
@_contributed(_alpha_differences)
def alpha_mad(batch: RewardBatch) -> Tensor:
    """1 − mean |α̂ − α| over foreground layers; (G,) in [0, 1]."""
    predictions_GKHW, truths_KHW = _alphas(batch, "alpha_mad")
    return torch.tensor(1.0 - np.abs(predictions_GKHW - truths_KHW).mean(axis=(1, 2, 3)))


def _overlap_errors(batch: RewardBatch) -> tuple[Tensor, Tensor]:
    """(|α̂ − α| of foreground layers over their Σα̂ + Σα, (G, K, H, W); the same summed over pixels, (G, K))."""
    assert batch.targets_LCHW is not None
    layers = _foregrounds(batch, "alpha_overlap")
    predictions_GKHW, truths_KHW = batch.layers_GLCHW[:, layers, 3].double(), batch.targets_LCHW[layers, 3].double()
    both_GK = (predictions_GKHW + truths_KHW).sum(dim=(-2, -1))
    errors_GKHW = (predictions_GKHW - truths_KHW).abs() / both_GK.where(both_GK > 0, 1.0)[..., None, None]
    return errors_GKHW, errors_GKHW.sum(dim=(-2, -1))


def _overlap_contributions(batch: RewardBatch) -> Tensor:
    """Of each pixel of foreground layers, (G, L, H, W)."""
    errors_GKHW, _ = _overlap_errors(batch)
    found = torch.zeros_like(batch.layers_GLCHW[:, :, 3])
    share = found[0].numel() / errors_GKHW.shape[1]
    found[:, _foregrounds(batch, "alpha_overlap")] = (-share * errors_GKHW).to(found)
    return found


@register("alpha_overlap")
@_needs("targets")
@_contributed(_overlap_contributions)
def alpha_overlap(batch: RewardBatch) -> Tensor:
    """Soft Dice 1 − Σ|α̂ − α| / (Σα̂ + Σα) over foreground layers, 1 where both are empty; (G,) in [0, 1].

    Where it is uncertain which object is meant, a mean error rewards showing none: a wrong object costs twice. Here
    showing nothing scores 0, like a wholly wrong object.
    """
    return 1.0 - _overlap_errors(batch)[1].mean(dim=1)


@register("alpha_gradient")
@_needs("targets")
def alpha_gradient(batch: RewardBatch) -> Tensor:
    """1 − Σ(ĝ − g)² / (Σĝ² + Σg²) of the gradient magnitudes, 1 where both are flat; (G,) in [0, 1]."""

    def measure(prediction_HW: np.ndarray, truth_HW: np.ndarray) -> float:
        predicted, true = gradient_magnitude(prediction_HW), gradient_magnitude(truth_HW)
        total = np.square(predicted).sum() + np.square(true).sum()
        # Flat alphas leave gradients of rounding errors, which must not be compared.
        return 1.0 if total < 1e-12 else float(1.0 - np.square(predicted - true).sum() / total)

    return _each(batch, "alpha_gradient", measure)


@register("alpha_connectivity")
@_needs("targets")
def alpha_connectivity(batch: RewardBatch) -> Tensor:
    """1 − mean difference of connectedness; (G,) in [0, 1]."""

    def measure(prediction_HW: np.ndarray, truth_HW: np.ndarray) -> float:
        predicted, true = connectedness(prediction_HW, truth_HW)
        return float(1.0 - np.abs(predicted - true).mean())

    return _each(batch, "alpha_connectivity", measure)


@register("alpha_sharpness")
def alpha_sharpness(batch: RewardBatch) -> Tensor:
    """1 − mean 4α(1 − α) over foreground layers: 1 where every pixel is opaque or transparent; (G,). Needs no truth.

    On its own it rewards hard edges where the object is soft: give it a small weight beside a term with a truth.
    """
    alpha_GKHW = batch.layers_GLCHW[:, _foregrounds(batch, "alpha_sharpness"), 3].double()
    return 1.0 - (4 * alpha_GKHW * (1 - alpha_GKHW)).mean(dim=(1, 2, 3))


@register("fringe")
@_needs("targets")
def fringe(batch: RewardBatch) -> Tensor:
    """Colour in the soft edge: 1 − Σ w·|ĉ − c| / Σ w with w = edge band of the truth × predicted alpha; (G,) in [0, 1].

    A halo of background colour round a cut-out lowers it; 1 where the truth has no soft pixel or nothing is shown.
    """
    assert batch.targets_LCHW is not None
    layers = _foregrounds(batch, "fringe")
    predictions, truths = batch.layers_GLCHW[:, layers].double(), batch.targets_LCHW[layers].double()
    weight = soft_band(truths[:, 3], boundary_radius(*truths.shape[-2:])) * predictions[:, :, 3]
    error = (weight * (predictions[:, :, :3] - truths[:, :3]).abs().mean(dim=2)).sum(dim=(-2, -1))
    total = weight.sum(dim=(-2, -1))
    return (1.0 - error / total.where(total > 0, 1.0)).mean(dim=1)


def _recomposition_errors(batch: RewardBatch) -> Tensor:
    """|composite of all layers − input image| on white, mean over colours, (G, 1, H, W)."""
    if "image" not in batch.input_roles or "background" not in batch.roles:
        raise RewardError(
            f"recomposition needs an input image and a background layer, which task {batch.task!r} has not; name the "
            "tasks it is for in the term's `tasks`"
        )
    image = batch.inputs[batch.input_roles.index("image")].double()
    composite = over(batch.layers_GLCHW.double())
    shown, wanted = (rgba[..., :3, :, :] * rgba[..., 3:, :, :] - rgba[..., 3:, :, :] for rgba in (composite, image))
    return (shown - wanted).abs().mean(dim=1, keepdim=True)


@register("recomposition")
@_needs("inputs")
@_contributed(lambda batch: -_recomposition_errors(batch))
def recomposition(batch: RewardBatch) -> Tensor:
    """1 − mean |composite of all layers − input image|, on white; (G,) in [0, 1]. For tasks with a background layer."""
    return 1.0 - _recomposition_errors(batch).mean(dim=(1, 2, 3))
