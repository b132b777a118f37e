"""Quality metrics of evaluation: they measure, they do not train.

Definitions follow the reference code of AIM (alpha errors over the whole image) and LayerD (RGB L1, soft IoU). All
arithmetic is float64. A metric that does not apply to a sample is left out, never set to 0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.errors import RewardError
from data.rgba import blend
from rewards.matting import connectivity_error, gradient_error

PSNR_CAP_DB = 100.0
"""Reported where prediction and truth are equal, since an infinite PSNR has no mean. 8-bit rounding alone gives 59."""

HIGHER_IS_BETTER = {
    "alpha_mad": False,
    "alpha_mse": False,
    "alpha_sad": False,
    "alpha_grad": False,
    "alpha_conn": False,
    "soft_iou": True,
    "rgb_l1": False,
    "psnr_white": True,
    "background_psnr": True,
}
"""Every metric, and its direction."""


def sample_metrics(roles: Sequence[str], layers_LCHW: Tensor, targets_LCHW: Tensor) -> dict[str, float]:
    """Compares one sample with its truth, layer by layer.

    Args:
        roles: "background" or "foreground" for each layer, back to front.
        layers_LCHW: prediction, straight-alpha RGBA in [0, 1].
        targets_LCHW: truth, same shape.

    Returns:
        Over foreground layers (mean over them): ``alpha_mad`` and ``alpha_mse`` (mean |Δα| and Δα² over all pixels),
        ``alpha_sad``, ``alpha_grad`` and ``alpha_conn`` (the matting benchmark's sums / 1000: they grow with the pixel
        count, compare them at equal size only) and ``soft_iou`` (Σ min(α̂, α) / Σ max(α̂, α); 1 where both are empty).
        Over all layers: ``rgb_l1`` (mean |ΔRGB| of the straight colour over pixels with true α > 0; layers without
        such pixels are left out) and ``psnr_white`` (dB, each layer blended on white, at most 100).
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
        "soft_iou": mean_over(foregrounds, _soft_iou),
        "rgb_l1": mean_over(range(len(roles)), _rgb_l1),
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


def _psnr_white(prediction_4HW: Tensor, truth_4HW: Tensor) -> float:
    mse = (blend(prediction_4HW, 1.0) - blend(truth_4HW, 1.0)).square().mean()
    return (-10.0 * mse.log10()).clamp(max=PSNR_CAP_DB).item()
