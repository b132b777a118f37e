"""Is the reward being gamed? A pure rule on measurements of the same held-out records before and during training.

A policy that learns the blind spots of its reward is paid more while quality falls in what the reward does not see.
Nothing here knows how the records were sampled; ``pipeline/watch.py`` does that, ``docs/rewards.md`` says why the rule
is what it is.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field, field_validator, model_validator

from common.config import StrictConfig
from data.tasks import get_task
from rewards.combine import RewardConfig, active_terms
from rewards.metrics import HIGHER_IS_BETTER, NEEDS_ROLE, goodness
from rewards.set_features import Cloud, cloud_distance
from rewards.statistics import cluster_t_interval, cluster_t_interval_of

OPTIMISES = {
    "layer": ("psnr_white", "background_psnr"),
    "alpha_mad": ("alpha_mad", "alpha_sad"),
    "alpha_overlap": ("soft_iou",),
    "alpha_gradient": ("alpha_grad",),
    "alpha_connectivity": ("alpha_conn",),
}
"""Metrics that measure what a registered scorer is, up to scale: they say nothing about it."""


FRECHET = "frechet"
"""Watched like a metric, but of a task's whole set of records: the Fréchet distance of features to the truth's."""
FRECHET_DRAWS = 200


Suspects = frozenset[tuple[str, str]]
"""(task, metric) pairs."""


class WatchConfig(StrictConfig):
    """Watch for a reward that is being gamed: rising while measures outside of it get worse."""

    every: int = Field(0, ge=0)
    """Steps between looks at the validation split, besides one before the first step and one after the last; 0 is
    off."""
    records: int = Field(20, ge=2)
    """Records per task, at most; the first ones of the validation split."""
    metrics: tuple[str, ...] = ("alpha_grad", "alpha_conn", "rgb_l1_alpha", "alpha_coverage", "soft_iou", FRECHET)
    """Metrics to watch, and ``frechet``, the Fréchet distance of features between predicted and true layers; on a task
    whose reward terms are the metric itself it is left out."""
    threshold: float = Field(0.1, ge=0)
    """Share of its value before training by which a metric must be worse."""
    error_rate: float = Field(0.05, gt=0, lt=1)
    """Probability of a false alarm in the whole run, shared by all metrics, tasks and looks."""
    patience: int = Field(1, ge=1)
    """Consecutive looks at which the same metric of the same task must be worse."""
    stop: bool = False
    """Whether an alarm ends the stage, which then hands on the policy of the last look without suspicion."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for name in metrics:
            if name not in (*HIGHER_IS_BETTER, FRECHET):
                raise ValueError(f"unknown metric {name!r}; known: {', '.join((*HIGHER_IS_BETTER, FRECHET))}")
        if not metrics or len(set(metrics)) < len(metrics):
            raise ValueError("name at least one metric, and each once")
        return metrics

    @model_validator(mode="after")
    def _looks(self) -> "WatchConfig":
        if self.stop and not self.every:
            raise ValueError("stop needs looks to stop at: set every, for example to 10")
        return self

    def looks(self, steps: int) -> int:
        """How often a run of ``steps`` steps is looked at, the look before training aside."""
        return math.ceil(steps / self.every) if self.every else 0

    def due(self, step: int, steps: int) -> bool:
        """Whether there is a look after ``step`` (from 1) of ``steps``."""
        return bool(self.every) and (step % self.every == 0 or step == steps)


def optimised(rewards: RewardConfig, task: str) -> dict[str, str]:
    """Metrics that the task's reward trains on directly, and the term that does."""
    terms = [rewards.terms[k] for k in active_terms(rewards, task)]
    return {
        metric: term.name
        for term in terms
        if term.weight
        for metric in (OPTIMISES.get(term.source, ()) if term.optimises is None else term.optimises)
    }


def applies(metric: str, task: str) -> bool:
    """Whether samples of a task have the metric at all."""
    return NEEDS_ROLE.get(metric) in (None, *get_task(task).targets)


def watched(config: WatchConfig, rewards: RewardConfig, task: str) -> tuple[str, ...]:
    """The metrics watched on a task: those that it has and its reward does not optimise."""
    return tuple(m for m in config.metrics if applies(m, task) and m not in optimised(rewards, task))


@dataclass(frozen=True)
class Entry:
    """One record at one look."""

    record: str
    task: str
    photo: str | None
    object: str
    reward: float
    """NaN where it has none."""
    metrics: Mapping[str, float]
    features: Cloud = ()
    """Of the predicted layers; empty where they were not asked for."""
    truth: Cloud = ()
    """Of the true layers."""


@dataclass(frozen=True)
class Change:
    """What became of the reward or a metric on one task since before training."""

    task: str
    quantity: str
    """``reward``, or a metric."""
    before: float
    """Mean before training."""
    now: float
    gain: float
    """Mean paired improvement: negative is worse, whatever the metric's direction."""
    low: float
    """Interval of ``gain``."""
    high: float
    relative: float
    """``gain`` as a share of the mean size before training."""
    n: int
    worse: bool = False
    """Whether it is clearly and relevantly worse while the task's reward has clearly risen."""


