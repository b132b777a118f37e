"""What a judge is shown: views of candidates, as a sheet for eyes or woven for a small network."""

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.rgba import blend, draw_grid, on_checkerboard, over, to_uint8_hwc
from rewards.base import RewardBatch
from rewards.judge.templates import Templates


def pictures(templates: Templates, batch: RewardBatch, members: Sequence[int], lettered: bool) -> list[Image.Image]:
    """The pictures for one question about some members, in the order given.

    Layout ``sheet`` gives one picture with a row per candidate, with the letters A, B, … where ``lettered``; layout
    ``woven`` gives one picture per candidate.
    """
    config, views = templates.protocols, templates.task(batch.task).views
    rows = [[view_3HW(batch, member, view) for view in views] for member in members]
    if config.layout == "woven":
        return [woven(torch.stack([_resized(view, config.side) for view in row])) for row in rows]
    titles = [ascii_uppercase[place] for place in range(len(members))] if lettered else []
    columns = [view.replace(".", " on ").replace("on alpha", "alpha") for view in views]
    return [draw_grid(rows, columns, titles, cell=config.side)]


def view_3HW(batch: RewardBatch, member: int, view: str) -> Tensor:
    """One view of a candidate: RGB, shape (3, H, W), in [0, 1]."""
    layers = batch.layers_GLCHW[member]
    if view == "blank":
        return torch.full_like(layers[0, :3], 0.5)
    source, _, look = view.partition(".")
    if source in ("input", "mask"):
        image = batch.inputs[
            next(k for k, role in enumerate(batch.input_roles) if (role == "mask") == (source == "mask"))
        ]
    else:
        places = {"foreground": batch.foregrounds, "background": batch.backgrounds}.get(source)
        image = over(layers if places is None else layers[list(places)])
    if look == "alpha":
        return image[3:].expand(3, -1, -1)
    if look == "checker":
        return on_checkerboard(image, square=max(2, image.shape[1] // 8))
    return blend(image, 0.0 if look == "black" else 1.0)


def woven(views_4CHW: Tensor) -> Image.Image:
    """Four views in one picture of twice their side, taking turns in every 2 × 2 pixels.

    Each patch of the network then holds the four views of one place, pixel beside pixel: differences between what was
    given and what came out are linear in its first layer. People cannot read such a picture; a small network can.
    """
    channels = views_4CHW.transpose(0, 1).flatten(0, 1)  # colour by colour, the four views of each
    return Image.fromarray(to_uint8_hwc(F.pixel_shuffle(channels, 2)))


def unwoven(picture: Image.Image) -> Tensor:
    """The four views of a :func:`woven` picture: shape (4, 3, H, W), in [0, 1]."""
    pixels = torch.from_numpy(np.asarray(picture, np.float32).transpose(2, 0, 1) / 255)
    return F.pixel_unshuffle(pixels, 2).unflatten(0, (3, 4)).transpose(0, 1)


def _resized(view_3HW: Tensor, side: int) -> Tensor:
    if view_3HW.shape[-2:] == (side, side):
        return view_3HW
    return F.interpolate(view_3HW[None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0]
