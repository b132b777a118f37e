"""Colour under transparency: resizing and filling RGBA pixels without fringes.

Arrays here are float32, shape (H, W, 4), in [0, 1], straight alpha.
"""

import numpy as np
from PIL import Image

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

    A pyramid of alpha-weighted means gives each pixel the colour of the nearest visible ones. Thin alpha holds
    leftovers of the background an object was cut from, so weights are alpha squared and faint pixels are refilled.
    (pymatting's multilevel estimate does the same; its first import compiles for minutes, this needs none.)
    """
    alpha = rgba_HW4[..., 3:]
    if not (alpha > 0).any():
        return np.concatenate([np.full_like(rgba_HW4[..., :3], 0.5), alpha], axis=-1)
    weight = alpha.astype(np.float32) ** 2
    levels = [np.concatenate([rgba_HW4[..., :3] * weight, weight], axis=-1).astype(np.float32)]
    while max(levels[-1].shape[:2]) > 1:
        fine = levels[-1]
        fine = np.pad(fine, ((0, fine.shape[0] % 2), (0, fine.shape[1] % 2), (0, 0)))
        levels.append(fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2])
    colour = levels[-1][..., :3] / levels[-1][..., 3:]
    for level in reversed(levels[:-1]):
        height, width = level.shape[:2]
        coarse = resize_planes(colour, colour.shape[1] * 2, colour.shape[0] * 2, Image.Resampling.BILINEAR)
        colour = (level[..., :3] + 0.05 * coarse[:height, :width]) / (level[..., 3:] + 0.05)
    own = np.clip(alpha / _KEPT_ALPHA, 0, 1)
    filled = own * rgba_HW4[..., :3] + (1 - own) * colour
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


def rotate_rgba(rgba_HW4: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates premultiplied about the centre, the canvas grows to hold everything."""
    source = premultiply(rgba_HW4)
    channels = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(source[..., k])).rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        )
        for k in range(4)
    ]
    return unpremultiply(np.stack(channels, axis=-1))


def crop_to_alpha(rgba_HW4: np.ndarray, threshold: float = 0.02) -> np.ndarray:
    """The smallest box around the visible pixels; the image itself if nothing is visible."""
    visible = rgba_HW4[..., 3] > threshold
    if not visible.any():
        return rgba_HW4
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    return rgba_HW4[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
