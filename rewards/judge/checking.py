"""Whether a judge can be trusted: how well it ranks candidates whose order is known, and what its answers lean on."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from common.errors import DataError, OmniAlphaError
from data.degradations import GRADES, WRONG_OBJECT, kinds_for
from data.records import RecordDataset
from data.seeding import seed_for
from rewards.judge.asking import Asker
from rewards.judge.examples import Examples, Spoilt
from rewards.judge.protocols import Score, Verdict, compare, grid, pointwise
from rewards.judge.templates import Templates

APART = 2
"""Grades between the two candidates of a comparison."""
NEARBY = (0, 0, 1, 1)
"""Grades of a group as a policy makes it: members nearly as good as each other."""

Interval = tuple[float, float, float]
"""Estimate, low and high of its 95 % interval over objects; NaN where it cannot be had."""


@dataclass(frozen=True)
class JudgeCheck:
    """What was found."""

    records: int
    spearman: Interval
    """Rank correlation between how good a candidate is and its pointwise score, over all visual degradations."""
    spearman_by_kind: dict[str, float]
    spearman_by_task: dict[str, float]
    pair_accuracy: Interval
    """Share of comparisons two grades apart that the better one wins, each order on its own."""
    pair_accuracy_both: Interval
    """The same by the mean of both orders."""
    position_bias: Interval
    """Preference for the first place, −1 to 1."""
    wrong_object_auc: dict[str, float]
    """By task: how often true layers score higher under their own prompt than under another object's."""
    spread: dict[str, float]
    """By protocol: mean standard deviation of the scores in a group of nearly equal members."""
    grid_spearman: float
    """Mean rank correlation within grids of all grades."""
    seconds_per_group: dict[str, float]
    """By protocol, for a group of all grades."""
    missing: dict[str, int]
    """Questions without an answer, by reason."""


@dataclass
class _Found:
    """Raw results, one entry per candidate or comparison."""

    goodness: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    verdict_objects: list[str] = field(default_factory=list)
    own: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    spreads: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    grids: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    missing: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def check_judge(
    asker: Asker,
    templates: Templates,
    dataset: RecordDataset,
    records: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> JudgeCheck:
    """Asks a judge about degraded records of a split that it was not trained on.

    Args:
        records: of each task that there is a template for, spread evenly over the split.
        progress: hears after each record how many are done, of how many.

    Raises:
        DataError: no task of the split has a template, or no question was answered.
    """
    examples, found = Examples(dataset), _Found()
    tasks = [task for task in dataset.tasks if task in templates.tasks]
    work = [(task, place, index) for task in tasks for place, index in enumerate(_even(dataset, task, records))]
    if not work:
        raise DataError(f"{dataset.folder}: no task of split {dataset.split!r} has a template in {templates.folder}")
    for done, (task, place, index) in enumerate(work, start=1):
        visual = [kind for kind in kinds_for(task) if kind != WRONG_OBJECT]
        kind = visual[place % len(visual)]
        _check_record(asker, templates, examples, index, kind, seed_for(seed, "check", index), found)
        progress(done, len(work))
    if len(found.scores) < 2 or not found.verdicts:
        reason = max(found.missing, key=lambda why: found.missing[why], default="nothing was asked")
        raise DataError(f"the judge answered too little to say anything of it; most often: {reason}")
    return _summary(found, len(work))


def _even(dataset: RecordDataset, task: str, count: int) -> list[int]:
    places = dataset.positions(task)
    return [
        int(k) for k in places[np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int))]
    ]


def _check_record(
    asker: Asker, templates: Templates, examples: Examples, index: int, kind: str, seed: int, found: _Found
) -> None:
    record = examples.data.cheap(index)
    task = record.task
    graded = examples.group(index, [Spoilt(kind, grade, seed) for grade in range(GRADES + 1)], seed)
    scores = _timed(found, "pointwise", lambda: pointwise(asker, templates, graded))
    for grade, score in enumerate(scores):
        if (number := _number(score, found)) is not None:
            found.goodness.append(-grade)
            found.scores.append(number)
            found.kinds.append(kind)
            found.tasks.append(task)
            found.objects.append(record.object_groups[0])
    ranked = _timed(found, "grid", lambda: grid(asker, templates, graded, seed))
    if (utilities := _numbers(ranked, found)) is not None and np.ptp(utilities) > 0:
        found.grids.append(float(stats.spearmanr(-np.arange(GRADES + 1), utilities).statistic))
    pairs = [(better, better + APART) for better in range(GRADES + 1 - APART)]
    for verdict in compare(asker, templates, graded, pairs):
        if isinstance(verdict, OmniAlphaError):
            found.missing[str(verdict)] += 1
        else:
            found.verdicts.append(verdict)
            found.verdict_objects.append(record.object_groups[0])
    visual = [other for other in kinds_for(task) if other != WRONG_OBJECT]
    near = [Spoilt(visual[k % len(visual)], grade, seed_for(seed, k)) for k, grade in enumerate(NEARBY)]
    group = examples.group(index, near, seed)
    for name, answers in (
        ("pointwise", pointwise(asker, templates, group)),
        ("grid", grid(asker, templates, group, seed)),
    ):
        if (values := _numbers(answers, found)) is not None:
            found.spreads[name].append(float(np.std(values)))
    if examples.names_object(index):
        wrong = examples.group(index, [Spoilt(WRONG_OBJECT, GRADES, seed)], seed)
        own, other = scores[0], pointwise(asker, templates, wrong)[0]
        pair = (_number(own, found), _number(other, found))
        if pair[0] is not None and pair[1] is not None:
            found.own[task].append(pair[0])
            found.wrong[task].append(pair[1])


