"""Scorers of what a prompt names, without a language model that sees.

Both look at the foreground layers alone (all layers where a task has none in front), composited and blended on black
and on white, and compare with the object that the prompt names (:func:`data.tasks.named_object`). A prompt that names
none, as those of automatic matting, is declined: list the tasks in the term's ``tasks``.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import ConfigError, RewardError
from data.rgba import over
from data.tasks import named_object
from policy.clip import load_clip
from policy.features import CLASS_SIDE, class_names, load_efficientnet, resized
from rewards.base import RewardBatch, register
from rewards.terms import on_black_and_white
from rewards.words import WordMap, load_words

if TYPE_CHECKING:
    from policy.text import TextEncoder

TOP_CLASSES = 10
"""Most probable ImageNet classes whose names are compared with the prompt."""


def _object_blends(batch: RewardBatch) -> Tensor:
    """The foreground on black and on white, (G, 2, 3, H, W)."""

    def make() -> Tensor:
        shown = list(batch.foregrounds) or list(range(len(batch.roles)))
        return on_black_and_white(over(batch.layers_GLCHW[:, shown]))

    return batch.shared("foreground on black and white", make)


def _wanted(batch: RewardBatch, scorer: str) -> str:
    if (named := named_object(batch.task, batch.prompt)) is None:
        raise RewardError(
            f"{scorer} needs a prompt that names an object, which {batch.prompt!r} of task {batch.task!r} does not; "
            "name the tasks it is for in the term's `tasks`"
        )
    return named


@register("prompt_fidelity")
class PromptFidelity:
    """Nearness of what EfficientNet-Lite0 sees to the named object, as MiniLM understands the words.

    The mean of two cosines: of the classes that it sees (:func:`class_nearness`), and of what a map fitted to named
    objects reads from its features (:mod:`rewards.words`).

    Not a strong judge (docs/rewards.md): it knows photographs better than drawings, and tells a cat from a car, not a
    good cat from a bad one.
    """

    needs = frozenset({"prompt"})
    describes = "EfficientNet-Lite0, all-MiniLM-L6-v2"

    def __init__(self, weights: str | Path | None = None, words: bool = True) -> None:
        """
        Args:
            weights: a map that ``omnialpha reward fit-words`` wrote; None is the one that comes with the package.
            words: whether the map is asked at all.

        Raises:
            ConfigError: the network's weights, its class names or the map are missing.
        """
        if weights is not None and not words:
            raise ConfigError(
                "prompt_fidelity: weights name a map from features to words, and words: false leaves it out"
            )
        load_fidelity()
        self.weights = Path(weights).expanduser() if weights is not None else None
        self.words = words
        if words:
            load_words(self.weights)

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−1, 1], mostly between 0 and 1.

        Raises:
            RewardError: the prompt names no object.
        """
        return nearness(batch, _wanted(batch, "prompt_fidelity"), load_words(self.weights) if self.words else None)


def load_fidelity() -> None:
    """Loads the networks that :func:`nearness` asks.

    Raises:
        ConfigError: weights or class names are missing.
    """
    load_efficientnet()
    class_names()
    _text_encoder()


def nearness(batch: RewardBatch, wanted: str, words: WordMap | None) -> Tensor:
    """Nearness (G,) of what is seen to what ``wanted`` names, in [−1, 1]; see :class:`PromptFidelity`.

    In float32 whatever precision the caller trains in.
    """
    with torch.autocast(batch.layers_GLCHW.device.type, enabled=False), torch.autocast("cpu", enabled=False):
        wanted_D = _text_encoder().sentence(wanted)
        features_GC, classes_GK = batch.shared("what EfficientNet sees", lambda: _pooled(_object_blends(batch)))
        by_class_G = class_nearness(classes_GK, wanted_D)
        return by_class_G if words is None else (by_class_G + words.nearness(features_GC, wanted_D)) / 2


def see(layers_GLCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Features (G, C) and ImageNet class probabilities (G, K) of composited layers, mean over {black, white}."""
    return _pooled(on_black_and_white(over(layers_GLCHW)))


def _pooled(blends_G23HW: Tensor) -> tuple[Tensor, Tensor]:
    members = len(blends_G23HW)
    blends_N3HW = blends_G23HW.flatten(0, 1)
    with torch.no_grad():
        seen = load_efficientnet(device=blends_N3HW.device)(resized(blends_N3HW, CLASS_SIDE, CLASS_SIDE))
    features, classes = (
        part.cpu().reshape(members, 2, -1).mean(dim=1) for part in (seen.pooled_NC, seen.probabilities_NK)
    )
    return features, classes


def class_nearness(classes_GK: Tensor, wanted_D: Tensor) -> Tensor:
    """Σ p·cos(name, object) / Σ p over the ten most probable classes of each member, (G,) in [−1, 1]."""
    top = classes_GK.topk(TOP_CLASSES, dim=1)
    nearness_GT = torch.stack([torch.stack([_name_vector(int(k)) @ wanted_D for k in row]) for row in top.indices])
    return (top.values * nearness_GT).sum(dim=1) / top.values.sum(dim=1)


@lru_cache(maxsize=1)
def _text_encoder() -> "TextEncoder":
    from policy.text import TextEncoder  # slow to import, and rarely needed

    return TextEncoder()


@lru_cache(maxsize=1000)
def _name_vector(number: int) -> Tensor:
    return _text_encoder().sentence(class_names()[number])


@register("clip")
class ClipSimilarity:
    """CLIP's cosine between the picture and the named object, mean over {black, white}; the model is the user's."""

    needs = frozenset({"prompt"})

    def __init__(self, folder: str | Path) -> None:
        """
        Args:
            folder: a CLIP model with its tokenizer, as ``transformers`` saves them; nothing is downloaded.

        Raises:
            ConfigError: the folder is missing or holds something else.
        """
        self.folder = Path(folder).expanduser()
        load_clip(self.folder)

    @property
    def describes(self) -> str:
        """The folder's name."""
        return f"CLIP, {self.folder.name}"

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−1, 1].

        Raises:
            RewardError: the prompt names no object.
        """
        wanted = _wanted(batch, "clip")
        similarity_N = load_clip(self.folder).similarity(_object_blends(batch).flatten(0, 1), wanted)
        return similarity_N.reshape(batch.members, 2).mean(dim=1)
