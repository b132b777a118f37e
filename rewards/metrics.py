"""Quality metrics of evaluation: they measure, they do not train.

Definitions follow the reference code of AIM (alpha errors over the whole image) and LayerD (RGB L1, soft IoU). All
arithmetic is float64. A metric that does not apply to a sample is left out, never set to 0.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.errors import RewardError
from data.rgba import blend
from rewards.matting import connectivity_error, gradient_error

PSNR_CAP_DB = 100.0
"""Reported where prediction and truth are equal, since an infinite PSNR has no mean. 8-bit rounding alone gives 59."""

HIGHER_IS_BETTER: dict[str, bool | None] = {
    "alpha_mad": False,
    "alpha_mse": False,
    "alpha_sad": False,
    "alpha_grad": False,
    "alpha_conn": False,
    "alpha_coverage": None,
    "soft_iou": True,
    "rgb_l1": False,
    "rgb_l1_alpha": False,
    "psnr_white": True,
    "background_psnr": True,
}
"""Every metric, and its direction; None for a signed one, which is best at 0."""

NEEDS_ROLE = {
    "alpha_mad": "foreground",
    "alpha_mse": "foreground",
    "alpha_sad": "foreground",
    "alpha_grad": "foreground",
    "alpha_conn": "foreground",
    "alpha_coverage": "foreground",
    "soft_iou": "foreground",
    "background_psnr": "background",
}
"""The layer without which a sample does not have a metric; the others need any."""


def goodness(metric: str, value: float) -> float:
    """The metric turned so that more is better: as it is, negated, or for a signed one minus its distance from 0."""
    higher = HIGHER_IS_BETTER[metric]
    return -abs(value) if higher is None else value if higher else -value


def clearly(quantity: str, low: float | None, high: float | None) -> Literal["better", "worse", ""]:
    """What an interval of differences says of a metric, or of a reward or one of its terms, for which more is better.

    Nothing where it includes 0 or is not there, or the metric is signed.
    """
    direction = HIGHER_IS_BETTER.get(quantity, True)
    if direction is None or low is None or high is None or not (low > 0 or high < 0):
        return ""
    return "better" if (low > 0) == direction else "worse"


def sample_metrics(roles: Sequence[str], layers_LCHW: Tensor, targets_LCHW: Tensor) -> dict[str, float]:
    """Compares one sample with its truth, layer by layer.

    Args:
        roles: "background", "foreground" or "image" for each layer, back to front.
        layers_LCHW: prediction, straight-alpha RGBA in [0, 1].
        targets_LCHW: truth, same shape.

    Returns:
        Over foreground layers (mean over them): ``alpha_mad`` and ``alpha_mse`` (mean |Δα| and Δα² over all pixels),
        ``alpha_sad``, ``alpha_grad`` and ``alpha_conn`` (the matting benchmark's sums / 1000: they grow with the pixel
        count, compare them at equal size only), ``alpha_coverage`` (mean α̂ − mean α: negative where foregrounds are
        left out) and ``soft_iou`` (Σ min(α̂, α) / Σ max(α̂, α); 1 where both are empty).
        Over all layers: ``rgb_l1`` (mean |ΔRGB| of the straight colour over pixels with true α > 0; layers without
        such pixels are left out), ``rgb_l1_alpha`` (the same, weighted by the true α) and ``psnr_white`` (dB, each
        layer blended on white, at most 100).
        Over background layers: ``background_psnr`` (dB, blended on white, at most 100).

    Raises:
        RewardError: shapes that do not fit.
    """
    if layers_LCHW.ndim != 4 or layers_LCHW.shape[1] != 4 or layers_LCHW.shape != targets_LCHW.shape:
        raise RewardError(
            f"metrics got a prediction {tuple(layers_LCHW.shape)} and a truth {tuple(targets_LCHW.shape)}; "
            "both must be (L, 4, H, W): bring the prediction to the truth's size first"
        )
    if len(roles) != len(layers_LCHW):
        raise RewardError(f"metrics got {len(roles)} roles for {len(layers_LCHW)} layers; name each layer's role")
    foregrounds = [index for index, role in enumerate(roles) if role == "foreground"]
    backgrounds = [index for index, role in enumerate(roles) if role == "background"]
    predictions, truths = layers_LCHW.double(), targets_LCHW.double()

    def mean_over(indices: Sequence[int], metric: Callable[[Tensor, Tensor], float | None]) -> float | None:
        values = [metric(predictions[index], truths[index]) for index in indices]
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present else None

    found = {
        "alpha_mad": mean_over(foregrounds, lambda p, t: (p[3] - t[3]).abs().mean().item()),
        "alpha_mse": mean_over(foregrounds, lambda p, t: (p[3] - t[3]).square().mean().item()),
        "alpha_sad": mean_over(foregrounds, lambda p, t: (p[3] - t[3]).abs().sum().item() / 1000),
        "alpha_grad": mean_over(foregrounds, lambda p, t: gradient_error(p[3].numpy(), t[3].numpy())),
        "alpha_conn": mean_over(foregrounds, lambda p, t: connectivity_error(p[3].numpy(), t[3].numpy())),
        "alpha_coverage": mean_over(foregrounds, lambda p, t: (p[3] - t[3]).mean().item()),
        "soft_iou": mean_over(foregrounds, _soft_iou),
        "rgb_l1": mean_over(range(len(roles)), _rgb_l1),
        "rgb_l1_alpha": mean_over(range(len(roles)), _rgb_l1_alpha),
        "psnr_white": mean_over(range(len(roles)), _psnr_white),
        "background_psnr": mean_over(backgrounds, _psnr_white),
    }
    return {name: value for name, value in found.items() if value is not None}


def _soft_iou(prediction_4HW: Tensor, truth_4HW: Tensor) -> float:
    intersection = torch.minimum(prediction_4HW[3], truth_4HW[3]).sum()
    union = torch.maximum(prediction_4HW[3], truth_4HW[3]).sum()
    return 1.0 if union == 0 else (intersection / union).item()


def _rgb_l1(prediction_4HW: Tensor, truth_4HW: Tensor) -> float | None:
    visible_HW = truth_4HW[3] > 0
    if not visible_HW.any():
        return None
    return (prediction_4HW[:3] - truth_4HW[:3]).abs()[:, visible_HW].mean().item()


def _rgb_l1_alpha(prediction_4HW: Tensor, truth_4HW: Tensor) -> float | None:
    weight_HW = truth_4HW[3]
    total = weight_HW.sum()
    if total == 0:
        return None
    return ((prediction_4HW[:3] - truth_4HW[:3]).abs().mean(dim=0) * weight_HW).sum().div(total).item()


def _psnr_white(prediction_4HW: Tensor, truth_4HW: Tensor) -> float:
    mse = (blend(prediction_4HW, 1.0) - blend(truth_4HW, 1.0)).square().mean()
    return (-10.0 * mse.log10()).clamp(max=PSNR_CAP_DB).item()
