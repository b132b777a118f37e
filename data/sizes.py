"""How large the images of a sample are for the model: as many pixels together as the budget allows."""

import math
from collections.abc import Sequence

from common.errors import DataError

MULTIPLE = 32
"""Sides are multiples of this: VAE factor times patch size, twice."""


def within_budget(
    sizes: Sequence[tuple[int, int]], pixels: int, multiple: int = MULTIPLE, where: str = "the sample"
) -> list[tuple[int, int]]:
    """(height, width) of all images of a sample, inputs and targets, at one common scale.

    The scale is that at which they have ``pixels`` pixels together; every side is then rounded down to a multiple, so
    that the budget is never exceeded. The rule of OmniAlpha's code, which crops what is over where this shrinks.

    Args:
        sizes: native (height, width) of each image, at least 1.
        where: the sample, for errors.

    Raises:
        DataError: a side would be shorter than ``multiple``.
    """
    total = sum(height * width for height, width in sizes)
    # isqrt of the quotient is the exact floor of side x sqrt(pixels / total), where floats could fall below a multiple.
    fitted = [
        (_down(pixels * height**2 // total, multiple), _down(pixels * width**2 // total, multiple))
        for height, width in sizes
    ]
    for (height, width), scaled in zip(sizes, fitted, strict=True):
        if not all(scaled):
            raise DataError(
                f"{where}: {width}x{height} pixels have a side below {multiple} when {len(sizes)} images share "
                f"{pixels} pixels; crop it to a less narrow part, or allow more pixels"
            )
    return fitted


def _down(square: int, multiple: int) -> int:
    return math.isqrt(square) // multiple * multiple
