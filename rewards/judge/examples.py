"""Training questions with known answers, drawn from degraded records of a split: pure functions of seed and position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.captions import group_key, with_article
from data.degradations import GRADES, WRONG_OBJECT, degrade, kinds_for
from data.records import RecordDataset
from data.schema import Record
from data.seeding import seed_for
from data.tasks import get_task
from rewards.base import RewardBatch
from rewards.judge.asking import Question
from rewards.judge.pictures import pictures
from rewards.judge.templates import ProtocolName, Templates


@dataclass(frozen=True)
class Example:
    """A question and the answer that a judge should give."""

    question: Question
    target: tuple[float, ...]
    """Probability of each label."""


@dataclass(frozen=True)
class Spoilt:
    """One candidate: how it was made worse."""

    kind: str
    grade: int
    seed: int


class Examples:
    """Degraded records of one split as groups of candidates."""

    def __init__(self, dataset: RecordDataset) -> None:
        self.data = dataset
        with_input = [t for t in dataset.tasks if "image" in get_task(t).inputs]
        self._photos = np.concatenate([dataset.positions(task) for task in with_input])

    def group(self, index: int, candidates: Sequence[Spoilt], seed: int) -> RewardBatch:
        """Candidates of one record. A group with a wrong object has it as the prompt's: all share the prompt."""
        record = self.data.record(index)
        sample, facts = record.decode(), get_task(record.task)
        around = sample.inputs[0] if sample.inputs else self._photo(seed)
        layers = [degrade(c.kind, c.grade, record.task, sample.targets_LCHW, around, c.seed) for c in candidates]
        wrong = any(c.kind == WRONG_OBJECT and c.grade for c in candidates)
        return RewardBatch(
            task=record.task,
            prompt=self.other_prompt(record, seed) if wrong else record.prompt,
            roles=facts.targets,
            layers_GLCHW=torch.stack(layers),
            targets_LCHW=sample.targets_LCHW,
            inputs=tuple(sample.inputs),
            input_roles=facts.inputs,
            group=record.id,
        )

    def other_prompt(self, record: Record, seed: int) -> str:
        """The record's prompt with the name of another object: the other one in the picture, or any of the split."""
        if len(record.object_groups) > 1:
            return record.prompt.replace(record.caption, with_article(" ".join(record.object_groups[1].split("-"))))
        rng = _rng(seed, "other")
        own = set(group_key(record.caption).split("-"))
        places = self.data.positions(record.task)
        for place in rng.permutation(places)[:50]:
            caption = self.data.cheap(int(place)).caption
            if not own & set(group_key(caption).split("-")):
                return record.prompt.replace(record.caption, caption)
        return record.prompt.replace(record.caption, "a thing of another kind")

    def _photo(self, seed: int) -> Tensor:
        place = int(_rng(seed, "photo").integers(len(self._photos)))
        return self.data.record(int(self._photos[place])).decode().inputs[0]


def pointwise_target(grade: int, labels: int) -> tuple[float, ...]:
    """The label of a grade, shared between two labels where it falls between them; worst label first."""
    place = (GRADES - grade) / GRADES * (labels - 1)
    return tuple(max(0.0, 1 - abs(place - k)) for k in range(labels))


def pairwise_target(first: int, second: int) -> tuple[float, ...]:
    """First, second or neither better, for two grades."""
    return (1.0, 0.0, 0.0) if first < second else (0.0, 1.0, 0.0) if second < first else (0.0, 0.0, 1.0)


def grid_target(grades: Sequence[int]) -> tuple[float, ...]:
    """Shares of being the best: each grade worse has a third of the share, so that all members can be told apart."""
    shares = np.power(3.0, -np.asarray(grades, np.float64))
    return tuple((shares / shares.sum()).tolist())


def draw_example(
    examples: Examples, templates: Templates, protocol: ProtocolName, index: int, seed: int, group: int = 4
) -> Example:
    """One question about a record with its answer.

    Args:
        index: the record.
        seed: all that is drawn follows from it.
        group: candidates of a grid.
    """
    rng = _rng(seed, "example")
    task = examples.data.cheap(index).task
    visual = [kind for kind in kinds_for(task) if kind != WRONG_OBJECT]
    own = _own_seed(rng)

    def spoilt(grade: int) -> Spoilt:
        return Spoilt(visual[int(rng.integers(len(visual)))], grade, _own_seed(rng))

    if protocol == "pointwise":
        if WRONG_OBJECT in kinds_for(task) and rng.random() < WRONG_SHARE:
            candidates = [Spoilt(WRONG_OBJECT, GRADES, own)]
        else:
            candidates = [spoilt(int(rng.integers(GRADES + 1)))]
        target = pointwise_target(candidates[0].grade, len(templates.protocols.pointwise.labels))
        labels = templates.protocols.pointwise.labels
    elif protocol == "pairwise":
        candidates = [spoilt(int(rng.integers(GRADES + 1))) for _ in range(2)]
        target, labels = pairwise_target(*(c.grade for c in candidates)), templates.protocols.pairwise.labels
    else:
        candidates = [spoilt(int(rng.integers(GRADES + 1))) for _ in range(group)]
        target, labels = grid_target([c.grade for c in candidates]), templates.protocols.grid.labels[:group]
    batch = examples.group(index, candidates, own)
    shown = pictures(templates, batch, range(len(candidates)), lettered=protocol != "pointwise")
    text = templates.text(protocol, task, batch.prompt, labels)
    return Example(Question(text, tuple(shown), labels), target)


WRONG_SHARE = 0.25
"""Share of single ratings, of tasks that name an object, in which the prompt names another one."""


def _rng(seed: int, what: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_for(seed, what)))


def _own_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**62))
