"""Local credit: which part of a reward belongs to which part of a sample.

A sample's reward is one number, and GRPO pushes every element of its latents by it, also those that had nothing to do
with it: most of the gradient is noise. The metric rewards are means over pixels, though, and what the policy draws in
one place shows mostly there. With local credit a scorer says what each pixel contributed, and every cell of a coarse
grid on every layer has an advantage of its own, from the rewards around it. In expectation that leaves out what a cell
does to rewards far away, and nothing else.

Everything here is NumPy float64 without state, but for :func:`cells_of`, which works where the scorers do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from common.errors import RewardError

if TYPE_CHECKING:
    from rewards.base import RewardBatch

Array = np.ndarray

EPSILON = 1e-8
"""Added to every standard deviation, as in the paper's code."""


def grid(height: int, width: int, cells: int) -> tuple[int, int]:
    """(h, w) of the cells of an image: ``cells`` along the longer side, square as far as that goes, at least one."""
    longer = max(height, width)
    return max(1, round(cells * height / longer)), max(1, round(cells * width / longer))


def cells_of(scorer: Any, batch: "RewardBatch", cells: int) -> Array | None:
    """The means of a scorer's contributions over each cell, (G, L or 1, h, w) float32 in host memory.

    None where it has no method ``contributions``, or that returns None: its score belongs to the sample as a whole.

    Raises:
        RewardError: what it returns is no map of the batch's layers.
    """
    ask = getattr(scorer, "contributions", None)
    if ask is None or (returned := ask(batch)) is None:
        return None
    members, layers, _, height, width = batch.layers_GLCHW.shape
    shapes = [(members, count, height, width) for count in (layers, 1)]
    if not isinstance(returned, torch.Tensor) or tuple(returned.shape) not in shapes:
        found = tuple(returned.shape) if isinstance(returned, torch.Tensor) else type(returned).__name__
        raise RewardError(f"contributions returned {found}, expected a tensor of shape {shapes[0]} or {shapes[1]}")
    maps = returned.flatten(0, 1).float()
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps, grid(height, width, cells)).unflatten(0, (members, -1))
    return pooled.cpu().numpy()


def without_unfit(checked: Sequence[tuple[float, str | None]], cells_GLhw: Array) -> list[tuple[float, str | None]]:
    """Scores with the reasons why they are missing; those whose contributions are not finite are missing too."""
    fit_G = np.isfinite(cells_GLhw).reshape(len(cells_GLhw), -1).all(axis=1)
    unfit = (float("nan"), "its contributions are not finite")
    return [entry if fit or entry[1] else unfit for entry, fit in zip(checked, fit_G, strict=True)]


@dataclass(frozen=True)
class Credited:
    """One group's scores, and where they come from."""

    scores_TG: Array
    """T terms, G members, NaN = missing."""
    weights_T: Sequence[float]
    """Non-negative."""
    maps_T: Sequence[Array | None]
    """Each term's contributions (G, L, h, w), whose mean over everything but G is the score up to a constant of the
    group, or (G, 1, h, w) for all layers together; None where the score belongs to the sample as a whole."""


def local_advantages(
    groups: Sequence[Credited],
    reach: float,
    rule: Literal["terms", "sum", "global", "gdpo"],
    std_floor: float,
    clamp: float,
) -> list[Array]:
    """Advantages of every cell of every group of a step.

    A term's credit at cell c of layer l is the sum over cells c' of exp(−d²(c, c')/2·reach²) times the contribution of
    (l, c') to the score, over the number of contributions, minus the same of the group's mean; a term without a map
    credits every cell with the whole score. ``terms`` and ``gdpo`` divide each term's credit by its root mean square
    over the group's members and cells. The weighted mean of a member's terms is divided by its root mean square, over
    the group's members and cells (``terms``, ``sum``) or those of the whole batch (``global``, ``gdpo``), and clamped.
    With an infinite reach, and a single layer, ``terms`` and ``sum`` are those of ``rewards.combine.batch_advantages``.

    Args:
        groups: the step's groups.
        reach: as :class:`policy.rl.CreditConfig`.
        rule: as ``RewardConfig.advantage``.
        std_floor: least divisor of a term, in units of the scores; divisors of what is divided already are then at
            least 1.
        clamp: largest absolute advantage.

    Returns:
        Per group (G, L, h, w) float64, or (G, 1, 1, 1) where no term has a map; NaN for a member that cannot be judged.
    """
    combined = [_combine(group, reach, rule, std_floor) for group in groups]
    floor = std_floor if rule in ("sum", "global") else float(std_floor > 0)
    apart = rule in ("terms", "sum")
    divisors = [_divisor([values] if apart else combined, floor) for values in combined]
    return [np.clip(values / by, -clamp, clamp) for values, by in zip(combined, divisors, strict=True)]


def _combine(group: Credited, reach: float, rule: str, std_floor: float) -> Array:
    """The weighted mean of the terms' credits, (G, L, h, w). A member that lacks a weighted term has none of the rest,
    but for ``terms``, where a missing term leaves the mean."""
    layers = max((m.shape[1] for m in group.maps_T if m is not None), default=1)
    scores_TG = np.asarray(group.scores_TG, np.float64)
    weights_TG = np.asarray(group.weights_T, np.float64)[:, None] * np.isfinite(scores_TG)
    total: Array | float = 0.0
    for scores_G, weights_G, map_GLhw in zip(scores_TG, weights_TG, group.maps_T, strict=True):
        credit = scores_G[:, None, None, None] if map_GLhw is None else spread(map_GLhw, reach, layers)
        credit = _centred(credit, np.isfinite(scores_G))
        divisor = _divisor([credit[np.isfinite(scores_G)]], std_floor) if rule in ("terms", "gdpo") else 1.0
        total = total + weights_G[:, None, None, None] * credit / divisor
    counted_G = weights_TG.sum(0)
    whole_G = counted_G > (0 if rule == "terms" else sum(group.weights_T) - 1e-12)
    counted_G = np.where(whole_G & (counted_G > 0), counted_G, np.nan)
    return np.asarray(total / counted_G[:, None, None, None])


def spread(map_GLhw: Array, reach: float, layers: int) -> Array:
    """The credit of every cell, (G, layers, h, w): what lies around it of the sum that is the score."""
    members, own, height, width = map_GLhw.shape
    rows, columns = (_kernel(size, reach * max(height, width)) for size in (height, width))
    credit = rows @ np.asarray(map_GLhw, np.float64) @ columns / (own * height * width)
    return np.broadcast_to(credit, (members, layers, height, width))


def _kernel(size: int, sigma: float) -> Array:
    """exp(−d²/2σ²) between the cells of one axis: 1 for a cell itself, nothing outside of the image."""
    place = np.arange(size)
    return np.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))


def _centred(credit: Array, present_G: Array) -> Array:
    """Minus the mean of the members that have a score, exactly 0 where those are equal; 0 for the others."""
    there = credit[present_G]
    if not len(there):
        return np.zeros(credit.shape)
    centred = np.where(np.ptp(there, axis=0) == 0, 0.0, credit - there.mean(axis=0))
    return np.where(present_G[:, None, None, None], centred, 0.0)


def _divisor(credits: Sequence[Array], floor: float) -> float:
    """Root mean square of what is there, or the floor where that is larger."""
    present = np.concatenate([credit[np.isfinite(credit)] for credit in credits]) if credits else np.empty(0)
    size = float(np.sqrt(np.mean(present**2))) if len(present) else 0.0
    return max(size, floor) if floor > 0 else size + EPSILON
