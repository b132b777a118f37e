"""The objects and photos that scenes are made of, read from fetched sources and split by group."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from common.errors import DataError
from data.captions import from_sentence, from_stem, group_key, with_article
from data.colours import crop_to_alpha, resize_planes, resize_rgba
from data.config import DataConfig
from data.rgba import decode_array, encode_png
from data.schema import storage_error
from data.sources import Fetched, FetchedSource, Progress

OBJECT_SIDE = 192
"""Longest side, in pixels, at which objects are prepared and kept."""
PHOTO_SIDE = 384
"""Shortest side at which photos are prepared and kept."""
MIN_OBJECT_SIDE = 96
MIN_PHOTO_SIDE = 400
PREPARATION = "3"
"""Raise whenever preparation changes, so that caches of older versions are not used."""

SKIPPED_STAMPS = ("symbols", "town/flags", "town/roadsigns", "people/body_parts", "seasonal/hanukkah/dreydl")
"""Stamps that are signs or parts instead of things."""
EMOJI_GROUPS = {3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
SKIPPED_EMOJI = {
    "place-map", "place-geographic", "place-religious", "place-other", "time", "sky-weather", "event", "sound",
    "computer", "book-paper", "money", "mail", "office",
}  # fmt: skip
"""Emoji subgroups of scenes, signs and near copies (twelve clock faces)."""


@dataclass(frozen=True)
class Foreground:
    """One object with real transparency."""

    key: str
    """Unique name: source and file."""
    name: str
    """Caption, for example "a red apple"."""
    group: str
    """Variants of one object share it; a group lies in one split."""
    category: str
    source: str
    licence: str
    path: Path

    def load(self) -> np.ndarray:
        """RGBA pixels, float32 (H, W, 4) in [0, 1]; once prepared, cropped to the object with colours filled in."""
        return decode_array(_read(self.path), str(self.path))


@dataclass(frozen=True)
class Photo:
    """One opaque photo."""

    key: str
    group: str
    source: str
    licence: str
    path: Path

    def load(self) -> np.ndarray:
        """RGB pixels, float32 (H, W, 3) in [0, 1]."""
        return decode_array(_read(self.path), str(self.path))[..., :3]


@dataclass(frozen=True)
class Library:
    """Objects and photos of one split."""

    foregrounds: tuple[Foreground, ...]
    photos: tuple[Photo, ...]


Item = TypeVar("Item", Foreground, Photo)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); remove the source cache and build again") from None


def _header(path: Path) -> tuple[int, bool]:
    """Longest side of an image and whether it can hold transparency, from the header alone."""
    try:
        with Image.open(path) as image:
            return max(image.size), image.mode in ("RGBA", "LA") or "transparency" in image.info
    except OSError as error:
        raise DataError(f"{path}: not a readable image ({error}); remove the source cache and build again") from None


def collect_foregrounds(fetched: Fetched, limit: int) -> list[Foreground]:
    """Lists the objects of all fetched sources, at most ``limit`` from each, spread evenly over each source.

    Images without an alpha channel or below 96 pixels are left out. Order is by key.
    """
    names = {source.name: source.folder for source in fetched.of_kind("names")}
    found: list[Foreground] = []
    for source in fetched.of_kind("foreground"):
        items = _emoji(source, names["emojibase"]) if source.name == "fluent-emoji" else _stamps(source)
        items.sort(key=lambda item: item.key)
        step = max(len(items) / limit, 1)
        found += [items[int(k * step)] for k in range(min(len(items), limit))]
    return found


def _stamps(source: FetchedSource) -> list[Foreground]:
    items = []
    for path in sorted(source.folder.rglob("*.png")):
        relative = path.relative_to(source.folder)
        name = relative.as_posix()
        if name.startswith(SKIPPED_STAMPS) or re.search(r"_(mirror|flip)(?=[._]|$)", path.stem):
            continue
        side, transparent = _header(path)
        if side < MIN_OBJECT_SIDE or not transparent:
            continue
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
        caption = (from_sentence(lines[0]) if lines else "") or from_stem(path.stem)
        if not caption:
            continue
        category = f"stamps/{relative.parent.as_posix()}".removesuffix("/cartoon")
        key = f"{source.name}:{name}"
        items.append(Foreground(key, caption, group_key(caption), category, source.name, source.licence, path))
    return items


def _emoji(source: FetchedSource, names: Path) -> list[Foreground]:
    entries = json.loads((names / "data.json").read_text(encoding="utf-8"))
    files = {_code(path.stem): path for path in sorted(source.folder.glob("*.webp"))}
    items = []
    for entry in entries:
        code = _code(entry["hexcode"])
        category = EMOJI_SUBGROUPS.get(entry.get("subgroup", -1), "other")
        if entry.get("group") not in EMOJI_GROUPS or category in SKIPPED_EMOJI or code not in files:
            continue
        caption = with_article(re.sub(r"[:“”]", "", entry["label"].lower()).strip())
        if len(caption.split()) > 6:
            continue
        key = f"{source.name}:{code}"
        # Equal captions share a group across sources, so a test prompt names nothing that was trained on.
        item = Foreground(
            key, caption, group_key(caption), f"emoji/{category}", source.name, source.licence, files[code]
        )
        items.append(item)
    return items


def _code(text: str) -> str:
    """Base code points of an emoji: lower case, without the variation selector and skin tones."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f" and not re.fullmatch(r"1f3f[b-f]", part))


