"""The GRPO stage. One loop, read from top to bottom; only references to large values pass through it.

prompts ─▶ rollout actors ─(pixels)─▶ reward actors ─▶ scores ─▶ advantages, keep or drop
                 ▲                                                      │
                 └── weights (version, digest) ◀── learner ranks ◀──(trajectories)
"""

import functools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.engine import EngineConfig
from actors.learner import Item, LearnerGroup
from actors.reward import GroupScores, RewardPool
from actors.rollout import Group, RolloutPool
from actors.waiting import wait_all
from common.errors import ActorError, NumericsError, RewardError
from pipeline.run import Progress, Run
from pipeline.train import task_sampler
from policy.group import GroupMeta, GroupRequest
from policy.programs import make_grpo_program
from rewards.combine import RewardConfig, active_terms, group_advantages, keep_group, scalar_rewards

log = logging.getLogger("omnialpha")


def run_grpo(run: Run, learner: LearnerGroup, rollouts: RolloutPool, rewards: RewardPool) -> None:
    """Trains the SFT policy with rewards of its decoded layers."""
    config, stage = run.config, run.config.grpo
    policy = run.require("sft", wanted_by="grpo") / "model"
    sampler = task_sampler(run, "grpo", stage.tasks)
    make = functools.partial(make_grpo_program, policy, stage.objective, stage.kernel, stage.sampling.schedule.sigmas())
    learner.setup(make, stage.optimiser, EngineConfig(zero_stage=stage.zero_stage), stage.steps)
    progress = Progress(run, "grpo", stage.steps, stage.commit_every)
    start = progress.resume(learner.restore)
    version, empty = start, 0
    rollouts.publish(version, *learner.publish())
    for step in range(start, stage.steps):
        began = time.monotonic()
        draws = [sampler.draw(step * stage.prompts + p, 1) for p in range(stage.prompts)]
        requests = [GroupRequest(step + 1, p, int(draw.indices[0]), stage.group) for p, draw in enumerate(draws)]
        for request, draw in zip(requests, draws, strict=True):
            run.events.write("group_launched", stage="grpo", step=step + 1, group=request.name, task=draw.task)
        groups = rollouts.sample(requests)
        scored = collect(groups, rewards, version, config.cluster.deadline_s)
        batch = select(scored, config.rewards)
        sampled = time.monotonic()
        if batch.items:
            record = learner.train(step, batch.items)
            check_first_ratio(record, stage.first_ratio_bound, step + 1)
            version = step + 1
            rollouts.publish(version, *learner.publish())
        else:
            record = {}
        empty = 0 if batch.items else empty + 1
        account(run, step + 1, batch)
        report(run, step + 1, record, batch, sampled - began, time.monotonic() - sampled)
        if empty >= stage.max_empty_steps:
            raise RewardError(
                f"no trainable group in {empty} consecutive steps ({dict(Counter(batch.dropped.values()))}); "
                f"scores are missing because: {batch.reasons.most_common(1) or 'none is missing'}"
            )
        if (step + 1) % stage.pictures_every == 0:
            path = run.folder / "grpo" / "pictures" / f"step-{step + 1:05d}.png"
            wait_all([rewards.draw_group(path, groups[0].pixels)], "a picture", config.cluster.deadline_s)
            run.tracker.picture("grpo/group", path)
        progress.after_step(step + 1, learner.save, {"version": step + 1, "position": (step + 1) * stage.prompts})
    progress.finish(lambda folder: learner.export(folder / "model"), {"version": stage.steps})


Scored = tuple[Group, GroupMeta, GroupScores]


def collect(groups: Sequence[Group], rewards: RewardPool, version: int, deadline_s: float) -> list[Scored]:
    """Waits for groups and their scores. Scoring of a group starts when it exists, not when all do.

    Raises:
        ActorError: a group was sampled by another policy version than the one just published.
    """
    scores = [rewards.score(group.pixels) for group in groups]
    metas = wait_all([group.meta for group in groups], "rollout actors: groups", deadline_s)
    if stale := [meta.name for meta in metas if meta.version != version]:
        raise ActorError(f"groups {stale} were not sampled by policy version {version}; weights did not arrive")
    return list(zip(groups, metas, wait_all(scores, "reward actors: scores", deadline_s), strict=True))


