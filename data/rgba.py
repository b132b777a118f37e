"""RGBA images: the "over" operator, lossless coding, and drawing on a checkerboard.

Images are floats in [0, 1] with straight (not premultiplied) alpha, channels first.
"""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from common.errors import DataError

MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded; a few bytes can otherwise ask for gigabytes."""


def over(layers_LCHW: Tensor, background: Tensor | None = None) -> Tensor:
    """Composites RGBA layers back to front with the "over" operator.

    Args:
        layers_LCHW: shape (..., L, 4, H, W), back to front, in [0, 1].
        background: opaque or not, shape (..., 4, H, W), put behind all layers.

    Returns:
        RGBA with straight alpha, shape (..., 4, H, W). The colour is 0 where the result is wholly transparent.

    Raises:
        ValueError: the layers do not have 4 channels, or there is nothing to composite.
    """
    if layers_LCHW.ndim < 4 or layers_LCHW.shape[-3] != 4:
        raise ValueError(f"layers must have shape (..., L, 4, H, W), got {tuple(layers_LCHW.shape)}")
    stack = list(layers_LCHW.unbind(-4))
    if background is not None:
        stack.insert(0, background)
    if not stack:
        raise ValueError("over needs at least one layer or a background")
    alpha = stack[0][..., 3:4, :, :]
    colour = stack[0][..., :3, :, :] * alpha
    for layer in stack[1:]:
        front = layer[..., 3:4, :, :]
        colour = layer[..., :3, :, :] * front + colour * (1 - front)
        alpha = front + alpha * (1 - front)
    visible = alpha > 0
    # The inner where keeps the division, and so its gradient, finite under alpha = 0.
    straight = torch.where(visible, colour / torch.where(visible, alpha, torch.ones_like(alpha)), 0.0)
    return torch.cat([straight, alpha], dim=-3)


def blend(image_4HW: Tensor, colour: float | Sequence[float] | Tensor) -> Tensor:
    """Blends an RGBA image onto a colour.

    Args:
        image_4HW: shape (..., 4, H, W), in [0, 1].
        colour: one grey level, three numbers, or a tensor that broadcasts to (..., 3, H, W).

    Returns:
        RGB, shape (..., 3, H, W).
    """
    alpha = image_4HW[..., 3:4, :, :]
    tone = torch.as_tensor(colour, dtype=image_4HW.dtype, device=image_4HW.device)
    if tone.ndim == 1:
        tone = tone[:, None, None]
    return image_4HW[..., :3, :, :] * alpha + tone * (1 - alpha)


def to_uint8_hwc(image: Tensor | np.ndarray) -> np.ndarray:
    """8-bit pixels, shape (H, W, C), of one image.

    A tensor is channels first. An array is channels last if its last axis has 3 or 4 entries, else channels first.
    Floats are clipped to [0, 1] and rounded to the nearest of 256 levels.

    Raises:
        ValueError: the image does not have 3 axes with 3 or 4 channels.
    """
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and (isinstance(image, Tensor) or array.shape[-1] not in (3, 4)):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (3, 4):
        raise ValueError(f"an image needs 3 axes with 3 or 4 channels, got shape {tuple(image.shape)}")
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(array)


def encode_png(image: Tensor | np.ndarray) -> bytes:
    """Lossless PNG bytes of an RGB or RGBA image; see :func:`to_uint8_hwc` for what is accepted."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8_hwc(image)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def stored_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) by an encoded image's header; None where there is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError):
        return None


