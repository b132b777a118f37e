"""Scoring decoded groups with configured terms, and judging the rewards themselves on stored ones."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import stats

from common.errors import ConfigError
from data.tasks import get_task
from policy.group import GroupPixels
from rewards.base import Scorer, Scores, build, reward_batch, run_scorer
from rewards.combine import RewardConfig, active_terms, stack_scores
from rewards.metrics import goodness, sample_metrics


@dataclass(frozen=True)
class GroupScores:
    """Scores of one group."""

    terms: tuple[str, ...]
    """Active terms of the group's task."""
    scores_TG: np.ndarray
    """NaN where a score is missing."""
    reasons: tuple[str, ...]
    """Why scores are missing, one entry per missing score."""
    seconds_T: tuple[float, ...] = ()
    """Time of each term."""
    cells_T: tuple[np.ndarray | None, ...] = ()
    """Each term's contributions (G, L or 1, h, w), where local credit asks for them."""


def build_scorers(config: RewardConfig) -> dict[str, Scorer]:
    """Every configured scorer by its term's name, in this process and its environment.

    Raises:
        ConfigError, RewardError: a scorer cannot be made.
    """
    scorers = {}
    for term in config.terms:
        try:
            scorers[term.name] = build(term.source, term.params)
        except ConfigError as error:
            if term.runtime_env is None:
                raise
            raise ConfigError(
                f"{error}; the runtime_env of term {term.name!r} is for its processes in a run and not for this one: "
                "put the code on PYTHONPATH or install it here"
            ) from error
    return scorers


def score_group(config: RewardConfig, scorers: Mapping[str, Scorer], pixels: GroupPixels) -> GroupScores:
    """Scores every member of a group by the terms active for its task.

    Raises:
        ConfigError: no term judges the task.
        RewardError: a score is missing and the policy is ``fail``.
    """
    return join_scores(config, score_terms(config, scorers, pixels), f"group {pixels.name}")


def score_terms(
    config: RewardConfig,
    scorers: Mapping[str, Scorer],
    pixels: GroupPixels,
    device: torch.device | str = "cpu",
    cells: int | None = None,
) -> list[Scores]:
    """Runs those of ``scorers`` that are active for the group's task, on layers that lie on ``device``.

    With ``cells`` they are asked for their contributions on such a grid too.

    Raises:
        ConfigError: no term judges the task.
    """
    active = [config.terms[k].name for k in active_terms(config, pixels.task)]
    if not active:
        raise ConfigError(f"task {pixels.task!r} has no active reward term; give it weight 0 in grpo.tasks")
    here = [name for name in active if name in scorers]
    batch = reward_batch(pixels, device) if here else None
    return [run_scorer(name, scorers[name], batch, cells) for name in here if batch]


def join_scores(
    config: RewardConfig, scores: Sequence[Scores], where: str, strict: Collection[str] = ()
) -> GroupScores:
    """One group's scores, in the order of the configured terms, wherever each was made.

    Args:
        config: of the rewards.
        scores: one entry per active term.
        where: names the group in the error.
        strict: terms of which no score may be missing, whatever ``config.missing`` says of the others.

    Raises:
        RewardError: a score is missing and the policy is ``fail``; names the term and ``where``.
    """
    place = {term.name: k for k, term in enumerate(config.terms)}
    ordered = sorted(scores, key=lambda entry: place[entry.name])
    if demanded := [entry for entry in ordered if entry.name in strict]:
        stack_scores(demanded, "fail", where)
    reasons = tuple(f"{s.name}: {reason}" for s in ordered for reason in s.reasons if reason is not None)
    names, seconds = tuple(s.name for s in ordered), tuple(s.seconds for s in ordered)
    cells = tuple(s.cells_GLhw for s in ordered)
    return GroupScores(names, stack_scores(ordered, config.missing, where), reasons, seconds, cells)


@dataclass
class TermReport:
    """What stored rollouts say about one term."""

    values: list[float] = field(default_factory=list)
    """Present scores."""
    spreads: list[float] = field(default_factory=list)
    """Standard deviation within each group: what GRPO has to learn from."""
    missing: int = 0
    seconds: float = 0.0
    samples: int = 0


@dataclass
class Rescored:
    """Terms judged on stored rollouts."""

    terms: dict[str, TermReport] = field(default_factory=lambda: defaultdict(TermReport))
    agreement: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Spearman's rank correlation within each group of (term, other term or ``metric:<name>``); a metric for which
    lower is better counts negated, a signed one by its distance from 0, so that positive always means agreement."""
    ranked: dict[str, list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))
    """(score, number of the group, member) of every present score."""
    reasons: list[str] = field(default_factory=list)


def rescore(config: RewardConfig, groups: Iterable[GroupPixels]) -> Rescored:
    """Scores groups anew and compares the terms with each other and with the truth metrics.

    Rank correlations are taken within groups, since that is all that GRPO sees of a reward. A group in which either
    side is constant says nothing about agreement and is left out.
    """
    scorers, result = build_scorers(config), Rescored()
    for number, pixels in enumerate(groups):
        if not active_terms(config, pixels.task):
            continue
        scored = score_group(config, scorers, pixels)
        result.reasons += scored.reasons
        columns = dict(zip(scored.terms, scored.scores_TG, strict=True))
        for (name, row_G), seconds in zip(columns.items(), scored.seconds_T, strict=True):
            present = np.flatnonzero(np.isfinite(row_G))
            report = result.terms[name]
            report.values += [float(row_G[g]) for g in present]
            report.spreads += [float(row_G[present].std())] if len(present) else []
            report.missing += len(row_G) - len(present)
            report.seconds, report.samples = report.seconds + seconds, report.samples + len(row_G)
            result.ranked[name] += [(float(row_G[g]), number, int(g)) for g in present]
        others = columns | _metrics(pixels)
        for name, row_G in columns.items():
            for other, other_G in others.items():
                if other != name and (value := _rank_correlation(row_G, other_G)) is not None:
                    result.agreement[name, other].append(value)
    return result


def _metrics(pixels: GroupPixels) -> dict[str, np.ndarray]:
    roles, targets = get_task(pixels.task).targets, torch.tensor(pixels.targets_LCHW)
    found = [sample_metrics(roles, torch.tensor(layers), targets) for layers in pixels.layers_GLCHW]
    return {f"metric:{name}": np.array([goodness(name, entry[name]) for entry in found]) for name in found[0]}


def _rank_correlation(a_G: np.ndarray, b_G: np.ndarray) -> float | None:
    both = np.isfinite(a_G) & np.isfinite(b_G)
    if both.sum() < 3 or np.ptp(a_G[both]) == 0 or np.ptp(b_G[both]) == 0:
        return None
    return float(stats.spearmanr(a_G[both], b_G[both]).statistic)
