"""Pictures of people: reading whatever they have, fitting it to the model's square, and results at native size.

Native pixels are uint8, shape (H, W, 4), straight alpha. What the model sees and gives is float32 in [0, 1], channels
first, shape (4, S, S).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pymatting import estimate_foreground_ml
from torch import Tensor

from common.errors import DataError
from data.colours import premultiply, resize_planes, unpremultiply
from data.rgba import checkerboard, to_uint8_hwc

MAX_PIXELS = 32 * 2**20
"""Largest image that is read: results are worked out in floats at this size, tens of bytes for every pixel."""
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""Raster formats that Pillow decodes itself; for others it may start foreign programs (Ghostscript for EPS)."""

GUIDE_RADIUS = 1
"""Of the windows in which alpha is fitted to the colours, in pixels of the model's square."""
GUIDE_EPSILON = 1e-3
"""Variance of colour below which a window says little about alpha."""


def read_image(path: Path) -> np.ndarray:
    """Reads an image file as it is meant to be looked at: the orientation that its EXIF data names is applied.

    Grey (8 or 16 bit), palette, CMYK, with or without alpha; the first frame of an animation.

    Returns:
        uint8, shape (H, W, 4), straight alpha; 255 where the file has none.

    Raises:
        DataError: no such file, not an image, damaged, or above :data:`MAX_PIXELS`, which is checked before decoding.
    """
    bomb = f"more than the {MAX_PIXELS} pixels that are read; shrink it first"
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file; name an image")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, which are an error here, and of odd tags
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{path}: image of {image.width}x{image.height}, {bomb}")
                image.load()
                return _rgba(_upright(image))
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"{path}: {bomb}") from None
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: not an image in a known format ({known}); save it as PNG") from None
    except Exception as error:  # a damaged file leads decoders to raise anything
        raise DataError(f"{path}: cannot be read as an image ({error}); replace it or save it as PNG") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data says nothing about the orientation, and the pixels are good
        return image


def _rgba(image: Image.Image) -> np.ndarray:
    if not (image.mode.startswith("I") or image.mode == "F"):
        return np.array(image.convert("RGBA"))
    values = np.asarray(image, dtype=np.float32)  # Pillow's own conversion would clip 16 bits to 255
    scaled = np.nan_to_num(values) / (1.0 if image.mode == "F" else 65535.0)
    grey = np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=-1)


def flatten(pixels_HW4: np.ndarray, level: int = 255) -> np.ndarray:
    """Blends an image onto a grey level: uint8, shape (H, W, 3)."""
    image = Image.fromarray(pixels_HW4)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (level, level, level, 255)), image))[..., :3]


