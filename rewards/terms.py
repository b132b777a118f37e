"""The metric rewards of OmniAlpha in their four-component form (Eq. 8–13 of arXiv 2511.20211 v2).

Every term compares predictions with a truth, G members at once. Images are blended on pure black and pure white,
because a straight-alpha colour under alpha 0 is invisible and must not count. The background term (1 − perceptual
distance) needs a feature network and does not live here.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from common.errors import ConfigError, RewardError
from data.rgba import blend, over
from rewards.base import RewardBatch, register

PSNR_CEILING_DB = 50.0
"""PSNR that counts as perfect: rewards use PSNR / 50 dB clamped to [0, 1], as the paper's code does."""

SSIM_KERNEL = 11
"""Side in pixels of the SSIM window (σ = 1.5); images must be at least this large in both directions."""

SOFT_BAND = (0.05, 0.95)
"""Alpha values counted as boundary, both ends included."""

BOUNDARY_RADIUS_PX = 10
"""Radius of the boundary blur for an image of 1024 × 1024 pixels."""

METRICS = ("ssim", "psnr")

# SSIM holds about 18 maps of the blended images at a time: 2^25 values keep it under 2.5 GB. Groups of the usual
# size (8 members, 2 layers, 2 backgrounds, 512 × 512) pass in one call.
_MAX_SSIM_VALUES = 2**25


def on_black_and_white(images_X4HW: Tensor) -> Tensor:
    """Blends straight-alpha RGBA on black and on white: (..., 4, H, W) → (..., 2, 3, H, W), in [0, 1]."""
    return torch.stack((blend(images_X4HW, 0.0), blend(images_X4HW, 1.0)), dim=-4)


def ssim(predictions_N3HW: Tensor, truths_N3HW: Tensor) -> Tensor:
    """SSIM per image (Wang et al. 2004; Gaussian window 11 × 11, σ = 1.5, data range 1), in [−1, 1].

    The borders are mirrored and the mean is taken over the whole image and all channels, as torchmetrics does. The
    paper's code calls ``piq``, which leaves the border out and first shrinks images of 384 pixels and more.

    In float32, flat areas carry an error of up to 2e-4 (variances are differences of nearly equal numbers), textured
    ones of about 1e-6. float64 would cost twenty times as much on a CPU.

    Args:
        predictions_N3HW: float32 in [0, 1].
        truths_N3HW: the same shape.

    Returns:
        (N,) float32.

    Raises:
        RewardError: the image is smaller than the window.
    """
    height, width = predictions_N3HW.shape[-2:]
    if min(height, width) < SSIM_KERNEL:
        raise RewardError(
            f"SSIM needs images of at least {SSIM_KERNEL} × {SSIM_KERNEL} pixels, these are {height} × {width}; "
            "use larger images or a reward without SSIM"
        )
    per_call = max(1, _MAX_SSIM_VALUES // (3 * height * width))
    return torch.cat(
        [
            _ssim_chunk(predictions, truths)
            for predictions, truths in zip(predictions_N3HW.split(per_call), truths_N3HW.split(per_call), strict=True)
        ]
    )


def _ssim_chunk(predictions_N3HW: Tensor, truths_N3HW: Tensor) -> Tensor:
    # SSIM treats channels independently, so images can ride along as channels: torch's CPU depthwise convolution is
    # about five times faster on one image of 3N channels than on N images of 3 channels.
    size = predictions_N3HW.shape[-2:]
    # Variances are differences of nearly equal numbers: with TF32, a default on CUDA, they would be noise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        _, maps = structural_similarity_index_measure(
            predictions_N3HW.reshape(1, -1, *size),
            truths_N3HW.reshape(1, -1, *size),
            gaussian_kernel=True,
            sigma=1.5,
            kernel_size=SSIM_KERNEL,
            data_range=1.0,
            reduction="none",
            return_full_image=True,
        )
    return maps.reshape(len(predictions_N3HW), -1).mean(dim=-1)


def psnr(predictions_N3HW: Tensor, truths_N3HW: Tensor) -> Tensor:
    """PSNR per image in dB for values in [0, 1]: −10 log₁₀ of the mean squared error; (N,) float64, +inf if equal."""
    errors = (predictions_N3HW - truths_N3HW).square()
    return -10.0 * errors.flatten(1).mean(dim=1, dtype=torch.float64).log10()


def _fidelity(predictions_GX3HW: Tensor, truths_X3HW: Tensor, metrics: Sequence[str]) -> Tensor:
    """Mean over X (any number of axes) and ``metrics`` for each member; (G,) float64."""
    members = predictions_GX3HW.shape[0]
    image = truths_X3HW.shape[-3:]
    truths = truths_X3HW.expand_as(predictions_GX3HW).reshape(-1, *image)
    predictions = predictions_GX3HW.reshape(-1, *image)
    total = torch.zeros(len(predictions), dtype=torch.float64, device=predictions.device)
    for metric in metrics:
        if metric == "ssim":
            total += ssim(predictions, truths)
        else:
            total += (psnr(predictions, truths) / PSNR_CEILING_DB).clamp(0.0, 1.0)
    return total.reshape(members, -1).mean(dim=1) / len(metrics)


