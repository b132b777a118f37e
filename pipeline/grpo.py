"""The GRPO stage. One loop, read from top to bottom; only references to large values pass through it.

prompts ─▶ rollout actors ─(pixels)─▶ reward actors ─▶ scores ─▶ advantages, keep or drop
                 ▲                                                      │
                 └── weights (version, digest) ◀── learner ranks ◀──(trajectories)

With ``grpo.max_staleness`` the upper row works on coming steps while the lower one trains (``pipeline/ahead.py``);
with 0 they take turns. It is the same loop.
"""

import contextlib
import functools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.learner import Item, LearnerGroup, first_ratio_message
from actors.reward import RewardPool
from actors.rollout import Group, Rollouts, Weights
from actors.waiting import wait_all
from common.errors import ActorError, LostValueError, NumericsError, RewardError
from common.events import in_flight, read_events
from data.seeding import seed_for
from data.tasks import get_task
from pipeline.ahead import Ahead
from pipeline.run import Progress, Run
from pipeline.train import starting_point, supervised_items, supervised_program, task_sampler
from pipeline.watch import Watch
from policy.group import GroupMeta, GroupRequest
from policy.rl import CreditConfig
from rewards.combine import RewardConfig, active_terms, judged_members, keep_group, scalar_rewards, step_advantages
from rewards.credit import Credited
from rewards.groups import GroupScores

log = logging.getLogger("omnialpha")

Scored = tuple[Group, GroupMeta, GroupScores]


def run_grpo(
    run: Run,
    learner: LearnerGroup,
    rollouts: Rollouts,
    rewards: RewardPool,
    judged: Callable[[], dict[str, float]] = dict,
) -> None:
    """Trains the starting policy with rewards of its decoded layers; ``judged``: what the judge's servers count."""
    config, stage = run.config, run.config.grpo
    start_policy = starting_point(run, "grpo")
    make = stage.program(start_policy, supervised_program(run, start_policy))
    learner.setup(make, stage.optimiser, stage.engine, stage.steps)
    watch = Watch(run, learner, rollouts, rewards)
    progress = Progress(run, "grpo", stage.steps, stage.commit_every)
    make_groups = functools.partial(roll_out, run, rollouts, rewards)
    empty = 0
    with contextlib.closing(Ahead(learner, rollouts, make_groups, stage.max_staleness, stage.steps)) as ahead:
        start = progress.resume(ahead.restore)
        watch.resume(start)
        ahead.begin(start)
        for step in watch.until_stopped(range(start, stage.steps)):
            began = time.monotonic()
            weights, scored = ahead.next()
            samplers = rollouts.samplers  # who joins while the learner works did not sample
            batch = select(scored, config.rewards, stage.credit)
            sampled = time.monotonic()
            record: dict[str, float] = {"version_lag": step - weights.version}
            if batch.items:
                record |= update(run, learner, step, batch.items, weights)
            ahead.publish(step + 1)
            record |= {f"judge/{name}": count for name, count in judged().items()}
            empty = 0 if batch.items else empty + 1
            account(run, step + 1, batch, weights.version)
            report(run, step + 1, record, batch, sampled - began, time.monotonic() - sampled, samplers)
            if empty >= stage.max_empty_steps:
                raise RewardError(
                    f"no trainable group in {empty} consecutive steps ({dict(Counter(batch.dropped.values()))}); "
                    f"scores are missing because: {batch.reasons.most_common(1) or 'none is missing'}"
                )
            show(run, rewards, step + 1, scored)
            watch.after_step(step + 1)
            progress.after_step(step + 1, ahead.save, {"version": step + 1, "position": (step + 1) * stage.prompts})
    for name, of_step in in_flight(read_events(run.events.path)).items():  # the watch has ended the stage early
        run.events.write("group_dropped", stage="grpo", step=of_step, group=name, reason="stopped early")
    progress.finish(watch.hand_on, watch.result())


def show(run: Run, rewards: RewardPool, step: int, scored: Sequence[Scored]) -> None:
    """Draws and stores groups where that is due."""
    stage = run.config.grpo
    if step % stage.pictures_every == 0:
        path = run.folder / "grpo" / "pictures" / f"step-{step:05d}.png"
        rewards.wait([rewards.draw_group(path, scored[0][0].pixels)], "a picture")
        run.tracker.picture("grpo/group", path)
    if stage.keep_rollouts and step % stage.keep_rollouts == 0:
        path = run.folder / "grpo" / "rollouts" / f"step-{step:05d}.parquet"
        stored = rewards.store(path, step, [m.name for _, m, _ in scored], [g.pixels for g, _, _ in scored])
        rewards.wait([stored], "rollouts to be stored")


