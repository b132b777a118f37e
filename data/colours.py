"""Colour under transparency: resizing and filling RGBA pixels without fringes.

Arrays here are float32, shape (H, W, 4), in [0, 1], straight alpha.
"""

import numpy as np
from PIL import Image
from pymatting import estimate_foreground_ml

_KEPT_ALPHA = 0.25
"""Above this alpha a pixel keeps its own colour; below, the colour fades into its surroundings' colour."""


def resize_planes(planes_HWC: np.ndarray, width: int, height: int, method: Image.Resampling) -> np.ndarray:
    """Resizes every channel as floats; reductions are antialiased."""
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(planes_HWC[..., k])).resize((width, height), method))
        for k in range(planes_HWC.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def fill_colours(rgba_HW4: np.ndarray) -> np.ndarray:
    """Spreads the visible colours smoothly under the transparent pixels; alpha is untouched.

    The colours come from pymatting's multilevel foreground estimate (Germer et al., arXiv 2006.14970) of the object
    over black. Thin alpha holds leftovers of the background an object was cut from, so faint pixels take the estimate
    and solid ones keep their own colour.
    """
    alpha = rgba_HW4[..., 3:]
    if not (alpha > 0).any():
        return np.concatenate([np.full_like(rgba_HW4[..., :3], 0.5), alpha], axis=-1)
    own = np.clip(alpha / _KEPT_ALPHA, 0, 1)
    # The estimate sees only colours it can trust: fainter ones count as absent.
    trusted = np.where(alpha[..., 0] >= _KEPT_ALPHA, alpha[..., 0], 0) if alpha.max() >= _KEPT_ALPHA else alpha[..., 0]
    estimate = estimate_foreground_ml(
        rgba_HW4[..., :3].astype(np.float64) * trusted[..., None], trusted.astype(np.float64)
    )
    filled = own * rgba_HW4[..., :3] + (1 - own) * estimate
    return np.concatenate([np.clip(filled, 0, 1), alpha], axis=-1).astype(np.float32)


def premultiply(rgba_HW4: np.ndarray) -> np.ndarray:
    """Colour times alpha, and alpha."""
    return np.concatenate([rgba_HW4[..., :3] * rgba_HW4[..., 3:], rgba_HW4[..., 3:]], axis=-1)


def unpremultiply(premultiplied_HW4: np.ndarray) -> np.ndarray:
    """Straight alpha with the colours filled in; alpha within two levels of 0 or 1 is snapped to it."""
    alpha = np.clip(premultiplied_HW4[..., 3:], 0, 1)
    alpha = np.where(alpha < 2 / 255, 0, np.where(alpha > 253 / 255, 1, alpha)).astype(np.float32)
    divisor = np.where(alpha > 0, np.maximum(premultiplied_HW4[..., 3:], 1e-6), 1)
    colour = np.clip(np.where(alpha > 0, premultiplied_HW4[..., :3] / divisor, 0), 0, 1)
    return fill_colours(np.concatenate([colour, alpha], axis=-1).astype(np.float32))


def resize_rgba(rgba_HW4: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes premultiplied, so hidden colours do not bleed in, and fills the colours again."""
    return unpremultiply(resize_planes(premultiply(rgba_HW4), width, height, Image.Resampling.HAMMING))


def rotate_planes(planes_HWC: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates every channel about the centre; the canvas grows to hold everything, new pixels are 0."""
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(planes_HWC[..., k])).rotate(
                degrees, Image.Resampling.BILINEAR, expand=True
            )
        )
        for k in range(planes_HWC.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def crop_to_alpha(rgba_HW4: np.ndarray, threshold: float = 0.02) -> np.ndarray:
    """The smallest box around the visible pixels; the image itself if nothing is visible."""
    visible = rgba_HW4[..., 3] > threshold
    if not visible.any():
        return rgba_HW4
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    return rgba_HW4[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