def _timed(found: _Found, name: str, ask: Callable[[], list[Score]]) -> list[Score]:
    began = time.perf_counter()
    answers = ask()
    found.seconds[name].append(time.perf_counter() - began)
    return answers


def _number(score: Score, found: _Found) -> float | None:
    if isinstance(score, OmniAlphaError):
        found.missing[str(score)] += 1
        return None
    return score


def _numbers(scores: Sequence[Score], found: _Found) -> np.ndarray | None:
    numbers = [_number(score, found) for score in scores]
    return None if None in numbers else np.array(numbers, np.float64)


def _summary(found: _Found, records: int) -> JudgeCheck:
    goodness, scores = np.array(found.goodness), np.array(found.scores)
    right = [[v.forward[0] > v.forward[1], v.backward[0] > v.backward[1]] for v in found.verdicts]
    both = [v.preference > 0 for v in found.verdicts]
    bias = [v.position_bias for v in found.verdicts]
    return JudgeCheck(
        records=records,
        spearman=over_objects(lambda rows: _rank(goodness[rows], scores[rows]), found.objects),
        spearman_by_kind=_by(found.kinds, goodness, scores),
        spearman_by_task=_by(found.tasks, goodness, scores),
        pair_accuracy=_mean_over_objects(np.mean(right, axis=1), found.verdict_objects),
        pair_accuracy_both=_mean_over_objects(np.array(both, np.float64), found.verdict_objects),
        position_bias=_mean_over_objects(np.array(bias), found.verdict_objects),
        wrong_object_auc={task: auc(found.own[task], found.wrong[task]) for task in sorted(found.own)},
        spread={name: float(np.mean(values)) for name, values in found.spreads.items()},
        grid_spearman=float(np.mean(found.grids)) if found.grids else np.nan,
        seconds_per_group={name: float(np.mean(values)) for name, values in found.seconds.items()},
        missing=dict(found.missing),
    )


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """How often an entry of ``higher`` exceeds one of ``lower``, ties counting half; 0.5 is chance."""
    above = np.subtract.outer(np.asarray(higher), np.asarray(lower))
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def over_objects(
    statistic: Callable[[np.ndarray], float], objects: Sequence[str], draws: int = 500, seed: int = 0
) -> Interval:
    """A statistic of rows with its 95 % percentile interval: whole objects are resampled with replacement.

    Args:
        statistic: of row numbers, shape (n,).
        objects: of each row.
    """
    _, which = np.unique(np.asarray(objects), return_inverse=True)
    rows = [np.flatnonzero(which == k) for k in range(which.max() + 1)]
    estimate = statistic(np.arange(len(objects)))
    if len(rows) < 2:
        return estimate, np.nan, np.nan
    generator = np.random.default_rng(seed)
    drawn = [
        statistic(np.concatenate([rows[k] for k in generator.integers(len(rows), size=len(rows))]))
        for _ in range(draws)
    ]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return estimate, float(low), float(high)


def _mean_over_objects(values: np.ndarray, objects: Sequence[str]) -> Interval:
    return over_objects(lambda rows: float(values[rows].mean()), objects)


def _rank(goodness: np.ndarray, scores: np.ndarray) -> float:
    if np.ptp(goodness) == 0 or np.ptp(scores) == 0:
        return np.nan
    return float(stats.spearmanr(goodness, scores).statistic)


def _by(names: Sequence[str], goodness: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    places = np.asarray(names)
    return {name: _rank(goodness[places == name], scores[places == name]) for name in sorted(set(names))}
