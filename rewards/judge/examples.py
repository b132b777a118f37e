"""Training questions with known answers about degraded records of a split: pure functions of record and seed."""

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
from rewards.judge.likeness import simulated_likeness
from rewards.judge.protocols import question
from rewards.judge.templates import ProtocolName, Templates


@dataclass(frozen=True)
class Example:
    """A question and the answer that a judge should give."""

    question: Question
    target: tuple[float, ...]
    """Probability of each label."""
    errors_G2HW: Tensor
    """Where each candidate is wrong: :func:`errors_G2HW`."""


_Told = tuple[RewardBatch, tuple[str, ...] | None]
"""Candidates, and what the judge is told of each."""


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

    def names_object(self, index: int) -> bool:
        """Whether the prompt of a record names its object, so that another prompt can name another one."""
        record = self.data.cheap(index)
        return WRONG_OBJECT in kinds_for(record.task) and bool(record.caption) and record.caption in record.prompt

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


def errors_G2HW(batch: RewardBatch) -> Tensor:
    """Absolute error of premultiplied colour (mean of three) and of alpha, summed over the layers, for each pixel."""
    assert batch.targets_LCHW is not None
    shown, true = (
        torch.cat([layers[..., :3, :, :] * layers[..., 3:, :, :], layers[..., 3:, :, :]], dim=-3)
        for layers in (batch.layers_GLCHW, batch.targets_LCHW)
    )
    error_G4HW = (shown - true).abs().sum(dim=1)
    return torch.stack([error_G4HW[:, :3].mean(dim=1), error_G4HW[:, 3]], dim=1).clamp(max=1)


def draw_examples(
    examples: Examples, templates: Templates, protocol: ProtocolName, index: int, seed: int, group: int = 4
) -> list[Example]:
    """Questions about one record with their answers: ``group`` ratings, or one comparison, or one grid.

    Ratings share kind and seed of their degradation, and half of the comparisons do, so that what differs is the grade;
    ratings of a wrong object share their pixels.

    Args:
        index: the record.
        seed: all that is drawn follows from it.
        group: ratings, or candidates of a grid; at most one more than :data:`data.degradations.GRADES`.
    """
    rng = _rng(seed, "example")
    task = examples.data.cheap(index).task
    visual = [kind for kind in kinds_for(task) if kind != WRONG_OBJECT]
    kind, own = visual[int(rng.integers(len(visual)))], _own_seed(rng)

    def other(grade: int) -> Spoilt:
        return Spoilt(visual[int(rng.integers(len(visual)))], grade, _own_seed(rng))

    def group_of(candidates: Sequence[Spoilt]) -> _Told:
        batch = examples.group(index, candidates, own)
        return batch, simulated_likeness(batch, own) if templates.tells_likeness(protocol) else None

    if protocol == "pointwise":
        if examples.names_object(index) and rng.random() < WRONG_SHARE:
            right, wrong = (group_of([Spoilt(WRONG_OBJECT, grade, own)]) for grade in (0, GRADES))
            return [_rating(templates, *right, 0, 0), _rating(templates, *wrong, 0, GRADES)]
        grades = [int(grade) for grade in rng.permutation(GRADES + 1)[:group]]
        rated = group_of([Spoilt(kind, grade, own) for grade in grades])
        return [_rating(templates, *rated, member, grade) for member, grade in enumerate(grades)]
    count, alike = (2, rng.random() < 0.5) if protocol == "pairwise" else (group, False)
    grades = [int(grade) for grade in rng.integers(GRADES + 1, size=count)]
    batch, told = group_of([Spoilt(kind, g, own) if alike else other(g) for g in grades])
    target = pairwise_target(*grades) if protocol == "pairwise" else grid_target(grades)
    return [Example(question(templates, protocol, batch, range(count), told), target, errors_G2HW(batch))]


def _rating(templates: Templates, batch: RewardBatch, told: Sequence[str] | None, member: int, grade: int) -> Example:
    target = pointwise_target(grade, len(templates.protocols.pointwise.labels))
    return Example(
        question(templates, "pointwise", batch, [member], told), target, errors_G2HW(batch)[member : member + 1]
    )


WRONG_SHARE = 0.2
"""Share of records, of tasks that name an object, whose ratings are about the object's name."""


def _rng(seed: int, what: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_for(seed, what)))


def _own_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**62))