@dataclass(frozen=True)
class Letterbox:
    """Where an image of any shape lies in the model's square, and the way back."""

    size: tuple[int, int]
    """Native (height, width)."""
    canvas: tuple[int, int]
    """(height, width) of what the model sees: a square of side S, unless it is as wide and high as the image."""
    inner: tuple[int, int]
    """(height, width) in the canvas; in a square the longer one fills it."""

    @classmethod
    def fit(cls, height: int, width: int, side: int, smallest: int, where: str) -> "Letterbox":
        """Centres an image in a square of ``side`` pixels, keeping its proportions.

        Args:
            smallest: pixels that a side needs at least, both native and in the square: one patch of the model.
            where: the file, for errors.

        Raises:
            DataError: a side is shorter than ``smallest``: the model would see less than one patch of it.
        """
        inner = tuple(max(1, round(length * side / max(height, width))) for length in (height, width))
        if min(height, width, *inner) < smallest:
            raise DataError(
                f"{where}: {width}x{height} pixels, {inner[1]}x{inner[0]} at the model's size of {side}; both need at "
                f"least {smallest} a side (one patch); crop it to a less narrow part or take a larger picture"
            )
        return cls((height, width), (side, side), (inner[0], inner[1]))

    @property
    def corner(self) -> tuple[int, int]:
        """(top, left) of the image in the square."""
        return (self.canvas[0] - self.inner[0]) // 2, (self.canvas[1] - self.inner[1]) // 2

    @property
    def enlarges(self) -> bool:
        """Whether the way back to native size enlarges."""
        return max(self.size) > max(self.inner)

    def image(self, pixels_HW4: np.ndarray) -> Tensor:
        """A picture as the model's condition: float32, shape (4, S, S), opaque as in training.

        Transparent parts are blended onto white. The borders repeat the picture's edge: a plain frame would be an
        object in its own right to a model that was trained on full squares.
        """
        colours = np.pad(self._shrink(Image.fromarray(flatten(pixels_HW4))), (*self._margins, (0, 0)), mode="edge")
        return _opaque(colours.astype(np.float32) / 255)

    def mask(self, pixels_HW4: np.ndarray) -> Tensor:
        """A mask as the model's condition: black and white as in training, float32, shape (4, S, S).

        Marked is what is brighter than half, transparent parts counting as black. A pixel of the square is white if
        half of it is marked; of a mask too fine for that, the pixels that hold most. Borders are black.
        """
        covered = self._shrink(Image.fromarray(marked(pixels_HW4).astype(np.uint8) * 255)).astype(np.float32)
        white = (covered >= min(127.5, covered.max())) & (covered > 0)
        return _opaque(np.repeat(np.pad(white, self._margins)[..., None], 3, axis=-1).astype(np.float32))

    def layer(self, pixels_HW4: np.ndarray) -> np.ndarray:
        """A target layer of training data: uint8, shape (S, S, 4), alpha kept.

        An image that fills the square as it is keeps its bytes. Others are scaled premultiplied, hidden colours filled
        in again, and the borders repeat the edge of all channels: as "over" acts pixel by pixel, layers that compose to
        the image do so in the borders too.
        """
        pixels = pixels_HW4
        if self.inner != self.size:
            alpha = pixels_HW4[..., 3].astype(np.float32) / 255
            planes = [self._shrink(Image.fromarray(pixels_HW4[..., k] / np.float32(255) * alpha)) for k in range(3)]
            pixels = to_uint8_hwc(unpremultiply(np.dstack([*planes, self._shrink(Image.fromarray(alpha))])))
        return np.pad(pixels, (*self._margins, (0, 0)), mode="edge")

    def take(self, square_SSC: np.ndarray) -> np.ndarray:
        """Cuts the image out of float planes of the square and brings them to native size, shape (H, W, C)."""
        top, left = self.corner
        inside = square_SSC[top : top + self.inner[0], left : left + self.inner[1]]
        height, width = self.size
        return resize_planes(inside.astype(np.float32), width, height, Image.Resampling.BICUBIC)

    @property
    def _margins(self) -> tuple[tuple[int, int], tuple[int, int]]:
        top, left = self.corner
        return (top, self.canvas[0] - self.inner[0] - top), (left, self.canvas[1] - self.inner[1] - left)

    def _shrink(self, image: Image.Image) -> np.ndarray:
        # Training pictures were reduced with Hamming; enlarging with it would show blocks.
        method = Image.Resampling.HAMMING if self.enlarges else Image.Resampling.BICUBIC
        return np.asarray(image.resize(self.inner[::-1], method))


@dataclass(frozen=True)
class Stretch:
    """An image that fills the model's canvas as a whole, and the way back."""

    size: tuple[int, int]
    """Native (height, width)."""
    inner: tuple[int, int]
    """(height, width) of the canvas, of nearly the same proportions."""

    @property
    def enlarges(self) -> bool:
        """Whether the way back to native size enlarges."""
        return self.size[0] * self.size[1] > self.inner[0] * self.inner[1]

    def image(self, pixels_HW4: np.ndarray) -> Tensor:
        """A picture at the canvas's size, on white and opaque: float32, shape (4, *inner)."""
        image = Image.fromarray(flatten(pixels_HW4)).resize(self.inner[::-1], Image.Resampling.LANCZOS)
        return _opaque(np.asarray(image).astype(np.float32) / 255)

    def take(self, canvas_HWC: np.ndarray) -> np.ndarray:
        """Brings float planes of the canvas to native size, shape (H, W, C)."""
        height, width = self.size
        return resize_planes(canvas_HWC.astype(np.float32), width, height, Image.Resampling.BICUBIC)


Fit: TypeAlias = Letterbox | Stretch
"""Where an image lies in what the model sees."""


def native_mask(pixels_HW4: np.ndarray) -> Tensor:
    """A mask in black and white, opaque, at its own size: float32, shape (4, H, W)."""
    return _opaque(np.repeat(marked(pixels_HW4)[..., None], 3, axis=-1).astype(np.float32))


def marked(pixels_HW4: np.ndarray) -> np.ndarray:
    """What a mask marks: True where it is brighter than half, shape (H, W). Transparent parts count as black."""
    return flatten(pixels_HW4, 0).max(axis=-1) >= 128


def native_layer(layer_4SS: Tensor, box: Fit) -> np.ndarray:
    """A layer of the model at native size, with the model's own colours: uint8, shape (H, W, 4)."""
    planes = box.take(premultiply(_channels_last(layer_4SS)))  # premultiplied, so that hidden colours do not bleed in
    share = planes[..., 3:]
    # Divided before clipping: colour and alpha overshoot alike where bicubic enlargement does.
    colour = np.where(share > 0, planes[..., :3] / np.maximum(share, 1e-6), 0)
    return to_uint8_hwc(np.concatenate([colour, share], axis=-1))


