"""Other people's data in miniature: JSONL files with images, and folders of records."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.rgba import to_uint8_hwc
from tests.unit.data.helpers import disc, photo

SIZE = 16


def pictures(seed: int = 0, height: int = SIZE, width: int = SIZE) -> dict[str, np.ndarray]:
    """An image with its mask, background and foreground: uint8, (H, W, 4)."""
    rng = np.random.default_rng(seed)
    size = max(height, width)
    foreground = to_uint8_hwc(disc(size, 0.3 + 0.05 * (seed % 10)))[:height, :width]
    background = to_uint8_hwc(photo(size))[:height, :width].copy()
    background[..., :3] += rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(background)
    image.alpha_composite(Image.fromarray(foreground))
    white = np.where(foreground[..., 3:] >= 128, 255, 0).astype(np.uint8)
    mask = np.concatenate([white, white, white, np.full_like(white, 255)], axis=-1)
    return {"image": np.asarray(image), "mask": mask, "background": background, "foreground": foreground}


def save(path: Path, pixels: np.ndarray, mode: str = "RGBA") -> str:
    """Saves a picture, its folder too, and returns its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path.name


def decomposition(folder: Path, number: int, **fields: object) -> dict:
    """A row of layer decomposition whose images lie in ``folder/images``."""
    drawn = pictures(number)
    for role in ("image", "background", "foreground"):
        save(folder / "images" / f"{number}-{role}.png", drawn[role], "RGBA" if role == "foreground" else "RGB")
    return {
        "id": f"scene-{number}",
        "prompt": "Decompose the image.",
        "input_images": [f"images/{number}-image.png"],
        "output_images": [f"images/{number}-background.png", f"images/{number}-foreground.png"],
        "begin_with_bg": True,
        **fields,
    }


def write_jsonl(path: Path, rows: list) -> Path:
    """One line per row; texts are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_record(folder: Path, roles: tuple[str, ...], number: int = 0, prompt: str = "Cut out the disc.") -> Path:
    """A record's folder with images named by role."""
    drawn = pictures(number)
    for role in roles:
        save(folder / f"{role}.png", drawn[role])
    (folder / "prompt.txt").write_text(prompt + "\n")
    return folder