def _check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(metrics) if not isinstance(metrics, str) else ()
    if not chosen or len(set(chosen)) != len(chosen) or any(metric not in METRICS for metric in chosen):
        raise ConfigError(f"metrics of a reward is {metrics!r}; give a list out of {', '.join(METRICS)}, each once")
    return chosen


@register("layer")
class LayerFidelity:
    """Layer fidelity: the mean over layers, over {black, white} and over {SSIM, PSNR/50 dB}.

    The mean of both metrics is one term, as in the paper's text; its code z-scores SSIM and PSNR as two terms, which
    two terms with ``metrics: [ssim]`` and ``metrics: [psnr]`` reproduce.
    """

    needs = frozenset({"targets"})

    def __init__(self, metrics: Sequence[str] = METRICS) -> None:
        self.metrics = _check_metrics(metrics)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−½, 1] (SSIM may be negative); 1 is a perfect prediction.

        Raises:
            RewardError: images smaller than the SSIM window.
        """
        assert batch.targets_LCHW is not None
        return _fidelity(on_black_and_white(batch.layers_GLCHW), on_black_and_white(batch.targets_LCHW), self.metrics)


@register("composition")
class CompositionFidelity:
    """Composition fidelity: all layers composited, against the input image, with the metrics of ``layer``.

    The truth is the input image itself, as in the paper's code; the paper's text composites the true layers.
    """

    needs = frozenset({"inputs"})

    def __init__(self, metrics: Sequence[str] = METRICS) -> None:
        self.metrics = _check_metrics(metrics)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−½, 1]; 1 where the layers compose to exactly the input.

        Raises:
            RewardError: no input plays the role "image", its size differs from the layers', or it is too small.
        """
        if "image" not in batch.input_roles:
            raise RewardError(
                f"composition compares with the input image, but task {batch.task!r} has inputs {batch.input_roles}; "
                "drop the term for this task"
            )
        image_4HW = batch.inputs[batch.input_roles.index("image")]
        if image_4HW.shape[-2:] != batch.layers_GLCHW.shape[-2:]:
            raise RewardError(
                f"the input image is {tuple(image_4HW.shape[-2:])}, the layers are "
                f"{tuple(batch.layers_GLCHW.shape[-2:])} (H, W); resize inputs and targets of a record together"
            )
        return _fidelity(on_black_and_white(over(batch.layers_GLCHW)), on_black_and_white(image_4HW), self.metrics)


@register("boundary")
class BoundaryAccuracy:
    """Foreground boundary accuracy: the mean over foreground layers of

    1 − ‖m ⊙ (α̂ − α)‖₁ / ‖m‖₁, and 1 where ‖m‖₁ = 0, with
    m = clip(blur[α̂ ∈ [0.05, 0.95]] + blur[α ∈ [0.05, 0.95]], 0, 1).

    The blur is a Gaussian cut at its radius r with σ = r/3; outside the image nothing is boundary. Two alphas without
    any soft pixel score 1 however they differ: there the layer term has to judge.
    """

    needs = frozenset({"targets"})

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [0, 1].

        Raises:
            RewardError: the task has no foreground layer.
        """
        assert batch.targets_LCHW is not None
        if not batch.foregrounds:
            raise RewardError(
                f"boundary needs a foreground layer, task {batch.task!r} has roles {batch.roles}; "
                "drop the term for this task"
            )
        foregrounds = list(batch.foregrounds)
        truths_KHW = batch.targets_LCHW[foregrounds, 3]
        predictions_GKHW = batch.layers_GLCHW[:, foregrounds, 3]
        radius = boundary_radius(*truths_KHW.shape[-2:])
        mask = (soft_band(predictions_GKHW, radius) + soft_band(truths_KHW, radius)).clamp(0.0, 1.0)
        error = (mask * (predictions_GKHW - truths_KHW).abs()).sum(dim=(-2, -1), dtype=torch.float64)
        norm = mask.sum(dim=(-2, -1), dtype=torch.float64)
        # Not error / norm where norm is 0; the error stays in the expression so that a NaN pixel shows.
        return (1.0 - error / norm.where(norm > 0, 1.0)).mean(dim=1)


def boundary_radius(height: int, width: int) -> int:
    """Blur radius in pixels: 10 at 1024², proportional to the side of a square of equal area, at least 1."""
    return max(1, round(BOUNDARY_RADIUS_PX * math.sqrt(height * width) / 1024))


def soft_band(alphas_XHW: Tensor, radius: int) -> Tensor:
    """Blurred indicator of soft alpha, any leading axes; values in [0, 1]."""
    low, high = SOFT_BAND
    band = ((alphas_XHW >= low) & (alphas_XHW <= high)).to(alphas_XHW.dtype)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets**2) / (2 * (radius / 3) ** 2))
    kernel = (kernel / kernel.sum()).to(alphas_XHW)
    # A 2-D Gaussian is the product of two 1-D ones: 2(2r+1) instead of (2r+1)² products per pixel.
    flat = band.reshape(-1, 1, *band.shape[-2:])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        flat = F.conv2d(flat, kernel.reshape(1, 1, 1, -1), padding=(0, radius))
        flat = F.conv2d(flat, kernel.reshape(1, 1, -1, 1), padding=(radius, 0))
    return flat.reshape(band.shape)