def judge(
    config: WatchConfig,
    outside: Mapping[str, Sequence[str]],
    looks: int,
    before: Iterable[Entry],
    now: Iterable[Entry],
    seed: int = 0,
) -> list[Change]:
    """Compares a look with the one before training, task by task: the reward first, then every watched metric.

    A metric is marked as worse where the reward's 95 % interval on the same task lies above 0, the metric's own
    interval below 0, and its loss reaches ``config.threshold`` of its size before. The metrics' intervals share
    ``config.error_rate`` between all metrics, tasks and looks (Bonferroni): that bounds the probability that a run in
    which no watched metric gets worse is ever flagged.

    Args:
        outside: the watched metrics of each task.
        looks: planned looks of the run.
        before, now: measurements of the same records.
    """
    tests = max(1, looks * sum(len(metrics) for metrics in outside.values()))
    old = {entry.record: entry for entry in before}
    pairs = [(old[entry.record], entry) for entry in now if entry.record in old]
    changes = []
    for task, metrics in outside.items():
        mine = [pair for pair in pairs if pair[0].task == task]
        reward = _change(mine, task, "reward", 0.95, seed)
        changes.append(reward)
        for metric in metrics:
            change = (_cloud_change if metric == FRECHET else _change)(
                mine, task, metric, 1 - config.error_rate / tests, seed
            )
            bad = reward.low > 0 and change.high < 0 and -change.relative >= config.threshold
            changes.append(replace(change, worse=bad))
    return changes


def suspects(changes: Iterable[Change]) -> Suspects:
    """What is marked as worse."""
    return frozenset((change.task, change.quantity) for change in changes if change.worse)


def alarms(history: Sequence[Suspects], patience: int) -> Suspects:
    """What was suspicious at each of the last ``patience`` looks."""
    last = history[-patience:]
    return frozenset.intersection(*last) if len(last) == patience else frozenset()


def describe(changes: Iterable[Change], alarm: Suspects) -> str:
    """The alarm in one sentence: on which task the reward rose, which metrics fell, and by how much."""
    changes = list(changes)
    parts = []
    for task in sorted({task for task, _ in alarm}):
        reward = next(c for c in changes if (c.task, c.quantity) == (task, "reward"))
        found = [c for c in changes if c.task == task and (task, c.quantity) in alarm]
        worse = ", ".join(
            f"{c.quantity} went from {c.before:.4f} to {c.now:.4f} ({-c.relative:.0%} worse)" for c in found
        )
        parts.append(f"on {task} the reward rose from {reward.before:.4f} to {reward.now:.4f} while {worse}")
    return "; ".join(parts)


def _change(pairs: Sequence[tuple[Entry, Entry]], task: str, quantity: str, confidence: float, seed: int) -> Change:
    def value(entry: Entry) -> float:
        return entry.reward if quantity == "reward" else entry.metrics.get(quantity, math.nan)

    turned: Callable[[float], float] = (lambda x: x) if quantity == "reward" else (lambda x: goodness(quantity, x))
    valid = [(a, b) for a, b in pairs if math.isfinite(value(a)) and math.isfinite(value(b))]
    if not valid:
        return _nothing(task, quantity)
    gains = [turned(value(b)) - turned(value(a)) for a, b in valid]
    gain, low, high = cluster_t_interval(gains, *_clusters(valid), confidence, seed=seed)
    size = sum(abs(value(a)) for a, _ in valid) / len(valid)
    return Change(
        task,
        quantity,
        before=sum(value(a) for a, _ in valid) / len(valid),
        now=sum(value(b) for _, b in valid) / len(valid),
        gain=gain,
        low=low,
        high=high,
        relative=_share(gain, size),
        n=len(valid),
    )


def _cloud_change(
    pairs: Sequence[tuple[Entry, Entry]], task: str, quantity: str, confidence: float, seed: int
) -> Change:
    """The change of the distance between the records' predicted and true layers; resampled like any other."""
    valid = [(a, b) for a, b in pairs if a.features and b.features]
    if not valid:
        return _nothing(task, quantity)
    truths = [a.truth for a, _ in valid]

    def distance(weights_N: np.ndarray, side: int) -> float:
        return cloud_distance([pair[side].features for pair in valid], truths, weights_N)

    gain, low, high = cluster_t_interval_of(
        lambda weights_N: distance(weights_N, 0) - distance(weights_N, 1),
        *_clusters(valid),
        confidence,
        FRECHET_DRAWS,
        seed,
    )
    before, now = (distance(np.ones(len(valid)), side) for side in (0, 1))
    return Change(task, quantity, before, now, gain, low, high, _share(gain, before), n=len(valid))


def _clusters(pairs: Sequence[tuple[Entry, Entry]]) -> tuple[list[str | None], list[str]]:
    """What is resampled: objects. The photos are those of the fixed records, on which the policy is watched:
    the few of a validation split would convict nobody otherwise."""
    return [None] * len(pairs), [a.object for a, _ in pairs]


def _share(gain: float, size: float) -> float:
    return gain / size if size else math.copysign(math.inf, gain) if gain else 0.0


def _nothing(task: str, quantity: str) -> Change:
    nan = math.nan
    return Change(task, quantity, before=nan, now=nan, gain=nan, low=nan, high=nan, relative=nan, n=0)
