"""Scenes: photos with objects placed over them, whose exact layers are known, and the records they give.

A scene is a pure function of (seed, split, scene number) and the library, so scenes may be drawn in any process.
Pixels are quantised to 8 bits before they are composited, so stored layers recompose to the stored image exactly.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from common.errors import DataError
from data.captions import group_key
from data.colours import crop_to_alpha, premultiply, resize_planes, rotate_planes, unpremultiply
from data.config import DataConfig
from data.library import Foreground, Library, Photo
from data.schema import LayerImage, Record
from data.seeding import seed_for
from data.tasks import TASKS

MIN_COVER = 0.02
"""Least share of the image that a referred or cut-out object covers."""
MIN_VISIBLE = 0.6
"""Least share of an object that stays visible behind another."""
ATTEMPTS = 50


@dataclass(frozen=True)
class Scene:
    """One drawn scene; all arrays uint8, shape (size, size, 4), straight alpha."""

    background: np.ndarray
    objects: tuple[np.ndarray, ...]
    """Visible layers, back to front: what stands in front already reduces the alpha of what is behind."""
    composite: np.ndarray
    foregrounds: tuple[Foreground, ...]
    photo: Photo


@lru_cache(maxsize=2048)
def _object_pixels(item: Foreground) -> np.ndarray:
    return item.load()


@lru_cache(maxsize=64)
def _photo_pixels(item: Photo) -> np.ndarray:
    return item.load()


def draw_scene(library: Library, config: DataConfig, split: str, number: int, objects: int) -> Scene:
    """Draws scene ``number`` of ``split`` with one or two objects.

    Raises:
        DataError: no placement with visible objects was found, which means that the library's objects are faint.
    """
    for attempt in range(ATTEMPTS):
        rng = np.random.Generator(np.random.PCG64(seed_for(config.seed, "scene", split, number, attempt)))
        photo = library.photos[rng.integers(len(library.photos))]
        chosen = _choose(library.foregrounds, objects, rng)
        if chosen is None:
            continue
        varied = config.varied_photos and split == "train"
        background = _quantise(_background(_photo_pixels(photo), config.size, rng, varied))
        sides = (0.35, 0.85) if objects == 1 else (0.35, 0.6)
        placed = [_place(_object_pixels(item), config.size, sides, rng, slot) for slot, item in enumerate(chosen)]
        layers = [_quantise(layer) for layer in placed]
        if objects == 2:
            hidden = _hide_behind(layers[0], layers[1])
            if hidden[..., 3].sum(dtype=float) < MIN_VISIBLE * layers[0][..., 3].sum(dtype=float):
                continue
            layers[0] = hidden
        if min(layer[..., 3].mean() / 255 for layer in layers) >= MIN_COVER:
            return Scene(background, tuple(layers), composite(background, layers), tuple(chosen), photo)
    raise DataError(
        f"scene {split}-{number:06d}: no visible placement in {ATTEMPTS} attempts; check the objects of the library "
        f"({len(library.foregrounds)} objects, {len(library.photos)} photos)"
    )


def scene_records(library: Library, config: DataConfig, split: str, number: int) -> list[Record]:
    """The records of one scene, in the order of ``config.tasks``. See :func:`draw_scene` for errors."""
    rng = np.random.Generator(np.random.PCG64(seed_for(config.seed, "tasks", split, number)))
    objects = 2 if "referring_matting" in config.tasks and rng.random() < config.two_object_share else 1
    if set(config.tasks) == {"referring_matting"}:
        objects = 2
    scene = draw_scene(library, config, split, number, objects)
    records = []
    encoded: dict[tuple[str, int], LayerImage] = {}  # the tasks of a scene share most images
    for task in config.tasks:
        if (task == "referring_matting") == (objects == 2):
            rng = np.random.Generator(np.random.PCG64(seed_for(config.seed, "record", split, number, task)))
            records.append(_record(scene, config, task, f"{split}-{number:06d}-{task}", rng, encoded))
    return records


def _record(
    scene: Scene,
    config: DataConfig,
    name: str,
    identifier: str,
    rng: np.random.Generator,
    encoded: dict[tuple[str, int], LayerImage],
) -> Record:
    task = TASKS[name]
    which = int(rng.integers(len(scene.objects)))
    item, layer = scene.foregrounds[which], scene.objects[which]
    if name == "text_to_rgba":
        layer = _quantise(_centred(_object_pixels(item), config.size, rng))
    images = {"image": scene.composite, "foreground": layer, "background": scene.background}
    if "mask" in task.inputs:
        images["mask"] = rough_mask(layer[..., 3], rng, covering=name == "object_removal")
    shared = [scene.composite, scene.background, *scene.objects]

    def stored(role: str) -> LayerImage:
        image = images[role]
        if not any(image is own for own in shared):
            return LayerImage.encode(role, image)
        if (role, id(image)) not in encoded:
            encoded[role, id(image)] = LayerImage.encode(role, image)
        return encoded[role, id(image)]

    alone = name == "text_to_rgba"
    sources = [f.source for f in scene.foregrounds] + ([] if alone else [scene.photo.source])
    licences = [f.licence for f in scene.foregrounds] + ([] if alone else [scene.photo.licence])
    instruction = task.instructions[int(rng.integers(len(task.instructions)))]
    return Record(
        id=identifier,
        task=name,
        prompt=instruction.format(caption=item.name),
        inputs=tuple(stored(role) for role in task.inputs),
        targets=tuple(stored(role) for role in task.targets),
        caption=item.name,
        photo_group="" if alone else scene.photo.group,
        # The target's own object comes first: it is what a paired comparison resamples by.
        object_groups=(item.group, *(f.group for f in scene.foregrounds if f is not item)),
        source=" + ".join(dict.fromkeys(sources)),
        licence=" + ".join(dict.fromkeys(licences)),
    )


def _choose(items: tuple[Foreground, ...], count: int, rng: np.random.Generator) -> list[Foreground] | None:
    """Objects of different names; None if this try drew two that a prompt could not tell apart."""
    chosen = [items[k] for k in rng.integers(len(items), size=count)]
    if count == 2:
        words = [set(group_key(item.name).split("-")) for item in chosen]
        if chosen[0].group == chosen[1].group or words[0] <= words[1] or words[1] <= words[0]:
            return None
    return chosen


def composite(background: np.ndarray, layers: list[np.ndarray]) -> np.ndarray:
    """C = sum of alpha F + (1 - sum of alpha) B over visible layers, uint8 (H, W, 4), opaque.

    Visible layers do not overlap beyond alpha 1, so their order no longer matters.
    """
    colour = np.zeros((*background.shape[:2], 3))
    left = np.ones((*background.shape[:2], 1))
    for layer in layers:
        alpha = layer[..., 3:] / 255.0
        colour += layer[..., :3] * alpha
        left -= alpha
    colour += background[..., :3] * np.clip(left, 0, 1)
    return np.concatenate([np.rint(np.clip(colour, 0, 255)), np.full_like(colour[..., :1], 255)], -1).astype(np.uint8)


def _hide_behind(layer: np.ndarray, front: np.ndarray) -> np.ndarray:
    """The layer with its alpha reduced by what stands in front."""
    alpha = layer[..., 3] * (1 - front[..., 3] / 255.0)
    return np.concatenate([layer[..., :3], np.floor(alpha)[..., None].astype(np.uint8)], axis=-1)


def _quantise(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _background(photo: np.ndarray, size: int, rng: np.random.Generator, varied: bool) -> np.ndarray:
    """A random square crop of a photo, maybe flipped and slightly re-lit; opaque.

    Where ``varied``, crops may be as small as two thirds of ``size``, turned by quarters and strongly re-lit.
    """
    height, width = photo.shape[:2]
    least = min(0.67 * size / min(height, width), 1.0) if varied else 0.4
    side = max(1, int(min(height, width) * rng.uniform(least, 1.0)))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = resize_planes(photo[top : top + side, left : left + side], size, size, Image.Resampling.HAMMING)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if varied:
        crop = np.rot90(crop, int(rng.integers(4)))
    crop = _jitter(crop, rng, 5.0 if varied else 1.0)
    return np.concatenate([crop, np.ones((size, size, 1), np.float32)], axis=-1)


def _jitter(colours: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Change of brightness, contrast and colour balance; mild at strength 1."""
    contrast = rng.uniform(1 - 0.1 * strength, 1 + 0.1 * strength)
    brightness = rng.uniform(-0.05 * strength, 0.05 * strength)
    balance = rng.uniform(1 - 0.04 * strength, 1 + 0.04 * strength, size=3)
    return np.clip(((colours - 0.5) * contrast + 0.5 + brightness) * balance, 0, 1).astype(np.float32)


