"""A tiny library of generated images in the folder layout of the real sources."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.sources import Fetched, FetchedSource

SMALL = DataConfig(
    size=32,
    train_scenes=6,
    val_scenes=3,
    test_scenes=4,
    scenes_per_shard=4,
    held_out_categories=("stamps/music",),
    val_share=0.2,
    test_share=0.2,
    workers=1,
)

STAMPS = {
    "fruit/apple": "A red apple.",
    "fruit/pear": "A pear!",
    "fruit/plum": "A plum. Yum!",
    "animals/cow": "A cow.",
    "animals/cow2": "A cow.",
    "animals/horse": "A horse.",
    "animals/bee": "A bee resembles a fly.",
    "music/drum": "A drum.",
    "music/violin": "A violin.",
    "town/house": "A house.",
    "town/tower": "A tower.",
    "town/tent": "A tent.",
}


def shape(seed: int, height: int = 100, width: int = 130) -> np.ndarray:
    """A soft blob in one colour with black, wrong colours under alpha 0; uint8 (H, W, 4)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    radius = 0.7 + 0.15 * np.sin(rng.integers(2, 6) * np.arctan2(y, x))
    alpha = np.clip((radius - np.hypot(x, y)) * 15, 0, 1)
    colour = rng.uniform(0.4, 1.0, 3) * (alpha[..., None] > 0)
    return np.rint(np.concatenate([colour, alpha[..., None]], axis=-1) * 255).astype(np.uint8)


def make_sources(root: Path) -> Fetched:
    """Stamps, emoji with names, and photos under ``root``."""
    stamps, emoji, names, photos = (root / part for part in ("tuxpaint-stamps", "fluent-emoji", "emojibase", "photos"))
    for number, (name, line) in enumerate(STAMPS.items()):
        path = stamps / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shape(number)).save(path)
        path.with_suffix(".txt").write_text(line + "\n", encoding="utf-8")
    Image.fromarray(shape(0)).save(stamps / "fruit" / "apple_mirror.png")
    Image.fromarray(shape(50)[..., :3]).save(stamps / "fruit" / "opaque.png")
    Image.fromarray(shape(51, 40, 40)).save(stamps / "fruit" / "small.png")
    (stamps / "symbols").mkdir()
    Image.fromarray(shape(52)).save(stamps / "symbols" / "plus.png")
    for folder in (emoji, names, photos):
        folder.mkdir(parents=True)
    entries = [
        {"hexcode": "1F34C", "label": "banana", "group": 4, "subgroup": 42},
        {"hexcode": "1F40E-FE0F", "label": "otter", "group": 3, "subgroup": 34},
        {"hexcode": "1F600", "label": "grinning face", "group": 0, "subgroup": 0},
    ]
    (names / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    for number, code in enumerate(("1f34c", "1f40e", "1f600", "1f34c-1f3fd")):
        Image.fromarray(shape(60 + number)).save(emoji / f"{code}.webp", lossless=True)
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((480, 400), Image.Resampling.BICUBIC).save(photos / f"{number}.jpg")
    Image.new("RGB", (64, 64)).save(photos / "tiny.png")
    return Fetched(
        (
            FetchedSource("tuxpaint-stamps", "foreground", "1", "GPL", stamps, "sha256:a"),
            FetchedSource("fluent-emoji", "foreground", "1", "MIT", emoji, "sha256:b"),
            FetchedSource("emojibase", "names", "1", "MIT", names, "sha256:c"),
            FetchedSource("photos", "photo", "1", "CC0", photos, "sha256:d"),
        ),
        {"mate-photos": "not reachable"},
    )
