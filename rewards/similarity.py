"""SSIM, PSNR and the Gaussian blur behind them, for many predictions of the same truths.

Whatever depends on a truth alone is computed once. Blurs are separable and run as products with banded matrices, a
few dozen rows or columns at a time: on a CPU several times faster than convolutions with so long a kernel, and the
mirrored border costs nothing.
"""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import RewardError

SSIM_KERNEL = 11
"""Side in pixels of the SSIM window (σ = 1.5); images must be at least this large in both directions."""

SSIM_SIGMA = 1.5

C1, C2 = 0.01**2, 0.03**2
"""Constants of SSIM for values in [0, 1]."""

# Values that one step of SSIM works on, if an image has no more: three maps of so many floats stay in a core's cache.
_SSIM_VALUES = 2**17

_PSNR_VALUES = 2**20

# Outputs per banded matrix. Wider bands multiply more zeros, narrower ones are too thin for a fast matrix product.
_BAND = 64


def gaussian(radius: int, sigma: float) -> tuple[float, ...]:
    """Weights of a Gaussian cut at ``radius``, 2·radius + 1 of them, with sum 1."""
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return tuple((weights / weights.sum()).tolist())


_SSIM_WEIGHTS = gaussian(SSIM_KERNEL // 2, SSIM_SIGMA)


def blur(images_XHW: Tensor, weights: tuple[float, ...], mirror: bool) -> Tensor:
    """Convolves the last two axes with ``weights`` in both directions; any leading axes, same shape.

    Args:
        images_XHW: floats.
        weights: an odd number of symmetric weights, as :func:`gaussian` gives them.
        mirror: outside the image it is mirrored, without repeating the edge (the image must be larger than the
            weights' radius); otherwise there is nothing, 0.
    """
    across = _across(images_XHW, weights, mirror, images_XHW.new_empty(images_XHW.shape))
    flat_NHW = across.reshape(-1, *across.shape[-2:])
    strips = [
        torch.bmm(matrix.expand(len(flat_NHW), -1, -1), flat_NHW[:, taken])
        for _, taken, matrix in _bands(flat_NHW.shape[1], weights, mirror, flat_NHW.dtype, flat_NHW.device)
    ]
    return torch.cat(strips, dim=1).reshape(images_XHW.shape)


def _across(images_XHW: Tensor, weights: tuple[float, ...], mirror: bool, out: Tensor) -> Tensor:
    """The blur along rows, in ``out``."""
    rows, blurred = images_XHW.reshape(-1, images_XHW.shape[-1]), out.view(-1, out.shape[-1])
    for made, taken, matrix in _bands(rows.shape[1], weights, mirror, rows.dtype, rows.device):
        torch.mm(rows[:, taken], matrix.T, out=blurred[:, made])
    return out


class _Band(NamedTuple):
    made: slice
    """Outputs of this band."""
    taken: slice
    """Inputs they are made from."""
    matrix: Tensor
    """(outputs, inputs)."""


@lru_cache(maxsize=64)
def _bands(
    size: int, weights: tuple[float, ...], mirror: bool, dtype: torch.dtype, device: torch.device
) -> tuple[_Band, ...]:
    """The blur of ``size`` values as products with a few small matrices."""
    radius = len(weights) // 2
    edges = np.linspace(0, size, math.ceil(size / _BAND) + 1).round().astype(int).tolist()
    bands = []
    for start, stop in itertools.pairwise(edges):
        first, last = max(0, start - radius), min(size, stop + radius)
        row, place = np.meshgrid(np.arange(start, stop), np.arange(-radius, radius + 1), indexing="ij")
        source = row + place
        if mirror:
            source = np.abs(source)
            source = np.where(source >= size, 2 * (size - 1) - source, source)
        inside = (source >= 0) & (source < size)
        matrix = np.zeros((stop - start, last - first))
        weight = np.broadcast_to(weights, source.shape)
        np.add.at(matrix, (row[inside] - start, source[inside] - first), weight[inside])
        band = torch.from_numpy(matrix).to(dtype=dtype, device=device)
        bands.append(_Band(slice(start, stop), slice(first, last), band))
    return tuple(bands)


def ssim(predictions_GXHW: Tensor, truths_XHW: Tensor) -> Tensor:
    """Mean SSIM of G predictions of every truth (Wang et al. 2004; Gaussian window 11 × 11, σ = 1.5, data range 1).

    The borders are mirrored and the mean is taken over the whole image, as torchmetrics does. The paper's code calls
    ``piq``, which leaves the border out and first shrinks images of 384 pixels and more.

    In float32, flat areas carry an error of up to 1e-4 (variances are differences of nearly equal numbers), textured
    ones of about 1e-6. float64 would take twice as long.

    Args:
        predictions_GXHW: float32 in [0, 1], any axes X: images, channels.
        truths_XHW: what all G are compared with.

    Returns:
        (G, X) float64 in [−1, 1].

    Raises:
        RewardError: the images are smaller than the window.
    """
    *axes, height, width = truths_XHW.shape
    if min(height, width) < SSIM_KERNEL:
        raise RewardError(
            f"SSIM needs images of at least {SSIM_KERNEL} × {SSIM_KERNEL} pixels, these are {height} × {width}; "
            "use larger images or a reward without SSIM"
        )
    truths_PHW = truths_XHW.reshape(-1, height, width)
    predictions_GPHW = predictions_GXHW.reshape(-1, len(truths_PHW), height, width)
    at_once = max(1, _SSIM_VALUES // (height * width))
    planes = min(at_once, len(truths_PHW))
    members = min(max(1, at_once // planes), len(predictions_GPHW))
    space = _Space(truths_XHW, 3 * members * planes * height * width)
    chunks = [
        torch.cat([_ssim_sums(some, truth, space) for some in predictions.split(members)])
        for predictions, truth in (
            (predictions_GPHW[:, k : k + planes], _SsimTruth(truths_PHW[k : k + planes]))
            for k in range(0, len(truths_PHW), planes)
        )
    ]
    return torch.cat(chunks, dim=1).reshape(-1, *axes) / (height * width)


class _SsimTruth:
    """What SSIM needs of some truths, once for all their predictions.

    Brightness counts from mid-grey, so that variances of bright flat areas lose fewer digits.
    """

    def __init__(self, truths_PHW: Tensor) -> None:
        centred = truths_PHW - 0.5
        mean = blur(centred, _SSIM_WEIGHTS, mirror=True)
        self.variance_c2 = blur(centred.square(), _SSIM_WEIGHTS, mirror=True).addcmul_(mean, mean, value=-1).add_(C2)
        self.twice = centred.mul_(2)
        self.mean_twice = 2 * mean
        self.bright_twice = self.mean_twice + 1
        self.bright_square_c1 = mean.add_(0.5).square_().add_(C1)


class _Space:
    """Memory that is used again and again: fresh megabytes cost more than what is computed in them."""

    def __init__(self, like: Tensor, values: int) -> None:
        self._buffers = [like.new_empty(values) for _ in range(3)]

    def take(self, which: int, *shape: int) -> Tensor:
        """Some of buffer ``which``, with whatever it holds."""
        return self._buffers[which][: math.prod(shape)].view(shape)


def _ssim_sums(predictions_GPHW: Tensor, truth: _SsimTruth, space: _Space) -> Tensor:
    """Sums of the SSIM map over the pixels of each plane, (G, P) float64."""
    shape, (height, width) = predictions_GPHW.shape[:2], predictions_GPHW.shape[-2:]
    count = 3 * math.prod(shape)
    maps = space.take(0, 3, *shape, height, width)
    torch.sub(predictions_GPHW, 0.5, out=maps[0])
    torch.mul(maps[0], maps[0], out=maps[1])
    torch.mul(maps[0], truth.twice, out=maps[2])
    across = _across(maps, _SSIM_WEIGHTS, True, space.take(1, 3, *shape, height, width)).view(count, height, width)
    total = torch.zeros(shape, dtype=torch.float64, device=maps.device)
    for made, taken, matrix in _bands(height, _SSIM_WEIGHTS, True, maps.dtype, maps.device):
        strips = space.take(0, count, len(matrix), width)  # the maps are not needed any more
        torch.bmm(matrix.expand(count, -1, -1), across[:, taken], out=strips)
        mean, square, product = strips.view(3, *shape, len(matrix), width)
        # 2·covariance + C2, and the sum of both variances + C2.
        product.addcmul_(mean, truth.mean_twice[:, made], value=-1).add_(C2)
        square.addcmul_(mean, mean, value=-1).add_(truth.variance_c2[:, made])
        mean.add_(0.5)
        above = torch.mul(mean, truth.bright_twice[:, made], out=space.take(2, *mean.shape))
        above.add_(C1).mul_(product).div_(mean.mul_(mean).add_(truth.bright_square_c1[:, made]).mul_(square))
        total += above.sum(dim=-1).double().sum(dim=-1)
    return total


def psnr(predictions_GX3HW: Tensor, truths_X3HW: Tensor) -> Tensor:
    """PSNR in dB of images in [0, 1], (G, X) float64: −10 log₁₀ of the mean squared error, +inf where it is 0.

    Args:
        predictions_GX3HW: G predictions of every truth, any axes X.
        truths_X3HW: the truths.
    """
    at_once = max(1, _PSNR_VALUES // truths_X3HW.numel())
    # Rows are summed in float32, which is exact enough, and then in float64.
    sums = [(some - truths_X3HW).square_().sum(dim=-1).double() for some in predictions_GX3HW.split(at_once)]
    return -10.0 * (torch.cat(sums).mean(dim=(-2, -1)) / truths_X3HW.shape[-1]).log10()


def ssim_map(predictions_GXHW: Tensor, truths_XHW: Tensor) -> Tensor:
    """The map whose mean over the pixels is :func:`ssim`, (G, X, H, W) float32."""

    def smooth(images: Tensor) -> Tensor:
        return blur(images, _SSIM_WEIGHTS, mirror=True)

    # Brightness counts from mid-grey for the variances, as in _SsimTruth.
    ours, theirs = predictions_GXHW - 0.5, truths_XHW - 0.5
    mean, true_mean = smooth(ours), smooth(theirs)
    variances = smooth(ours * ours) - mean * mean + smooth(theirs * theirs) - true_mean * true_mean
    covariance = smooth(ours * theirs) - mean * true_mean
    mean, true_mean = mean + 0.5, true_mean + 0.5
    bright = (2 * mean * true_mean + C1) / (mean * mean + true_mean * true_mean + C1)
    return bright * (2 * covariance + C2) / (variances + C2)


def psnr_map(predictions_GX3HW: Tensor, truths_X3HW: Tensor, ceiling_db: float) -> Tensor:
    """What each pixel contributes to PSNR / ``ceiling_db`` clamped to [0, 1], (G, X, H, W) float32.

    PSNR is no mean over pixels, but between a member and the group's mean error it is a straight line away: the
    contribution is the slope of that line times the pixel's squared error minus the group's mean of it. Its mean over
    the pixels is the member's value minus that of the mean error, exactly.
    """
    errors_GXHW = (predictions_GX3HW - truths_X3HW).square_().mean(dim=-3)
    mean_XHW = errors_GXHW.mean(dim=0)
    mse_GX, mse_X = (errors.double().mean(dim=(-2, -1)) for errors in (errors_GXHW, mean_XHW))

    def value(mse: Tensor) -> Tensor:
        return (-10 * mse.clamp_min(1e-30).log10() / ceiling_db).clamp(0.0, 1.0)

    apart_GX = mse_GX - mse_X
    tangent_X = torch.where(
        (value(mse_X) > 0) & (value(mse_X) < 1), -10 / (math.log(10) * ceiling_db * mse_X.clamp_min(1e-30)), 0.0
    )
    # Too near to each other for a difference quotient, the tangent is as good.
    near = apart_GX.abs() <= 1e-6 * mse_X
    slope_GX = torch.where(near, tangent_X, (value(mse_GX) - value(mse_X)) / apart_GX.where(~near, 1.0))
    return (slope_GX[..., None, None] * (errors_GXHW - mean_XHW)).float()