# Numbers of emojibase-data 17 (meta/groups.json) for the subgroups in EMOJI_GROUPS.
_SUBGROUPS = [
    "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile", "animal-marine", "animal-bug",
    "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet",
    "drink", "dishware", "place-map", "place-geographic", "place-building", "place-religious", "place-other",
    "transport-ground", "transport-water", "transport-air", "hotel", "time", "sky-weather", "event", "award-medal",
    "sport", "game", "arts-crafts", "clothing", "sound", "music", "musical-instrument", "phone", "computer",
    "light-video", "book-paper", "money", "mail", "writing", "office", "lock", "tool", "science", "medical",
    "household", "other-object",
]  # fmt: skip
EMOJI_SUBGROUPS = dict(enumerate(_SUBGROUPS, start=34))


def collect_photos(fetched: Fetched) -> list[Photo]:
    """Lists the photos of all fetched sources; pictures below 400 pixels are left out. Order is by source and file."""
    photos = []
    for source in fetched.of_kind("photo"):
        for path in sorted(source.folder.rglob("*")):
            if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
                continue
            if _header(path)[0] < MIN_PHOTO_SIDE:
                continue
            key = f"{source.name}:{path.name}"
            photos.append(Photo(key, key, source.name, source.licence, path))
    return photos


def collect_more(fetched: Fetched) -> Library:
    """Lists the objects and photos that only training may use, where the fetched sources have any."""
    return Library(
        tuple(item for source in fetched.of_kind("more foreground") for item in _furniture(source)),
        tuple(photo for source in fetched.of_kind("more photo") for photo in _wallpapers(source)),
    )


def _furniture(source: FetchedSource) -> list[Foreground]:
    """Objects of Sweet Home 3D's catalogues: rendered icons with a name and a category."""
    items = []
    for catalogue in sorted(source.folder.rglob("PluginFurnitureCatalog.properties")):
        entries: dict[str, dict[str, str]] = {}
        for line in catalogue.read_text(encoding="latin-1").splitlines():
            if match := re.fullmatch(r"(name|icon|category)#(\d+)=(.*)", line):
                entries.setdefault(match[2], {})[match[1]] = match[3].strip()
        for number, entry in entries.items():
            path = catalogue.parent / entry.get("icon", "").lstrip("/")
            if len(entry) < 3 or not path.is_file() or _header(path)[0] < MIN_OBJECT_SIDE:
                continue
            caption = with_article(re.sub(r"[^a-z ]", "", entry["name"].lower()).strip())
            key = f"{source.name}:{catalogue.parent.name}/{number}"
            category = f"furniture/{entry['category'].lower()}"
            items.append(Foreground(key, caption, group_key(caption), category, source.name, source.licence, path))
    return items