def decode_array(data: bytes, where: str) -> np.ndarray:
    """Decodes an image to float32 RGBA pixels in [0, 1], shape (H, W, 4). See :func:`decode_image`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{where}: image of {image.width}x{image.height} pixels, the limit is {MAX_PIXELS}; shrink it"
                )
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; RGBA conversion would clip it to 255
                grey = np.asarray(image, dtype=np.float32)
                grey = np.clip(grey / 65535.0 if image.mode != "F" else grey, 0, 1)
                return np.stack([grey, grey, grey, np.ones_like(grey)], axis=-1)
            return np.asarray(image.convert("RGBA"), dtype=np.float32) / 255.0
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{where}: cannot be decoded as an image ({error}); replace or remove it") from None


def decode_image(data: bytes, where: str) -> Tensor:
    """Decodes PNG, WebP or any other format that Pillow reads.

    Args:
        data: the file's bytes. Grey, grey + alpha, palette, RGB, RGBA and 16-bit images are accepted.
        where: named in errors, for example a file and row.

    Returns:
        float32 RGBA in [0, 1], shape (4, H, W); alpha is 1 where the image has none.

    Raises:
        DataError: not an image, or above :data:`MAX_PIXELS`.
    """
    return torch.from_numpy(np.ascontiguousarray(decode_array(data, where).transpose(2, 0, 1)))


def image_digest(pixels_HWC: np.ndarray) -> str:
    """32 hex characters naming the shape and pixels of a uint8 image, whatever the encoder did."""
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3:
        raise ValueError(f"digest needs uint8 HWC pixels, got {pixels_HWC.dtype} {pixels_HWC.shape}")
    digest = hashlib.blake2b(repr(pixels_HWC.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels_HWC).data)
    return digest.hexdigest()


def checkerboard(height: int, width: int, square: int = 8) -> Tensor:
    """Light grey checkerboard, RGB, shape (3, H, W)."""
    rows, columns = torch.arange(height)[:, None] // square, torch.arange(width)[None] // square
    return torch.where((rows + columns) % 2 == 0, 0.92, 0.72).expand(3, height, width).contiguous()


def on_checkerboard(image: Tensor, square: int = 8) -> Tensor:
    """Blends an RGBA image (4, H, W) onto a checkerboard: RGB, shape (3, H, W). An RGB image is returned as it is."""
    if image.shape[0] == 3:
        return image
    return blend(image, checkerboard(image.shape[1], image.shape[2], square).to(image))


def layer_rows(inputs: Sequence[Tensor], stacks: Sequence[Tensor], targets_LCHW: Tensor) -> list[list[Tensor | None]]:
    """Rows for :func:`draw_grid`, one for each layer: an input, that layer of every stack (L, C, H, W), the truth."""
    return [
        [inputs[min(layer, len(inputs) - 1)] if inputs else None, *(stack[layer] for stack in stacks), truth]
        for layer, truth in enumerate(targets_LCHW)
    ]


def draw_grid(
    rows: Sequence[Sequence[Tensor | None]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    cell: int = 128,
) -> Image.Image:
    """Draws images in a labelled grid, for people to look at.

    Args:
        rows: rows of RGBA or RGB images, shape (C, H, W), in [0, 1]; None leaves a cell empty.
        column_titles: one text above each column; may be empty.
        row_titles: one text above each row of images, long texts are cut to the width; may be empty.
        cell: side of a cell in pixels; images are scaled to fit.
    """
    columns = max([len(row) for row in rows] + [len(column_titles), 1])
    gap, letter = 6, max(10, cell // 10)
    font, line = ImageFont.load_default(size=letter), int(letter * 1.5)
    width = columns * (cell + gap) + gap
    head = line if column_titles else 0
    step = cell + gap + (line if row_titles else 0)
    sheet = Image.new("RGB", (width, head + gap + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)

    def write(left: int, top: int, text: str, room: int) -> None:
        while text and pen.textlength(text, font=font) > room:
            text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
        pen.text((left, top), text, fill="black", font=font)

    for column, title in enumerate(column_titles):
        write(gap + column * (cell + gap), gap // 2, title, cell)
    for index, row in enumerate(rows):
        top = head + gap + index * step
        if index < len(row_titles):
            write(gap, top, row_titles[index], width - 2 * gap)
        if row_titles:
            top += line
        for column, image in enumerate(row):
            if image is not None:
                sheet.paste(_fit(image, cell), (gap + column * (cell + gap), top))
    return sheet


def _fit(image: Tensor, cell: int) -> Image.Image:
    """RGB picture of ``cell`` x ``cell`` pixels with the image centred on a checkerboard."""
    image = image.detach().float().cpu().clamp(0, 1)
    if image.shape[0] == 3:
        image = torch.cat([image, torch.ones_like(image[:1])])
    scale = cell / max(image.shape[1:])
    size = (max(1, round(image.shape[2] * scale)), max(1, round(image.shape[1] * scale)))
    # Enlarging keeps hard pixel edges, so a jagged alpha shows; premultiplied, so hidden colours do not bleed.
    premultiplied = torch.cat([image[:3] * image[3:], image[3:]])
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    channels = [np.asarray(Image.fromarray(plane.numpy()).resize(size, method)) for plane in premultiplied]
    alpha = np.clip(channels[3], 0, 1)
    board = checkerboard(size[1], size[0], max(4, cell // 16)).numpy()
    board = np.clip(np.stack(channels[:3]) + board * (1 - alpha), 0, 1)
    picture = Image.new("RGB", (cell, cell), "white")
    picture.paste(
        Image.fromarray(to_uint8_hwc(torch.from_numpy(board))), ((cell - size[0]) // 2, (cell - size[1]) // 2)
    )
    return picture
