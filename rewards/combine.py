"""From the scores of several terms to one advantage per group member: pure NumPy float64, no state."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.config import StrictConfig
from common.errors import ConfigError, RewardError
from data.tasks import TASKS, get_task
from rewards.base import Scores, is_shipped
from rewards.credit import EPSILON, Credited, local_advantages
from rewards.isolation import DEADLINE_S, ResourcesConfig, RuntimeEnvConfig
from rewards.metrics import HIGHER_IS_BETTER
from rewards.presets import presets

Array = np.ndarray

NO_SIGNAL = 1e-6
"""A group whose advantages are all smaller than this has nothing to learn from."""

DropReason = Literal["below_min_group", "zero_variance"]


class TermConfig(StrictConfig):
    """One reward term."""

    name: str = Field(min_length=1)
    """Name in the logs; also the scorer, unless ``scorer`` says otherwise."""
    scorer: str | None = None
    """Registered name, ``module:attribute`` or ``path/to/file.py:attribute``; null takes ``name``."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight among the active terms; only ratios matter. 0 logs the term without training on it."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the scorer. Paths in ``weights`` and ``folder`` count from where the command is given."""
    tasks: tuple[str, ...] | None = None
    """Tasks it judges; null leaves it to the task table for the paper's terms, else takes every task with rewards."""
    optimises: tuple[str, ...] | None = None
    """Metrics (``rewards/metrics.py``) that it trains on directly, so that they prove nothing and are not watched; null
    takes what is known of a shipped scorer, which is nothing for your own."""
    isolated: bool | None = None
    """Whether it runs in a process of its own, which may crash or hang without harm to the run. null: a user's own
    code does, and any term that has one of the next three settings; the shipped scorers share the reward actors'."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Seconds for one group, counted from when its process begins on it; null is 60. Then the process is killed and
    replaced, and the term has no score for the group."""
    resources: ResourcesConfig | None = None
    """Number of its processes and what each reserves."""
    runtime_env: RuntimeEnvConfig | None = None
    """Ray's ``runtime_env`` of its processes."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in tasks or ():
            try:
                get_task(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return tasks

    @field_validator("optimises")
    @classmethod
    def _measured(cls, metrics: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := [name for name in metrics or () if name not in HIGHER_IS_BETTER]:
            raise ValueError(f"no metric {unknown[0]!r}; there are {', '.join(HIGHER_IS_BETTER)}")
        return metrics

    @model_validator(mode="after")
    def _shares_or_not(self) -> "TermConfig":
        wants = [name for name in ("deadline_s", "resources", "runtime_env") if getattr(self, name) is not None]
        if self.isolated is False and wants:
            raise ValueError(
                f"isolated: false puts term {self.name!r} into the reward actors' process, which has no "
                f"{' or '.join(wants)} for a single term; leave isolated out, or remove {', '.join(wants)}"
            )
        return self

    @property
    def own_process(self) -> bool:
        """Whether it runs in a process of its own."""
        if self.isolated is not None:
            return self.isolated
        return any((self.deadline_s, self.resources, self.runtime_env)) or not is_shipped(self.source)

    @property
    def deadline(self) -> float:
        """Seconds that a process of its own has for one group."""
        return self.deadline_s or DEADLINE_S

    @property
    def reserved(self) -> ResourcesConfig:
        """What processes of its own reserve."""
        return self.resources or ResourcesConfig()

    @property
    def source(self) -> str:
        """What :func:`rewards.base.build` takes."""
        return self.scorer or self.name


class RewardConfig(StrictConfig):
    """Which terms judge a sample and how they become an advantage."""

    preset: str | None = None
    """Shipped set of terms: ``paper`` (four terms) or ``paper_code`` (the seven its code z-scores); null has none."""
    terms: tuple[TermConfig, ...] = ()
    """The reward terms; a task uses those that its entry in the task table activates. Beside a preset these are added
    to its terms, and one of the same name replaces the preset's."""
    std_floor: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Smallest standard deviation a term is divided by, in units of the score; 0 is the paper's rule."""
    advantage: Literal["terms", "sum", "global", "gdpo"] = "terms"
    """``terms``: the paper's, each term standardised in its group; ``sum``: the weighted mean of the raw terms
    standardised in its group; ``global``: that mean, centred in its group, over the standard deviation of the whole
    batch; ``gdpo``: terms standardised in their group, summed, then standardised over the batch."""
    clamp: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Advantages are clamped to ±clamp; |z| ≤ √(G−1), so that 5 binds only from G = 27."""
    min_group: int = Field(default=2, ge=2)
    """Groups with fewer scored members are dropped and counted."""
    missing: Literal["drop", "fail"] = "drop"
    """A missing score: leave it out, or stop the run with its reason."""

    @field_validator("preset")
    @classmethod
    def _shipped(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in presets():
            raise ValueError(f"no preset {preset!r}; shipped ones: {', '.join(presets())}; or write the terms out")
        return preset

    @field_validator("terms")
    @classmethod
    def _usable(cls, terms: tuple[TermConfig, ...], info: ValidationInfo) -> tuple[TermConfig, ...]:
        if "preset" not in info.data:  # it was refused, and says so itself
            return terms
        names = [term.name for term in terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"term {twice[0]!r} occurs more than once; give each its own name and say which code it is in 'scorer'"
            )
        if info.data["preset"] is not None:
            terms = _with_preset(info.data["preset"], terms)
        if not terms:
            raise ValueError(f"there are none; write terms, or name a preset ({', '.join(presets())})")
        if not any(term.weight for term in terms):
            raise ValueError("every term has weight 0, so that nothing is left to train on; give one a weight")
        return terms


def _with_preset(preset: str, terms: tuple[TermConfig, ...]) -> tuple[TermConfig, ...]:
    own = {term.name: term for term in terms}
    shipped = [TermConfig.model_validate_json(json.dumps(entry)) for entry in presets()[preset]]
    named = {term.name for term in shipped}
    added = [term for term in terms if term.name not in named]
    for term in added:
        if twin := next((theirs for theirs in shipped if theirs.source == term.source), None):
            raise ValueError(
                f"term {term.name!r} judges by the same scorer as {twin.name!r} of preset {preset}; leave it out, call "
                f"it {twin.name} to replace that one, or write all terms without a preset"
            )
    return (*(own.get(term.name, term) for term in shipped), *added)


def active_terms(config: RewardConfig, task: str) -> tuple[int, ...]:
    """Positions in ``config.terms`` that judge ``task``.

    A term with ``tasks`` judges those; one that the task table names, by its own name or by its scorer's, the tasks
    whose entry does; any other one every task that has rewards.
    """
    tabled = {name for entry in TASKS.values() for name in entry.rewards}
    wanted = get_task(task).rewards

    def judges(term: TermConfig) -> bool:
        if term.tasks is not None:
            return task in term.tasks
        name = term.name if term.name in tabled else term.source
        return name in wanted or bool(wanted and name not in tabled)

    return tuple(k for k, term in enumerate(config.terms) if judges(term))


def stack_scores(scores: Sequence[Scores], missing: Literal["drop", "fail"], where: str) -> Array:
    """Puts the terms of one group together: (T, G) float64, NaN = missing.

    Args:
        scores: one entry per active term.
        missing: the policy of :class:`RewardConfig`.
        where: names the group in the error.

    Raises:
        RewardError: the terms have different lengths, or the policy is "fail" and a score is missing.
    """
    lengths = {len(term.values_G) for term in scores}
    if len(lengths) != 1:
        raise RewardError(f"{where}: the terms score {sorted(lengths)} members; all must score the same group")
    if missing == "fail":
        for term in scores:
            for member, reason in enumerate(term.reasons):
                if reason is not None:
                    raise RewardError(
                        f"{where}: reward {term.name!r} has no score for member {member}: {reason}; "
                        "mend the scorer, or set missing: drop to go on without it"
                    )
    return np.stack([term.values_G for term in scores]).astype(np.float64)


def group_advantages(scores_TG: Array, weights_T: Array | Sequence[float], std_floor: float, clamp: float) -> Array:
    """Advantages of one group, by the rule of OmniAlpha's code (arXiv 2511.20211 v2, Eq. 7 and the text above it).

    Each term is z-scored over the members that have it, (x − mean) / (std + 1e-8) with the population std; a
    member's terms are averaged by weight, over those it has; the result is z-scored again and clamped.

    With ``std_floor`` > 0 a term is divided by max(std, std_floor), and the second time by max(std, 1), so that terms
    the floor has shrunk stay small.

    Args:
        scores_TG: T terms, G members, NaN = missing.
        weights_T: non-negative.
        std_floor: in units of the scores.
        clamp: largest absolute advantage.

    Returns:
        (G,) float64. NaN for a member without any score: the caller drops it. Exactly 0 where all scores are equal.

    Raises:
        RewardError: shapes or weights that cannot be used, or infinite scores.
    """
    weights = _check(scores_TG, weights_T)
    standardised_TG = np.stack([_standardise(term_G, std_floor) for term_G in np.asarray(scores_TG, np.float64)])
    combined_G = _weighted_mean(standardised_TG, weights)
    return np.clip(_standardise(combined_G, 1.0 if std_floor > 0 else 0.0), -clamp, clamp)


def batch_advantages(scores: Sequence[tuple[Array, Sequence[float]]], config: RewardConfig) -> list[Array]:
    """Advantages of all groups of a step, by ``config.advantage``.

    - ``terms``: :func:`group_advantages`, the paper's.
    - ``sum``: the weighted mean of a member's terms, z-scored in its group (Flow-GRPO, arXiv 2505.05470).
    - ``global``: the same mean minus its group's, over the std of all rewards of the batch (Flow-GRPO's global std).
    - ``gdpo``: terms z-scored in their group, weighted sum, z-scored over the batch (GDPO, arXiv 2601.05242).

    In ``sum``, ``global`` and ``gdpo`` a member that lacks a weighted term has no advantage: its sum would not be on
    the scale of the others. ``std_floor`` bounds every divisor that is in units of the scores.

    Args:
        scores: (scores_TG, weights_T) of each group.

    Returns:
        (G,) float64 per group, NaN for a member that cannot be judged.
    """
    floor, clamp = config.std_floor, config.clamp
    if config.advantage == "terms":
        return [group_advantages(scores_TG, weights_T, floor, clamp) for scores_TG, weights_T in scores]
    sums = [_complete_sum(scores_TG, weights_T, config) for scores_TG, weights_T in scores]
    if config.advantage == "sum":
        return [np.clip(_standardise(sums_G, floor), -clamp, clamp) for sums_G in sums]
    everyone = np.concatenate(sums) if sums else np.empty(0)
    valid = everyone[~np.isnan(everyone)]
    if config.advantage == "global":
        std = valid.std() if len(valid) else 0.0
        divisor = max(std, floor) if floor > 0 else std + EPSILON
        return [np.clip(_centre(sums_G) / divisor, -clamp, clamp) for sums_G in sums]
    mean, std = (valid.mean(), valid.std()) if len(valid) else (0.0, 0.0)
    divisor = max(std, 1.0) if floor > 0 else std + EPSILON
    # A group whose members are equally good stays at 0: minus the batch's mean all of them would be pushed one way.
    # Terms that cancel do so only up to rounding.
    return [
        _zeros(sums_G) if _constant(sums_G, NO_SIGNAL * divisor) else np.clip((sums_G - mean) / divisor, -clamp, clamp)
        for sums_G in sums
    ]


def step_advantages(groups: Sequence[Credited], config: RewardConfig, reach: float | None) -> list[Array]:
    """Advantages of all groups of a step: (G,), or (G, L, h, w) of a group's cells where local credit has a reach."""
    if reach is None:
        return batch_advantages([(group.scores_TG, group.weights_T) for group in groups], config)
    local = local_advantages(groups, reach, config.advantage, config.std_floor, config.clamp)
    return [cells[:, 0, 0, 0] if cells[0].size == 1 else cells.astype(np.float32) for cells in local]


