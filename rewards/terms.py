"""The metric rewards of OmniAlpha (Eq. 8–13 of arXiv 2511.20211 v2).

Every term compares predictions with a truth, G members at once. Images are blended on pure black and pure white,
because a straight-alpha colour under alpha 0 is invisible and must not count.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError, RewardError
from data.rgba import over
from policy.perceptual import Network, PerceptualDistance
from rewards.base import RewardBatch, register
from rewards.similarity import blur, gaussian, psnr, psnr_map, ssim, ssim_map

PSNR_CEILING_DB = 50.0
"""PSNR that counts as perfect: rewards use PSNR / 50 dB clamped to [0, 1], as the paper's code does."""

SOFT_BAND = (0.05, 0.95)
"""Alpha values counted as boundary, both ends included."""

BOUNDARY_RADIUS_PX = 10
"""Radius of the boundary blur for an image of 1024 × 1024 pixels."""

METRICS = ("ssim", "psnr", "perceptual")
"""What two blended images are compared by: SSIM, PSNR / 50 dB, 1 − perceptual distance."""


def on_black_and_white(images_X4HW: Tensor) -> Tensor:
    """Blends straight-alpha RGBA on black and on white: (..., 4, H, W) → (..., 2, 3, H, W), in [0, 1]."""
    colour, alpha = images_X4HW[..., :3, :, :], images_X4HW[..., 3:, :, :]
    blends = colour.new_empty((*colour.shape[:-3], 2, *colour.shape[-3:]))
    black, white = blends.unbind(-4)
    torch.mul(colour, alpha, out=black)
    torch.add(black, 1 - alpha, out=white)
    return blends


def _layer_blends(batch: RewardBatch) -> tuple[Tensor, Tensor]:
    """(predictions_GL23HW, truths_L23HW): every layer on black and on white."""
    truths = batch.targets_LCHW
    assert truths is not None
    return (
        batch.shared("layers on black and white", lambda: on_black_and_white(batch.layers_GLCHW)),
        batch.shared("targets on black and white", lambda: on_black_and_white(truths)),
    )


def _composite_blends(batch: RewardBatch) -> tuple[Tensor, Tensor]:
    """(predictions_G23HW, truths_23HW): all layers composited, and the input image, on black and on white."""
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
    return (
        batch.shared("composite on black and white", lambda: on_black_and_white(over(batch.layers_GLCHW))),
        batch.shared("input image on black and white", lambda: on_black_and_white(image_4HW)),
    )


class _Fidelity:
    """Similarity of blended images by some of :data:`METRICS`, with equal weights."""

    def __init__(
        self,
        metrics: Sequence[str] = ("ssim", "psnr"),
        network: Network = "efficientnet_lite0",
        weights: str | Path | None = None,
        min_side: int | None = None,
        max_side: int | None = None,
    ) -> None:
        """
        Args:
            metrics: out of :data:`METRICS`, each once.
            network, weights, min_side, max_side: of the metric ``perceptual``
                (:class:`policy.perceptual.PerceptualDistance`).

        Raises:
            ConfigError: metrics that do not exist, or a perceptual network that cannot be loaded.
        """
        chosen = tuple(metrics) if not isinstance(metrics, str) else ()
        if not chosen or len(set(chosen)) != len(chosen) or any(metric not in METRICS for metric in chosen):
            raise ConfigError(f"metrics of a reward is {metrics!r}; give a list out of {', '.join(METRICS)}, each once")
        self.metrics = chosen
        self._distance = (
            PerceptualDistance(network, weights, min_side, max_side) if "perceptual" in self.metrics else None
        )

    @property
    def describes(self) -> str | None:
        """The perceptual network, where one judges."""
        return None if self._distance is None else self._distance.describes

    def _compare(self, predictions_GX3HW: Tensor, truths_X3HW: Tensor) -> Tensor:
        """Mean over X (any number of axes) and metrics for each member; (G,) float64."""
        total = torch.zeros(len(predictions_GX3HW), dtype=torch.float64, device=predictions_GX3HW.device)
        for metric in self.metrics:
            if metric == "ssim":
                similarity = ssim(predictions_GX3HW, truths_X3HW)
            elif metric == "psnr":
                similarity = (psnr(predictions_GX3HW, truths_X3HW) / PSNR_CEILING_DB).clamp(0.0, 1.0)
            else:
                assert self._distance is not None
                similarity = 1.0 - self._distance(predictions_GX3HW.flatten(1, -4), truths_X3HW.flatten(0, -4))
            total += similarity.flatten(1).mean(dim=1)
        return total / len(self.metrics)

    def _contributions(self, predictions_GX3HW: Tensor, truths_X3HW: Tensor) -> Tensor | None:
        """Of each pixel to each image's similarity, (G, X, H, W); None where a perceptual network judges too."""
        if "perceptual" in self.metrics:
            return None
        maps = {
            "ssim": lambda: ssim_map(predictions_GX3HW, truths_X3HW).mean(dim=-3),
            "psnr": lambda: psnr_map(predictions_GX3HW, truths_X3HW, PSNR_CEILING_DB),
        }
        return torch.stack([maps[metric]() for metric in self.metrics]).mean(dim=0)