def roll_out(run: Run, rollouts: Rollouts, rewards: RewardPool, step: int, weights: Weights) -> list[Scored]:
    """Samples and scores the groups of a step; with ``resample``, replaces those that cannot be trained on. Where some
    are lost with a node, they are sampled again, and are the same groups."""
    config, stage = run.config, run.config.grpo
    scored: list[Scored] = []
    for attempt in range(1 + stage.resample):
        missing = stage.prompts - (len(select(scored, config.rewards, stage.credit).items) if scored else 0)
        if not missing:
            break
        # Replacements come from a stream of their own: the prompts of later steps do not depend on what was dropped.
        stream, place = ("grpo replacements", step * stage.resample + attempt - 1) if attempt else ("grpo", step)
        sampler = task_sampler(run, stream, stage.tasks)
        draws = [sampler.draw(place * stage.prompts + p, 1) for p in range(missing)]
        numbers = range(len(scored), len(scored) + missing)
        requests = [
            GroupRequest(step + 1, n, int(draw.indices[0]), stage.group) for n, draw in zip(numbers, draws, strict=True)
        ]
        for request, draw in zip(requests, draws, strict=True):
            run.events.write("group_launched", stage="grpo", step=step + 1, group=request.name, task=draw.task)
        costs = [get_task(draw.task).images for draw in draws]
        for left in reversed(range(1 + config.cluster.replacements)):
            try:
                sampled, deadline = rollouts.sample(requests, costs, weights), config.cluster.deadline_s
                scored += collect(sampled, rewards, weights.version, deadline, stage.credit)
                break
            except LostValueError as error:
                if not left:
                    raise
                log.warning("%s; the groups of step %d are sampled again", error, step + 1)
                run.events.write("groups_lost", stage="grpo", step=step + 1, cause=str(error))
    return scored


def update(run: Run, learner: LearnerGroup, step: int, items: list[Item], weights: Weights) -> dict[str, float]:
    """The optimiser steps on one batch of rollouts that ``weights`` sampled; returns their merged records.

    Raises:
        NumericsError: the learner and the rollout actors did not compute the same policy before the first of them.
    """
    stage = run.config.grpo
    records: list[dict[str, float]] = []
    fresh = weights.version == step
    learner.begin_batch(None if fresh else weights)
    if stage.recompute:
        items, error = learner.recompute(items)
        if fresh:
            check_first_ratio(error, stage.first_ratio_bound, step + 1)
    for part in portions(items, stage.minibatches, stage.epochs, (run.config.seed, step)):
        # Only before its first update does the learner hold the policy that sampled, and only without staleness: the
        # ranks check the ratio then.
        number = step * stage.epochs * stage.minibatches + len(records)
        part = [*part, *supervised_items(run, number, part)]
        records.append(learner.train(step, part, None if records or not fresh else stage.first_ratio_bound))
    return merge_records(records)


def portions(items: list[Item], minibatches: int, epochs: int, key: tuple[int, int]) -> list[list[Item]]:
    """The groups of each optimiser step: every epoch all of them, in an order drawn from ``key`` where it matters."""
    parts = min(minibatches, len(items))
    if parts * epochs == 1:
        return [items]
    out = []
    for epoch in range(epochs):
        order = np.random.default_rng(seed_for(key[0], "epoch", key[1], epoch)).permutation(len(items))
        out += [[items[i] for i in part] for part in np.array_split(order, parts)]
    return out