def _complete_sum(scores_TG: Array, weights_T: Array | Sequence[float], config: RewardConfig) -> Array:
    """One number per member, NaN where a weighted term is missing."""
    weights = _check(scores_TG, weights_T)
    values_TG = np.asarray(scores_TG, np.float64)[weights > 0]
    weights_T1 = weights[weights > 0][:, None]
    if not len(weights_T1):
        return np.full(values_TG.shape[1], np.nan)
    # Not a matrix product: BLAS rounds equal columns differently, and members that are equal must stay equal.
    if config.advantage != "gdpo":
        return (weights_T1 * values_TG).sum(0) / weights_T1.sum()
    return (weights_T1 * np.stack([_standardise(term_G, config.std_floor) for term_G in values_TG])).sum(0)


def _constant(values_G: Array, within: float = 0.0) -> bool:
    valid = values_G[~np.isnan(values_G)]
    return not len(valid) or bool(np.ptp(valid) <= within)


def _centre(values_G: Array) -> Array:
    """x − mean over the values that are not NaN; exactly 0 where all are equal."""
    return _zeros(values_G) if _constant(values_G) else values_G - np.nanmean(values_G)


def _zeros(values_G: Array) -> Array:
    return np.where(np.isnan(values_G), np.nan, 0.0)


def scalar_rewards(scores_TG: Array, weights_T: Array | Sequence[float]) -> Array:
    """Weighted mean of the raw terms: (G,) float64, NaN for a member without any score; for logs and curves.

    A missing term leaves the mean, so members with different missing terms are not on one scale.

    Raises:
        RewardError: as :func:`group_advantages`.
    """
    return _weighted_mean(np.asarray(scores_TG, np.float64), _check(scores_TG, weights_T))


