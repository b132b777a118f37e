"""Fits the map of :mod:`rewards.words` to a dataset, and measures how it tells apart objects that are new to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from data.degradations import GRADES, WRONG_OBJECT
from data.records import RecordDataset
from data.seeding import seed_for
from data.tasks import get_task, named_object
from policy.text import TextEncoder
from rewards.base import RewardBatch
from rewards.judge.checking import auc
from rewards.judge.examples import Examples, Spoilt
from rewards.prompt import class_nearness, see
from rewards.words import WordMap, fit_words

STRENGTHS = (300.0, 1000.0, 3000.0, 10000.0, 30000.0)
"""Penalties among which the validation split chooses."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """One picture, what it shows, and another object's name."""

    task: str
    features_C: Tensor
    classes_K: Tensor
    own_D: Tensor
    other_D: Tensor


@dataclass(frozen=True)
class Fitted:
    """A map and what it is worth."""

    words: WordMap
    objects: int
    """Named objects that it was fitted to."""
    strength: float
    """Penalty that the validation split preferred."""
    aucs: dict[str, dict[str, float]]
    """By split and task, then by ``classes`` (names of ImageNet classes), ``words`` (the map) and ``both`` (the mean):
    how often a picture scores higher with its own object's name than any with another's; 0.5 is chance."""
    trials: dict[str, int]
    """By split and task: pictures."""


def fit_to(train: RecordDataset, val: RecordDataset, test: RecordDataset, records: int, progress: Progress) -> Fitted:
    """Fits a map to every named object of ``train``, chooses its strength on ``val``, and measures on both others.

    Args:
        records: pictures for measuring, of each split and task, spread evenly.

    Raises:
        DataError: a split has too few pictures of named objects.
    """
    encoder = TextEncoder()
    found = list(_named_objects(train, encoder, progress))
    if len(found) < 2:
        raise DataError(f"{train.folder}: {len(found)} named objects in split {train.split!r}; a map needs at least 2")
    features_NC, names_ND = (torch.stack(column) for column in zip(*found, strict=True))
    trials = {data.split: _trials(data, encoder, records) for data in (val, test)}
    maps = {strength: fit_words(features_NC, names_ND, strength) for strength in STRENGTHS}

    def mean_auc(strength: float) -> float:
        return float(np.mean([row["both"] for row in _measure(maps[strength], trials[val.split]).values()]))

    best = max(maps, key=mean_auc)
    measured = {split: _measure(maps[best], rows) for split, rows in trials.items()}
    return Fitted(
        words=maps[best],
        objects=len(found),
        strength=best,
        aucs={f"{split} {task}": row for split, tasks in measured.items() for task, row in tasks.items()},
        trials={
            f"{split} {task}": sum(t.task == task for t in trials[split])
            for split, tasks in measured.items()
            for task in tasks
        },
    )


def _named_objects(data: RecordDataset, encoder: TextEncoder, progress: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and name of every object that a record of ``data`` shows alone."""
    first: dict[str, int] = {}
    for task in data.tasks:
        if get_task(task).targets == ("foreground",):
            for index in data.positions(task):
                record = data.cheap(int(index))
                if len(record.object_groups) == 1 and record.caption:
                    first.setdefault(record.object_groups[0], int(index))
    for done, index in enumerate(sorted(first.values()), start=1):
        record = data.record(index)
        features_GC, _ = see(record.decode().targets_LCHW[None])
        yield features_GC[0], encoder.sentence(record.caption)
        progress(done, len(first))


def _trials(data: RecordDataset, encoder: TextEncoder, records: int) -> list[Trial]:
    examples, made = Examples(data), list[Trial]()
    for task in (task for task in data.tasks if "foreground" in get_task(task).targets):
        places = [int(k) for k in data.positions(task) if examples.names_object(int(k))]
        chosen = np.unique(np.linspace(0, len(places) - 1, min(records, len(places))).round().astype(int))
        for index in (places[k] for k in chosen):
            seed = seed_for(0, "words", index)
            wrong = examples.group(index, [Spoilt(WRONG_OBJECT, GRADES, seed)], seed)
            features_GC, classes_GK = see(_foregrounds(wrong))
            own, other = (named_object(task, p) for p in (data.cheap(index).prompt, wrong.prompt))
            assert own is not None
            assert other is not None
            made.append(Trial(task, features_GC[0], classes_GK[0], encoder.sentence(own), encoder.sentence(other)))
    if not made:
        raise DataError(
            f"{data.folder}: no prompt of split {data.split!r} names its object, so that nothing can be measured"
        )
    return made


def _foregrounds(batch: RewardBatch) -> Tensor:
    return batch.layers_GLCHW[:, list(batch.foregrounds)]


def _measure(words: WordMap, trials: list[Trial]) -> dict[str, dict[str, float]]:
    out = {}
    for task in sorted({trial.task for trial in trials}):
        rows = [trial for trial in trials if trial.task == task]
        scores = np.array([[_scores(words, row, wanted) for wanted in (row.own_D, row.other_D)] for row in rows])
        out[task] = {
            name: auc(scores[:, 0, k].tolist(), scores[:, 1, k].tolist())
            for k, name in enumerate(("classes", "words", "both"))
        }
    return out


def _scores(words: WordMap, trial: Trial, wanted_D: Tensor) -> tuple[float, float, float]:
    by_class = float(class_nearness(trial.classes_K[None], wanted_D)[0])
    by_map = float(words.nearness(trial.features_C[None], wanted_D)[0])
    return by_class, by_map, (by_class + by_map) / 2