def _place(
    pixels: np.ndarray, size: int, sides: tuple[float, float], rng: np.random.Generator, slot: int
) -> np.ndarray:
    """One object, turned, scaled and put somewhere wholly inside an empty canvas of ``size``."""
    planes = premultiply(pixels)  # until the end, so that hidden colours never bleed in
    if rng.random() < 0.5:
        planes = planes[:, ::-1]
    if rng.random() < 0.5:
        planes = crop_to_alpha(rotate_planes(planes, float(rng.uniform(-15, 15))))
    planes = _scaled(planes, size * rng.uniform(*sides))
    height, width = planes.shape[:2]
    top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
    if slot == 1:  # keeps most pairs apart: the second object is drawn towards the free side on the right
        left = max(left, int(rng.integers(size - width + 1)))
    placed = _on_canvas(planes, size, top, left)
    return np.concatenate([_jitter(placed[..., :3], rng), placed[..., 3:]], axis=-1)


def _centred(pixels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    planes = premultiply(pixels)
    if rng.random() < 0.5:
        planes = planes[:, ::-1]
    planes = _scaled(planes, size * 0.85)
    return _on_canvas(planes, size, (size - planes.shape[0]) // 2, (size - planes.shape[1]) // 2)


def _scaled(planes: np.ndarray, side: float) -> np.ndarray:
    scale = side / max(planes.shape[:2])
    height, width = (max(2, round(length * scale)) for length in planes.shape[:2])
    return resize_planes(planes, width, height, Image.Resampling.HAMMING)


def _on_canvas(planes: np.ndarray, size: int, top: int, left: int) -> np.ndarray:
    """Straight alpha, (size, size, 4), with the colours filled in everywhere."""
    canvas = np.zeros((size, size, 4), np.float32)
    canvas[top : top + planes.shape[0], left : left + planes.shape[1]] = planes
    return unpremultiply(canvas)


def rough_mask(alpha: np.ndarray, rng: np.random.Generator, covering: bool) -> np.ndarray:
    """A hand-drawn looking binary mask of an object, as an opaque grey RGBA image, uint8.

    Args:
        alpha: uint8, shape (H, W).
        rng: draws how far the mask is grown, shrunk and smoothed.
        covering: the mask holds every visible pixel, as removal needs; otherwise it may also cut into the object.
    """
    unit = max(1, round(alpha.shape[0] / 64))
    soft = Image.fromarray(np.where(alpha > (5 if covering else rng.integers(64, 192)), 255, 0).astype(np.uint8))
    reach = int(rng.integers(1, 4) if covering else rng.integers(-1, 4)) * unit
    if reach:
        grown = soft.filter((ImageFilter.MaxFilter if reach > 0 else ImageFilter.MinFilter)(2 * abs(reach) + 1))
        soft = grown if np.asarray(grown).any() else soft
    blurred = np.asarray(soft.filter(ImageFilter.GaussianBlur(unit * float(rng.uniform(0.5, 2.0)))))
    binary = np.where(blurred > 127, 255, 0).astype(np.uint8)
    if covering or not binary.any():
        binary = np.maximum(binary, np.where(alpha > 5, 255, 0).astype(np.uint8))
    return np.stack([binary, binary, binary, np.full_like(binary, 255)], axis=-1)