@register("layer")
class LayerFidelity(_Fidelity):
    """Layer fidelity: the mean over layers, over {black, white} and over {SSIM, PSNR/50 dB}.

    The mean of both metrics is one term, as in the paper's text; its code z-scores SSIM and PSNR as two terms, which
    two terms with ``metrics: [ssim]`` and ``metrics: [psnr]`` reproduce.
    """

    needs = frozenset({"targets"})

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−½, 1] (SSIM may be negative); 1 is a perfect prediction.

        Raises:
            RewardError: images smaller than the SSIM window.
        """
        return self._compare(*_layer_blends(batch))

    def contributions(self, batch: RewardBatch) -> Tensor | None:
        """Of each pixel of each layer, (G, L, H, W); see :mod:`rewards.credit`."""
        found = self._contributions(*_layer_blends(batch))
        return None if found is None else found.mean(dim=2)


@register("composition")
class CompositionFidelity(_Fidelity):
    """Composition fidelity: all layers composited, against the input image, with the metrics of ``layer``.

    The truth is the input image itself, as in the paper's code; the paper's text composites the true layers.
    """

    needs = frozenset({"inputs"})

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−½, 1]; 1 where the layers compose to exactly the input.

        Raises:
            RewardError: no input plays the role "image", its size differs from the layers', or it is too small.
        """
        return self._compare(*_composite_blends(batch))

    def contributions(self, batch: RewardBatch) -> Tensor | None:
        """Of each pixel of all layers together, (G, 1, H, W)."""
        found = self._contributions(*_composite_blends(batch))
        return None if found is None else found.mean(dim=1, keepdim=True)


@register("background")
class BackgroundStructure(_Fidelity):
    """Background structure: 1 − perceptual distance of background layers, the mean over them and over {black, white}.

    The paper's distance is LPIPS with VGG16 (``network: lpips_vgg``, for which ``weights`` must name a file). Without
    it EfficientNet-Lite0 stands in, which is not LPIPS (:mod:`policy.perceptual`).
    """

    needs = frozenset({"targets"})

    def __init__(
        self,
        network: Network = "efficientnet_lite0",
        weights: str | Path | None = None,
        min_side: int | None = None,
        max_side: int | None = None,
    ) -> None:
        """Args and raises as :class:`policy.perceptual.PerceptualDistance`."""
        super().__init__(("perceptual",), network, weights, min_side, max_side)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,); 1 is a perfect prediction. EfficientNet's are in [0, 1], those of LPIPS may fall below 0.

        Raises:
            RewardError: the task has no background layer.
        """
        if not batch.backgrounds:
            raise RewardError(
                f"background needs a background layer, task {batch.task!r} has roles {batch.roles}; "
                "drop the term for this task"
            )
        predictions_GL23HW, truths_L23HW = _layer_blends(batch)
        layers = list(batch.backgrounds)
        return self._compare(predictions_GL23HW[:, layers], truths_L23HW[layers])


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
        errors_GKHW, norm_GK = self._errors(batch)
        return (1.0 - errors_GKHW.sum(dim=-1).double().sum(dim=-1) / norm_GK).mean(dim=1)

    def contributions(self, batch: RewardBatch) -> Tensor:
        """Of each pixel of each layer, (G, L, H, W): nothing on layers that are no foreground."""
        errors_GKHW, norm_GK = self._errors(batch)
        found = torch.zeros_like(batch.layers_GLCHW[:, :, 3])
        share = found[0].numel() / norm_GK.shape[1]
        found[:, list(batch.foregrounds)] = -errors_GKHW * (share / norm_GK)[..., None, None].float()
        return found

    def _errors(self, batch: RewardBatch) -> tuple[Tensor, Tensor]:
        """(m ⊙ |α̂ − α| of each foreground, ‖m‖₁ or 1 where that is 0)."""
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
        mask = (soft_band(predictions_GKHW, radius) + soft_band(truths_KHW, radius)).clamp_(0.0, 1.0)
        norm = mask.sum(dim=-1).double().sum(dim=-1)
        # Not error / norm where norm is 0; the error stays in the expression so that a NaN pixel shows.
        return mask * (predictions_GKHW - truths_KHW).abs_(), norm.where(norm > 0, 1.0)


def boundary_radius(height: int, width: int) -> int:
    """Blur radius in pixels: 10 at 1024², proportional to the side of a square of equal area, at least 1."""
    return max(1, round(BOUNDARY_RADIUS_PX * math.sqrt(height * width) / 1024))


def soft_band(alphas_XHW: Tensor, radius: int) -> Tensor:
    """Blurred indicator of soft alpha, any leading axes; values in [0, 1]."""
    low, high = SOFT_BAND
    band = ((alphas_XHW >= low) & (alphas_XHW <= high)).to(alphas_XHW.dtype)
    return blur(band, gaussian(radius, radius / 3), mirror=False)