def _wallpapers(source: FetchedSource) -> list[Photo]:
    """Pictures of at least 400 pixels; of one that lies there in several sizes, the largest."""
    largest: dict[str, tuple[int, Path]] = {}
    for path in sorted(source.folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png") or path.is_symlink() or path.stem == "screenshot":
            continue
        side = _header(path)[0]
        # Sizes of one wallpaper are files 2560x1600.jpg, … in a folder of its own.
        picture = path.parent if re.fullmatch(r"\d+x\d+", path.stem) else path
        name = picture.relative_to(source.folder).as_posix()
        if side >= max(MIN_PHOTO_SIDE, largest.get(name, (0, path))[0] + 1):
            largest[name] = (side, path)
    return [
        Photo(f"{source.name}:{name}", f"{source.name}:{name}", source.name, source.licence, path)
        for name, (_, path) in sorted(largest.items())
    ]


def widened(libraries: Mapping[str, Library], more: Library) -> Library:
    """The training library with what ``more`` adds to it: nothing that validation or test have under the same name."""
    held = {item.group for split in ("val", "test") for item in libraries[split].foregrounds}
    train = libraries["train"]
    return Library(
        train.foregrounds + tuple(item for item in more.foregrounds if item.group not in held),
        train.photos + more.photos,
    )


def prepare(items: Sequence[Item], fetched: Fetched, cache: Path, progress: Progress = lambda _: None) -> list[Item]:
    """Brings objects and photos to working size, once; objects get colours under their transparent pixels.

    Results are kept in ``cache/prepared`` by source checksum and parameters. Objects that turn out to have no
    transparency, or hardly anything visible, are left out.

    Raises:
        DataError: an image of a checked source cannot be decoded.
        StorageError: the cache cannot be written.
    """
    checksums = {source.name: source.checksum for source in fetched.sources}
    ready: list[Item] = []
    for number, item in enumerate(items):
        parameters = f"{PREPARATION}|{OBJECT_SIDE}|{PHOTO_SIDE}|{checksums[item.source]}|{item.key}"
        name = hashlib.blake2b(parameters.encode(), digest_size=16).hexdigest()
        target = cache / "prepared" / name[:2] / f"{name}.png"
        if not target.exists():
            pixels = _prepare_object(item.load()) if isinstance(item, Foreground) else _prepare_photo(item.load())
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_suffix(".tmp")
                temporary.write_bytes(b"" if pixels is None else encode_png(pixels))
                temporary.replace(target)
            except OSError as error:
                raise storage_error(error, target) from error
        if target.stat().st_size:  # an empty file remembers an unusable object
            ready.append(replace(item, path=target))
        if (number + 1) % 200 == 0:
            progress(f"prepared {number + 1} of {len(items)} images")
    return ready


def _prepare_object(pixels: np.ndarray) -> np.ndarray | None:
    alpha = pixels[..., 3]
    if alpha.min() > 0.5 or alpha.mean() < 0.02 or alpha.max() < 0.5:
        return None
    pixels = crop_to_alpha(pixels)
    scale = min(1.0, OBJECT_SIDE / max(pixels.shape[:2]))
    height, width = (max(8, round(side * scale)) for side in pixels.shape[:2])
    if min(height, width) < OBJECT_SIDE // 6:  # a line, not an object, at 64 pixels
        return None
    return resize_rgba(pixels, width, height)


def _prepare_photo(pixels: np.ndarray) -> np.ndarray:
    scale = min(1.0, PHOTO_SIDE / min(pixels.shape[:2]))
    height, width = (round(side * scale) for side in pixels.shape[:2])
    return resize_planes(pixels, width, height, Image.Resampling.HAMMING)


def assign_splits(groups: Iterable[str], val_share: float, test_share: float) -> dict[str, str]:
    """Gives each group a split by its rank in sorted order, evenly spread; every split gets some if there are three."""
    ranked = sorted(set(groups))
    count = len(ranked)
    places = {"test": max(round(test_share * count), 1), "val": max(round(val_share * count), 1)}
    splits: dict[str, str] = {}
    for split, wanted in places.items():
        free = [group for group in ranked if group not in splits]
        for k in range(min(wanted, max(len(free) - 1, 0))):
            splits[free[int((k + 0.5) * len(free) / wanted)]] = split
    return {group: splits.get(group, "train") for group in ranked}


def split_library(foregrounds: Sequence[Foreground], photos: Sequence[Photo], config: DataConfig) -> dict[str, Library]:
    """Splits objects and photos by group; groups with a member in a held-out category go to test.

    Raises:
        DataError: a split gets no photo, or too few objects for its scenes.
    """
    held_out = {item.group for item in foregrounds if item.category.startswith(config.held_out_categories)}
    shares = (config.val_share, config.test_share)
    objects = assign_splits((item.group for item in foregrounds if item.group not in held_out), *shares)
    objects |= dict.fromkeys(held_out, "test")
    pictures = assign_splits((photo.group for photo in photos), *shares)
    libraries = {}
    for split in ("train", "val", "test"):
        library = Library(
            tuple(item for item in foregrounds if objects[item.group] == split),
            tuple(photo for photo in photos if pictures[photo.group] == split),
        )
        names = {item.group for item in library.foregrounds}
        if not library.photos or len(names) < 2:
            raise DataError(
                f"split {split}: {len(library.photos)} photos and {len(names)} object groups are too few; raise "
                f"{split}_share or max_foregrounds_per_source, or see which sources were skipped"
            )
        libraries[split] = library
    return libraries