def judged_members(advantages: Array) -> Array:
    """Which members have an advantage, (G,) bool; ``advantages`` are (G,) or (G, L, h, w)."""
    return np.asarray(~np.isnan(advantages).any(axis=tuple(range(1, advantages.ndim))))


def keep_group(advantages: Array, min_group: int) -> DropReason | None:
    """Why a group cannot be trained on, or None if it can: too few scored members, or all of them equally good."""
    judged_G = judged_members(advantages)
    valid = advantages[judged_G]
    if judged_G.sum() < min_group:
        return "below_min_group"
    return "zero_variance" if np.abs(valid).max(initial=0.0) < NO_SIGNAL else None


def _check(scores_TG: Array, weights_T: Array | Sequence[float]) -> Array:
    weights = np.asarray(weights_T, np.float64)
    scores = np.asarray(scores_TG)
    if scores.ndim != 2 or not len(scores) or weights.shape != scores.shape[:1]:
        raise RewardError(
            f"scores of shape {scores.shape} with weights of shape {weights.shape}; "
            "pass scores (terms, members), at least one term, and one weight per term"
        )
    if not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise RewardError(f"weights {weights.tolist()} must be finite and not negative; correct the terms' weights")
    if np.any(np.isinf(scores)):
        raise RewardError("scores contain infinities; mark them as missing (NaN), as run_scorer does")
    return weights


def _standardise(values_G: Array, floor: float) -> Array:
    """(x − mean) / std over the values that are not NaN."""
    valid = values_G[~np.isnan(values_G)]
    # Equal values must give exactly 0: rounding of their mean, divided by a std of the same size, would not.
    if _constant(values_G):
        return _zeros(values_G)
    std = valid.std()
    return (values_G - valid.mean()) / (max(std, floor) if floor > 0 else std + EPSILON)


def _weighted_mean(values_TG: Array, weights_T: Array) -> Array:
    valid_TG = ~np.isnan(values_TG)
    total_G = weights_T @ valid_TG
    sums_G = weights_T @ np.where(valid_TG, values_TG, 0.0)
    return np.divide(sums_G, total_G, out=np.full(values_TG.shape[1], np.nan), where=total_G > 0)