def cut_out(layer_4SS: Tensor, box: Fit, pixels_HW4: np.ndarray) -> np.ndarray:
    """A foreground layer at native size with the input's colours and the model's alpha: uint8, shape (H, W, 4).

    The model paints S x S pixels, a blur beside a photo of thousands, while the object's true colours lie in the photo:
    only alpha has to come from the model. Alpha is enlarged along the photo's edges (:func:`guided_alpha`). Where it
    is soft, a pixel of the photo is a mixture with the background; the foreground's share is estimated as for the
    training data (pymatting, arXiv 2006.14970). Wholly opaque pixels keep the photo's bytes. Parts of the input that
    were transparent stay so.
    """
    layer_SS4 = _channels_last(layer_4SS)
    if box.enlarges:
        alpha = guided_alpha(layer_SS4[..., 3], box, flatten(pixels_HW4))
    else:
        alpha = np.clip(box.take(layer_SS4[..., 3:])[..., 0], 0, 1)
    alpha = np.where(alpha < 2 / 255, 0, np.where(alpha > 253 / 255, 1, alpha)).astype(np.float32)
    colours = pixels_HW4[..., :3]
    if (alpha < 1).any():
        estimate = estimate_foreground_ml(colours.astype(np.float32) / 255, alpha)
        colours = np.where(alpha[..., None] < 1, np.rint(np.clip(estimate, 0, 1) * 255).astype(np.uint8), colours)
    final = np.rint(alpha * pixels_HW4[..., 3]).astype(np.uint8)
    return np.concatenate([colours, final[..., None]], axis=-1)


def guided_alpha(alpha_SS: np.ndarray, box: Fit, colours_HW3: np.ndarray) -> np.ndarray:
    """Enlarges alpha along the edges of the native image: float32 in [0, 1], shape (H, W).

    As in the guided filter (arXiv 1505.00996) alpha is fitted in each small window of the square as a linear function
    of the colours. Its slopes, which are smooth, turn what the photo has beyond its reduced copy into what alpha has
    beyond the model's: alpha itself is not smoothed, as the filter would do, and in windows of constant alpha the
    colours get no say, so texture inside the object leaves no trace.
    """
    guide_3SS = box.image(np.dstack([colours_HW3, np.full(colours_HW3.shape[:2], 255, np.uint8)]))[:3]
    slopes_SS3 = _slopes(torch.from_numpy(np.ascontiguousarray(alpha_SS)), guide_3SS)
    alpha = box.take(alpha_SS[..., None])[..., 0]
    for channel in range(3):  # one at a time: planes of native size are large
        reduced = box.take(guide_3SS[channel, ..., None].numpy())[..., 0]
        detail = colours_HW3[..., channel].astype(np.float32) / 255 - reduced
        alpha += box.take(slopes_SS3[..., channel, None])[..., 0] * detail
    return np.clip(alpha, 0, 1)


def _slopes(alpha_SS: Tensor, guide_3SS: Tensor) -> np.ndarray:
    """Ridge regression of alpha on the colours in the window round each pixel, averaged: float32, shape (S, S, 3)."""

    def mean(planes: Tensor) -> Tensor:
        width = 2 * GUIDE_RADIUS + 1
        return torch.nn.functional.avg_pool2d(planes, width, 1, GUIDE_RADIUS, count_include_pad=False)

    guide, alpha = guide_3SS.double(), alpha_SS[None].double()
    mean_guide = mean(guide)
    products = mean((guide[:, None] * guide[None]).flatten(0, 1)).unflatten(0, (3, 3))
    covariance = products - mean_guide[:, None] * mean_guide[None] + GUIDE_EPSILON * torch.eye(3)[..., None, None]
    towards = mean(guide * alpha) - mean_guide * mean(alpha)
    slopes_SS3 = torch.linalg.solve(covariance.permute(2, 3, 0, 1), towards.permute(1, 2, 0))
    return _channels_last(mean(slopes_SS3.permute(2, 0, 1)))


def preview(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Layers (uint8, (H, W, 4), back to front) composited over a checkerboard: uint8, shape (H, W, 3)."""
    height, width = layers[0].shape[:2]
    board = to_uint8_hwc(checkerboard(height, width, max(8, max(height, width) // 32)))
    picture = Image.fromarray(np.dstack([board, np.full((height, width), 255, np.uint8)]))
    for layer in layers:
        picture.alpha_composite(Image.fromarray(layer))
    return np.asarray(picture)[..., :3]


def _opaque(colours_SS3: np.ndarray) -> Tensor:
    planes = torch.from_numpy(np.ascontiguousarray(colours_SS3.transpose(2, 0, 1)))
    return torch.cat([planes, torch.ones_like(planes[:1])])


def _channels_last(planes_CSS: Tensor) -> np.ndarray:
    return planes_CSS.permute(1, 2, 0).float().numpy()
