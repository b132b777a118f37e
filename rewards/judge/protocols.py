"""Three ways of asking a judge about a group: rate each, show all, compare two."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from common.errors import OmniAlphaError, RewardError
from data.seeding import seed_for
from rewards.base import RewardBatch
from rewards.judge.asking import Answer, Asker, Question, ask_all
from rewards.judge.likeness import likeness
from rewards.judge.pictures import pictures
from rewards.judge.templates import ProtocolName, Templates
from rewards.statistics import paired_bootstrap

SMALLEST_SHARE = 1e-4
"""Below it a place's share of a grid's answer is lost among the log-probabilities that a server returns."""

Score = float | OmniAlphaError
Outcome = Literal["win", "tie", "loss"]


def question(
    templates: Templates,
    protocol: ProtocolName,
    batch: RewardBatch,
    members: Sequence[int],
    told: Sequence[str] | None = None,
) -> Question:
    """One question about some members, shown in the order given.

    Args:
        told: of each member of the batch, instead of its likeness to the object that the prompt names.

    Raises:
        ConfigError: no template for the task.
        RewardError: more members than the template has labels.
    """
    labels = templates.protocol(protocol).labels
    if protocol == "grid":
        if len(members) > len(labels):
            raise RewardError(
                f"{templates.folder}: grid has labels for {len(labels)} members, group {batch.group!r} has "
                f"{len(members)}; add labels, or ask pointwise"
            )
        labels = labels[: len(members)]
    shown = pictures(templates, batch, members, lettered=protocol != "pointwise")
    text = functools.partial(templates.text, protocol, batch.task, batch.prompt, labels)
    if not templates.tells_likeness(protocol):
        return Question(text(), tuple(shown), labels)
    digits = likeness(batch) if told is None else told
    return Question(text([digits[member] for member in members]), tuple(shown), labels)


def pointwise(asker: Asker, templates: Templates, batch: RewardBatch) -> list[Score]:
    """Each member on its own: the expectation over the labels, worst 0 to best 1, or why there is none."""
    asked = [question(templates, "pointwise", batch, [member]) for member in range(batch.members)]
    return [
        answer if isinstance(answer, OmniAlphaError) else _expectation(list(answer.values()))
        for answer in ask_all(asker, asked)
    ]


def _expectation(shares: Sequence[float]) -> float:
    return float(np.dot(shares, np.linspace(0, 1, len(shares))))


def grid(asker: Asker, templates: Templates, batch: RewardBatch, seed: int, orders: int = 1) -> list[Score]:
    """The whole group at once, in ``orders`` shuffled orders: the mean log-probability of being named the best.

    A log-probability of one choice among G is a utility up to a constant (Luce's choice rule), so differences within a
    group mean something and values across groups do not. Where an order has no answer, the others count; with none of
    them all members share the reason.

    Raises:
        RewardError: a group of one, or one larger than the template allows.
    """
    if batch.members < 2:
        raise RewardError(f"group {batch.group!r} has one member, and a grid compares; ask pointwise")
    shown = [grid_order(batch, seed, turn) for turn in range(orders)]
    answers = ask_all(asker, [question(templates, "grid", batch, order) for order in shown])
    utilities = np.zeros(batch.members)
    failures = [answer for answer in answers if isinstance(answer, OmniAlphaError)]
    if len(failures) == orders:
        return [failures[0]] * batch.members
    for order, answer in zip(shown, answers, strict=True):
        if not isinstance(answer, OmniAlphaError):
            utilities[order] += np.log(np.maximum(list(answer.values()), SMALLEST_SHARE))
    return [float(utility) for utility in utilities / (orders - len(failures))]


def grid_order(batch: RewardBatch, seed: int, turn: int) -> list[int]:
    """Which member stands in each place: follows from seed, group and turn alone."""
    generator = np.random.Generator(np.random.PCG64(seed_for(seed, "grid", batch.group, turn)))
    return [int(member) for member in generator.permutation(batch.members)]


@dataclass(frozen=True)
class Verdict:
    """Two candidates compared in both orders; probabilities of (first, second, neither) as candidates, not places."""

    forward: tuple[float, float, float]
    """Shown in order."""
    backward: tuple[float, float, float]
    """Shown the other way round, mapped back."""

    @property
    def both(self) -> tuple[float, float, float]:
        """Mean over the two orders."""
        first, second, neither = ((a + b) / 2 for a, b in zip(self.forward, self.backward, strict=True))
        return first, second, neither

    @property
    def preference(self) -> float:
        """How much the first candidate is preferred, −1 to 1, without what its place did."""
        return self.both[0] - self.both[1]

    @property
    def outcome(self) -> Outcome:
        """Of the first candidate."""
        first, second, neither = self.both
        if neither >= max(first, second) or first == second:
            return "tie"
        return "win" if first > second else "loss"

    @property
    def position_bias(self) -> float:
        """Preference for the first place, −1 to 1; 0 where the orders agree."""
        return ((self.forward[0] - self.forward[1]) + (self.backward[1] - self.backward[0])) / 2


def compare(
    asker: Asker, templates: Templates, batch: RewardBatch, pairs: Sequence[tuple[int, int]]
) -> list[Verdict | OmniAlphaError]:
    """Pairs of members, each compared in both orders; a pair that lacks an answer has its reason."""
    return _verdicts(asker, templates, [(batch, pair) for pair in pairs])


def versus(
    asker: Asker, templates: Templates, first: Sequence[RewardBatch], second: Sequence[RewardBatch]
) -> list[Verdict | OmniAlphaError]:
    """The first members of each two batches of one record, compared in both orders; as :func:`compare`.

    Raises:
        RewardError: the batches are not of the same records.
    """
    shown = []
    for one, other in zip(first, second, strict=True):
        if (one.group, one.task, one.prompt) != (other.group, other.task, other.prompt):
            raise RewardError(f"compared samples must be of one record, not of {one.group!r} and {other.group!r}")
        layers = torch.cat([one.layers_GLCHW[:1], other.layers_GLCHW[:1]])
        shown.append((replace(one, layers_GLCHW=layers), (0, 1)))
    return _verdicts(asker, templates, shown)


def _verdicts(
    asker: Asker, templates: Templates, shown: Sequence[tuple[RewardBatch, tuple[int, int]]]
) -> list[Verdict | OmniAlphaError]:
    asked = [question(templates, "pairwise", batch, order) for batch, (a, b) in shown for order in ((a, b), (b, a))]
    answers = ask_all(asker, asked)
    return [_verdict(one, other) for one, other in zip(answers[::2], answers[1::2], strict=True)]


def _verdict(one: Answer, other: Answer) -> Verdict | OmniAlphaError:
    if isinstance(one, OmniAlphaError):
        return one
    if isinstance(other, OmniAlphaError):
        return other
    first, second, neither = one.values()
    swapped_second, swapped_first, swapped_neither = other.values()
    return Verdict((first, second, neither), (swapped_first, swapped_second, swapped_neither))


@dataclass(frozen=True)
class Tally:
    """Comparisons of two policies; each entry is (mean, low, high) with a 95 % interval over photos and objects."""

    comparisons: int
    win: tuple[float, float, float]
    """Share of comparisons that the first policy wins."""
    tie: tuple[float, float, float]
    loss: tuple[float, float, float]
    preference: tuple[float, float, float]
    position_bias: tuple[float, float, float]


def tally(
    verdicts: Sequence[Verdict], photo_groups: Sequence[str | None], object_groups: Sequence[str], draws: int = 2000
) -> Tally:
    """Win, tie and loss shares with intervals (:func:`rewards.statistics.paired_bootstrap`).

    Raises:
        DataError: no verdict, or other numbers of photos or objects.
    """

    def interval(values: Sequence[float]) -> tuple[float, float, float]:
        return paired_bootstrap(values, photo_groups, object_groups, draws)

    win, tie, loss = (interval([float(v.outcome == name) for v in verdicts]) for name in ("win", "tie", "loss"))
    return Tally(
        len(verdicts),
        win,
        tie,
        loss,
        preference=interval([verdict.preference for verdict in verdicts]),
        position_bias=interval([verdict.position_bias for verdict in verdicts]),
    )