@dataclass(frozen=True)
class TrainingBatch:
    """What a step trains on, and what it left out."""

    items: list[Item]
    trained: list[str]
    dropped: dict[str, str]
    """Group name → reason."""
    rewards: dict[str, float]
    """Mean raw reward, per task and per term."""
    spread: float
    """Mean within-group standard deviation of the scalar reward."""
    reasons: Counter[str]
    """Why scores are missing, and how often."""


def select(scored: Sequence[Scored], config: RewardConfig) -> TrainingBatch:
    """Turns scores into advantages and decides which groups are trained on. Pure."""
    items: list[Item] = []
    trained: list[str] = []
    dropped: dict[str, str] = {}
    values: dict[str, list[float]] = defaultdict(list)
    spreads: list[float] = []
    reasons: Counter[str] = Counter()
    for group, meta, result in scored:
        weights_T = [config.terms[k].weight for k in active_terms(config, meta.task)]
        advantages_G = group_advantages(result.scores_TG, weights_T, config.std_floor, config.clamp)
        rewards_G = scalar_rewards(result.scores_TG, weights_T)
        reasons.update(result.reasons)
        if np.isfinite(rewards_G).any():
            values["reward"].append(float(np.nanmean(rewards_G)))
            values[f"reward/{meta.task}"].append(float(np.nanmean(rewards_G)))
            spreads.append(float(np.nanstd(rewards_G)))
        for name, row_G in zip(result.terms, result.scores_TG, strict=True):
            if np.isfinite(row_G).any():
                values[f"term/{name}"].append(float(np.nanmean(row_G)))
        if reason := keep_group(advantages_G, config.min_group):
            dropped[meta.name] = reason
            continue
        kept, steps = int(np.isfinite(advantages_G).sum()), meta.steps
        name = f"group {meta.name} ({meta.task})"
        items.append(Item(group.trajectory, kept * steps, cost=meta.tokens, calls=steps, extra=advantages_G, name=name))
        trained.append(meta.name)
    means = {key: float(np.mean(entries)) for key, entries in values.items()}
    return TrainingBatch(items, trained, dropped, means, float(np.mean(spreads)) if spreads else 0.0, reasons)


def check_first_ratio(record: dict[str, float], bound: float, step: int) -> None:
    """The learner's replay of an unchanged policy must give the rollout's own log-probabilities.

    Raises:
        NumericsError: the ratios were off by more than the bound; the update must not be trusted.
    """
    error = record["max_ratio_error"]
    if not error <= bound:  # also for NaN
        raise NumericsError(
            f"step {step}: the first ratio is off by {error:.2e}, more than grpo.first_ratio_bound {bound:.1e}: the "
            "rollout actors and the learner do not compute the same policy (weights, dtype, batch shape or threads)"
        )


def account(run: Run, step: int, batch: TrainingBatch) -> None:
    """Writes what became of every group."""
    for name in batch.trained:
        run.events.write("group_trained", stage="grpo", step=step, group=name, version=step)
    for name, reason in batch.dropped.items():
        run.events.write("group_dropped", stage="grpo", step=step, group=name, reason=reason)


def report(
    run: Run, step: int, record: dict[str, float], batch: TrainingBatch, sample_s: float, train_s: float
) -> None:
    """One line, one event and one wandb row per step."""
    dropped = Counter(batch.dropped.values())
    values: dict[str, Any] = (
        record
        | batch.rewards
        | {
            "groups": len(batch.trained),
            "reward_spread": batch.spread,
            "missing_scores": batch.reasons.total(),
            "missing_because": dict(batch.reasons.most_common(5)),
            "sample_s": round(sample_s, 3),
            "train_s": round(train_s, 3),
            **{f"dropped/{reason}": count for reason, count in dropped.items()},
        }
    )
    line = f"reward {batch.rewards.get('reward', float('nan')):.4f} ± {batch.spread:.4f}  "
    if record:
        line += (
            f"ratio {record['ratio']:.6f} (max off {record['max_ratio_error']:.1e})  clipped {record['clipped']:.2f}  "
            f"grad {record['max_grad_norm']:.2f}  "
        )
    line += f"groups {len(batch.trained)}" + (f" dropped {dict(dropped)}" if dropped else "")
    for reason in list(batch.reasons)[:1]:
        log.warning("step %d: %d scores are missing, for example because %s", step, batch.reasons.total(), reason)
    run.record("grpo", step, run.config.grpo.steps, f"{line}  {sample_s:.1f}+{train_s:.1f} s", values)
