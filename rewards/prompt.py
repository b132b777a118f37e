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

from common.errors import RewardError
from data.rgba import over
from data.tasks import named_object
from policy.clip import load_clip
from policy.features import CLASS_SIDE, class_names, load_efficientnet, resized
from rewards.base import RewardBatch, register
from rewards.terms import on_black_and_white

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
    """Nearness of the classes that EfficientNet-Lite0 sees to the named object, as MiniLM understands the words.

    Σ p·cos(name, object) / Σ p over the ten most probable ImageNet classes, p the mean over {black, white}.

    A weak judge (docs/rewards.md): it knows 1000 classes, sees photographs better than drawings, and a picture of the
    right thing among many wrong ones gains little. It tells a cat from a car, not a good cat from a bad one.
    """

    needs = frozenset({"prompt"})
    describes = "EfficientNet-Lite0 class names, all-MiniLM-L6-v2"

    def __init__(self) -> None:
        """
        Raises:
            ConfigError: the weights or the class names are not installed.
        """
        load_efficientnet()
        class_names()
        _text_encoder()

    def score(self, batch: RewardBatch) -> Tensor:
        """Scores (G,) in [−1, 1], mostly between 0 and 1.

        Raises:
            RewardError: the prompt names no object.
        """
        wanted = _text_encoder().sentence(_wanted(batch, "prompt_fidelity"))
        blends_N3HW = _object_blends(batch).flatten(0, 1)
        with torch.no_grad():
            network = load_efficientnet(device=blends_N3HW.device)
            seen_NK = network(resized(blends_N3HW, CLASS_SIDE, CLASS_SIDE)).probabilities_NK.cpu()
        top = seen_NK.reshape(batch.members, 2, -1).mean(dim=1).topk(TOP_CLASSES, dim=1)
        nearness_GT = torch.stack([torch.stack([_name_vector(int(k)) @ wanted for k in row]) for row in top.indices])
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
