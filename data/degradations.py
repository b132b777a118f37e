"""Graded degradations of true layers: what a judge is trained on and checked with, because their order is known.

Grade 0 is the truth, grade :data:`GRADES` the worst. All randomness follows from one seed, so grades of one seed nest:
a higher grade moves further the same way, holes grow where they began.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.errors import DataError
from data.seeding import seed_for
from data.tasks import get_task

GRADES = 4
"""The worst grade."""

WRONG_OBJECT = "wrong_object"
"""Layers that are good but show another object than the prompt names: the prompt changes, not the pixels."""


@dataclass(frozen=True)
class _Scene:
    """What a degradation may use: one layer and what surrounds it, channels last, float32 in [0, 1]."""

    layer_HW4: np.ndarray
    around_HW3: np.ndarray
    """The picture that the layer was cut from, or any photo where the task has no input."""
    unit: float
    """Pixels that stand for one pixel of a 64-pixel image."""
    rng: np.random.Generator
    """Drawn from equally at every grade."""


def _blurred_alpha(scene: _Scene, grade: int) -> np.ndarray:
    return _with_alpha(
        scene, ndimage.gaussian_filter(scene.layer_HW4[..., 3], scene.unit * (0, 0.9, 1.8, 3.2, 5.5)[grade])
    )


def _holed_alpha(scene: _Scene, grade: int) -> np.ndarray:
    alpha = scene.layer_HW4[..., 3]
    return _with_alpha(scene, np.where(_patches(scene, alpha > 0.5, (0, 0.05, 0.12, 0.25, 0.45)[grade]), 0, alpha))


def _haloed_alpha(scene: _Scene, grade: int) -> np.ndarray:
    """A rim of the surroundings, solid at the object and softer outwards."""
    alpha, reach = scene.layer_HW4[..., 3], scene.unit * (1, 1, 2, 3.5, 6)[grade]
    distance = ndimage.distance_transform_edt(alpha <= 0.5)
    rim = np.clip(1.25 - distance / (reach + 1), 0, 1) * (grade > 0)
    return _uncovered(scene, np.maximum(alpha, rim * 0.9))


def _swollen_shape(scene: _Scene, grade: int) -> np.ndarray:
    """Fuller than the object: its outermost colours go on outwards, and thin parts run together."""
    alpha, reach = scene.layer_HW4[..., 3], scene.unit * (0, 1.2, 2.5, 4.5, 8)[grade]
    if not (alpha > 0.5).any():
        return scene.layer_HW4
    distance, nearest = ndimage.distance_transform_edt(alpha <= 0.5, return_indices=True)
    outwards = replace(scene, around_HW3=scene.layer_HW4[..., :3][tuple(nearest)])
    return _uncovered(outwards, np.maximum(alpha, np.clip(reach + 0.5 - distance, 0, 1)))


def _leftover_background(scene: _Scene, grade: int) -> np.ndarray:
    alpha = scene.layer_HW4[..., 3]
    outside = _patches(scene, alpha < 0.05, (0, 0.06, 0.15, 0.3, 0.6)[grade])
    return _uncovered(scene, np.where(outside, 1, alpha))


def _colour_shift(scene: _Scene, grade: int) -> np.ndarray:
    direction = scene.rng.choice((-1.0, 1.0), 3) * scene.rng.uniform(0.5, 1, 3)
    shift = direction * (0, 0.08, 0.16, 0.28, 0.45)[grade] / np.abs(direction).max()
    return np.dstack([np.clip(scene.layer_HW4[..., :3] + shift, 0, 1), scene.layer_HW4[..., 3]])


def _blank_layer(scene: _Scene, grade: int) -> np.ndarray:
    """Fades away: a cut-out towards nothing, an opaque layer towards its mean colour."""
    rest = 1 - (0, 0.3, 0.55, 0.8, 1)[grade]
    colours, alpha = scene.layer_HW4[..., :3], scene.layer_HW4[..., 3]
    if (alpha < 1).any():
        return _with_alpha(scene, alpha * rest)
    return np.dstack([colours * rest + colours.mean(axis=(0, 1)) * (1 - rest), alpha])


def _misplaced_layer(scene: _Scene, grade: int) -> np.ndarray:
    """Shifted; what leaves the image is lost, and an opaque layer repeats its edge."""
    turn = scene.rng.uniform(0, 2 * np.pi)
    distance = scene.unit * (0, 2, 4.5, 9, 17)[grade]
    shift = (round(np.sin(turn) * distance), round(np.cos(turn) * distance))
    opaque = bool((scene.layer_HW4[..., 3] == 1).all())
    modes = ("nearest", "nearest", "nearest", "nearest" if opaque else "constant")  # colours go on under alpha 0
    return np.dstack([ndimage.shift(scene.layer_HW4[..., k], shift, order=0, mode=modes[k]) for k in range(4)])


_LAYER_KINDS: dict[str, Callable[[_Scene, int], np.ndarray]] = {
    "blurred_alpha": _blurred_alpha,
    "holed_alpha": _holed_alpha,
    "haloed_alpha": _haloed_alpha,
    "swollen_shape": _swollen_shape,
    "leftover_background": _leftover_background,
    "colour_shift": _colour_shift,
    "blank_layer": _blank_layer,
    "misplaced_layer": _misplaced_layer,
}
_MISSING_OBJECT = "missing_object"
KINDS = (*_LAYER_KINDS, _MISSING_OBJECT, WRONG_OBJECT)
"""All kinds, the one that changes the prompt last."""

_OF_BACKGROUND = ("holed_alpha", "colour_shift", "blank_layer", "misplaced_layer")
_NEED_INPUT = ("colour_shift", "misplaced_layer")
"""Without the picture it was cut from nobody can tell that a layer has other colours or another place."""


def kinds_for(task: str) -> tuple[str, ...]:
    """Kinds of degradation that can be seen in layers of a task.

    Raises:
        ConfigError: no such task.
    """
    facts = get_task(task)
    foreground = tuple(kind for kind in _LAYER_KINDS if facts.inputs or kind not in _NEED_INPUT)
    if facts.backgrounds:
        opaque: tuple[str, ...] = ("leftover_background", *_OF_BACKGROUND)
    else:
        opaque = (_MISSING_OBJECT, *_OF_BACKGROUND) if "background" in facts.inputs else _OF_BACKGROUND
    visual = foreground if facts.foregrounds else opaque
    return (*visual, WRONG_OBJECT) if facts.names_object else visual


def degrade(kind: str, grade: int, task: str, layers_LCHW: Tensor, around_4HW: Tensor, seed: int) -> Tensor:
    """The layers with one of them spoilt.

    Args:
        kind: one of :func:`kinds_for` the task; :data:`WRONG_OBJECT` leaves the layers as they are.
        grade: 0 (untouched) to :data:`GRADES`.
        layers_LCHW: true layers, back to front, straight alpha, float in [0, 1].
        around_4HW: the task's input image; of a task without one any photo.
        seed: equal seeds spoil alike.

    Raises:
        DataError: a grade or a kind that there is not.
    """
    if not 0 <= grade <= GRADES:
        raise DataError(f"degradation {kind!r} has grades 0 to {GRADES}, not {grade}")
    if kind not in kinds_for(task):
        raise DataError(f"degradation {kind!r} does not fit task {task!r}; it has: {', '.join(kinds_for(task))}")
    if kind == WRONG_OBJECT or grade == 0:
        return layers_LCHW.clone()
    rng = np.random.Generator(np.random.PCG64(seed_for(seed, "degradation", kind)))
    place = _spoilt_layer(kind, task, rng)
    around, layer = _channels_last(around_4HW)[..., :3], _channels_last(layers_LCHW[place])
    if kind == _MISSING_OBJECT or (kind == "leftover_background" and get_task(task).targets[place] == "background"):
        spoilt = _towards_input(layer, around, grade)
    else:
        spoilt = _LAYER_KINDS[kind](_Scene(layer, around, layer.shape[0] / 64, rng), grade)
    degraded = layers_LCHW.clone()
    degraded[place] = torch.from_numpy(np.ascontiguousarray(spoilt.astype(np.float32).transpose(2, 0, 1)))
    return degraded


def _spoilt_layer(kind: str, task: str, rng: np.random.Generator) -> int:
    """Which layer a kind spoils: the foreground, or of kinds that opaque layers can have too any."""
    facts = get_task(task)
    opaque = [place for place, role in enumerate(facts.targets) if role != "foreground"]
    both = [*facts.foregrounds, *(opaque if kind in _OF_BACKGROUND or not facts.foregrounds else ())]
    return both[int(rng.integers(len(both)))]


def _towards_input(layer_HW4: np.ndarray, around_HW3: np.ndarray, grade: int) -> np.ndarray:
    """A background in which what was to be removed still shows, or a scene to which the object is hardly added."""
    rest = (0, 0.2, 0.4, 0.65, 1)[grade]
    return np.dstack([layer_HW4[..., :3] * (1 - rest) + around_HW3 * rest, layer_HW4[..., 3]])


def _with_alpha(scene: _Scene, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([scene.layer_HW4[..., :3], alpha])


def _uncovered(scene: _Scene, alpha: np.ndarray) -> np.ndarray:
    """Raises alpha; what becomes visible has the colours of the surroundings."""
    own = scene.layer_HW4[..., 3:]
    share = np.where(alpha[..., None] > 0, own / np.maximum(alpha[..., None], 1e-6), 1)
    colours = scene.layer_HW4[..., :3] * share + scene.around_HW3 * (1 - share)
    return np.dstack([colours, alpha])


def _patches(scene: _Scene, where: np.ndarray, share: float) -> np.ndarray:
    """Blobs that cover ``share`` of ``where``; those of a smaller share lie inside those of a larger one."""
    noise = ndimage.gaussian_filter(scene.rng.standard_normal(where.shape), scene.unit * 3)
    if not where.any() or not share:
        return np.zeros_like(where)
    return where & (noise <= np.quantile(noise[where], share))


def _channels_last(image_CHW: Tensor) -> np.ndarray:
    return image_CHW.permute(1, 2, 0).float().numpy()