def merge_records(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over a batch's optimiser steps; ``max_*`` are maxima; ``first_ratio_error`` is the first step's."""
    merged = {
        key: float((np.max if key.startswith("max_") else np.mean)([r[key] for r in records])) for key in records[0]
    }
    if "max_ratio_error" in records[0]:
        merged["first_ratio_error"] = records[0]["max_ratio_error"]
    return merged | {"updates": len(records)}


def collect(
    sampled: Iterable[Group], rewards: RewardPool, version: int, deadline_s: float, credit: CreditConfig | None = None
) -> list[Scored]:
    """Waits for groups and their scores. Scoring of a group starts when it exists, not when all do.

    Args:
        sampled: groups as they come into being, in any order; what is returned is in the order of their numbers.
        rewards: who scores them.
        version: the policy version that was to sample them.
        deadline_s: longest wait.
        credit: local credit, for which scorers say what each part contributed.

    Raises:
        ActorError: a group was sampled by another policy version.
    """
    cells = credit.cells if credit else None
    scoring = {group.request.group: (group, rewards.score(group, cells)) for group in sampled}
    groups, scores = zip(*(scoring[number] for number in sorted(scoring)), strict=True)
    metas = wait_all([group.meta for group in groups], "rollout actors: groups", deadline_s)
    if stale := [meta.name for meta in metas if meta.version != version]:
        raise ActorError(f"groups {stale} were not sampled by policy version {version}; weights did not arrive")
    return list(zip(groups, metas, rewards.scores(scores), strict=True))


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
    advantage_spread: float
    """Standard deviation of the trained advantages."""
    reasons: Counter[str]
    """Why scores are missing, and how often."""
    sampling_s: float
    """Seconds of all rollout actors together."""


def select(scored: Sequence[Scored], config: RewardConfig, credit: CreditConfig | None = None) -> TrainingBatch:
    """Turns scores into advantages and decides which groups are trained on. Pure."""
    items: list[Item] = []
    trained: list[str] = []
    dropped: dict[str, str] = {}
    values: dict[str, list[float]] = defaultdict(list)
    spreads: list[float] = []
    reasons: Counter[str] = Counter()
    weights = [[config.terms[k].weight for k in active_terms(config, meta.task)] for _, meta, _ in scored]
    credited = [Credited(r.scores_TG, w, r.cells_T) for (_, _, r), w in zip(scored, weights, strict=True)]
    advantages = step_advantages(credited, config, credit.reach if credit else None)
    for (group, meta, result), weights_T, of_group in zip(scored, weights, advantages, strict=True):
        rewards_G = scalar_rewards(result.scores_TG, weights_T)
        reasons.update(result.reasons)
        if np.isfinite(rewards_G).any():
            values["reward"].append(float(np.nanmean(rewards_G)))
            values[f"reward/{meta.task}"].append(float(np.nanmean(rewards_G)))
            spreads.append(float(np.nanstd(rewards_G)))
        for name, row_G in zip(result.terms, result.scores_TG, strict=True):
            if np.isfinite(row_G).any():
                values[f"term/{name}"].append(float(np.nanmean(row_G)))
                values[f"term/{name}/{meta.task}"].append(float(np.nanmean(row_G)))
        if reason := keep_group(of_group, config.min_group):
            dropped[meta.name] = reason
            continue
        kept, steps = int(judged_members(of_group).sum()), meta.steps
        name = f"group {meta.name} ({meta.task})"
        items.append(
            Item(
                group.trajectory,
                kept * steps,
                cost=meta.tokens,
                calls=steps,
                extra=of_group,
                name=name,
            )
        )
        trained.append(meta.name)
    means = {key: float(np.mean(entries)) for key, entries in values.items()}
    spread = float(np.mean(spreads)) if spreads else 0.0
    advantage_spread = float(np.nanstd(np.concatenate([item.extra.ravel() for item in items]))) if items else 0.0
    seconds = sum(meta.seconds for _, meta, _ in scored)
    return TrainingBatch(items, trained, dropped, means, spread, advantage_spread, reasons, seconds)


def check_first_ratio(error: float, bound: float, step: int) -> None:
    """The learner's replay of an unchanged policy must give the rollout's own log-probabilities.

    Raises:
        NumericsError: the ratios were off by more than the bound.
    """
    if not error <= bound:  # also for NaN
        raise NumericsError(f"step {step}: {first_ratio_message(error, bound)}")


def account(run: Run, step: int, batch: TrainingBatch, sampled_by: int) -> None:
    """Writes what became of every group, which version sampled it and which one it made."""
    for name in batch.trained:
        run.events.write("group_trained", stage="grpo", step=step, group=name, version=step, sampled_by=sampled_by)
    for name, reason in batch.dropped.items():
        run.events.write("group_dropped", stage="grpo", step=step, group=name, reason=reason)


def report(
    run: Run,
    step: int,
    record: dict[str, float],
    batch: TrainingBatch,
    sample_s: float,
    train_s: float,
    samplers: int,
) -> None:
    """One line, one event and one wandb row per step.

    ``sample_s`` are the seconds that the loop waited for the step's groups. ``idle_learner`` is their share of the
    step, ``idle_rollout`` the share in which the average one of the ``samplers`` did not sample.
    """
    dropped = Counter(batch.dropped.values())
    seconds = max(sample_s + train_s, 1e-9)
    idle_learner = sample_s / seconds
    idle_rollout = max(0.0, 1 - batch.sampling_s / samplers / seconds)
    values: dict[str, Any] = (
        record
        | batch.rewards
        | {
            "groups": len(batch.trained),
            "reward_spread": batch.spread,
            "advantage_spread": batch.advantage_spread,
            "missing_scores": batch.reasons.total(),
            "missing_because": dict(batch.reasons.most_common(5)),
            "sample_s": round(sample_s, 3),
            "train_s": round(train_s, 3),
            "idle_learner": round(idle_learner, 3),
            "idle_rollout": round(idle_rollout, 3),
            **{f"dropped/{reason}": count for reason, count in dropped.items()},
        }
    )
    line = f"reward {batch.rewards.get('reward', float('nan')):.4f} ± {batch.spread:.4f}  "
    if "ratio" in record:
        line += (
            f"ratio {record['ratio']:.6f} (first off {record['first_ratio_error']:.1e})  "
            f"clipped {record['clipped']:.2f}  "
        )
    if "kl" in record:
        line += f"kl {record['kl']:.2e}  "
    if "max_grad_norm" in record:
        line += f"loss {record['loss']:+.4f}  grad {record['max_grad_norm']:.2f}  "
    line += f"groups {len(batch.trained)}" + (f" dropped {dict(dropped)}" if dropped else "")
    for reason in list(batch.reasons)[:1]:
        log.warning("step %d: %d scores are missing, for example because %s", step, batch.reasons.total(), reason)
    line += f"  {sample_s:.1f}+{train_s:.1f} s  idle learner {idle_learner:.0%} rollout {idle_rollout:.0%}"
    run.record("grpo", step, run.config.grpo.steps, line, values)
