"""The evaluation stage: the policy that GRPO started from (``sft``) and GRPO's on the same held-out records, from the
same noise."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.reward import Measured, RewardPool
from actors.rollout import RolloutPool
from common.commit import begin, commit, storage_errors
from common.events import finite
from data.records import Record, RecordDataset
from pipeline.config import RunConfig
from pipeline.run import Run
from pipeline.train import starting_point
from rewards.combine import scalar_rewards
from rewards.statistics import paired_bootstrap

log = logging.getLogger("omnialpha")

POLICIES = ("sft", "grpo")


def run_evaluate(run: Run, rollouts: RolloutPool, rewards: RewardPool) -> None:
    """Samples, scores and draws; writes results.json, table.md and one grid per task."""
    config, stage = run.config, run.config.evaluate
    folders = {"sft": starting_point(run, "eval").policy, "grpo": run.require("grpo", wanted_by="eval") / "model"}
    data = RecordDataset(config.dataset_folder, stage.split)
    chosen = {task: [int(i) for i in data.positions(task)[: stage.records]] for task in data.tasks}
    chunks = [
        (task, indices[k : k + stage.batch])
        for task, indices in chosen.items()
        for k in range(0, len(indices), stage.batch)
    ]
    measured: dict[str, list[Measured]] = {}
    pixels: dict[str, list[Any]] = {}
    for name in POLICIES:
        rollouts.load_folder(folders[name])
        results = rollouts.generate(stage.split, [chunk for _, chunk in chunks], stage.schedule)
        scores, pixels[name] = [], []
        for (task, _), (count, groups) in zip(chunks, results, strict=True):  # as they come into being
            scores.append(rewards.measure(task, count, groups))
            pixels[name].append(groups)
        measured[name] = rewards.measured(scores, f"evaluation of {name}")
        log.info("eval %s: %d records", name, len(measured[name]))
        if reasons := Counter(reason for entry in measured[name] for reason in entry.reasons):
            log.warning("eval %s: %d scores are missing: %s", name, reasons.total(), reasons.most_common(3))
        run.stop_here("evaluate")
    records = [data.cheap(index) for _, chunk in chunks for index in chunk]
    results_json = summarise(config, records, measured)
    final = run.final("evaluate")
    temporary = begin(final)
    pictures = []
    for task in chosen:
        first = next(k for k, (name, _) in enumerate(chunks) if name == task)
        path = temporary / f"{task}.png"
        columns = [pixels[name][first] for name in POLICIES]
        pictures.append(rewards.draw_comparison(path, [name.upper() for name in POLICIES], stage.rows, *columns))
    rewards.wait(pictures, "pictures")
    table = render_table(results_json)
    with storage_errors(final):
        (temporary / "results.json").write_text(json.dumps(finite(results_json), indent=1) + "\n")
        (temporary / "table.md").write_text(table)
    commit(temporary, final, {"step": 0, "config": config.identity_hash()})
    for task in chosen:
        run.tracker.picture(f"evaluate/{task}", final / f"{task}.png")
    run.events.write("evaluated", **results_json["overall"])
    run.events.write("stage_done", stage="evaluate")
    for line in table.splitlines():
        log.info("%s", line)
    log.info("pictures: %s", final)


def quantity(config: RunConfig, entry: Measured, label: str) -> float:
    """One number of an evaluated record by its label: ``reward`` (weighted mean of the raw terms), ``term/<name>`` or a
    metric's name. NaN where the record has none."""
    if label.startswith("term/"):
        return entry.terms.get(label.removeprefix("term/"), float("nan"))
    if label != "reward":
        return entry.metrics.get(label, float("nan"))
    if not entry.terms:
        return float("nan")
    weights = {term.name: term.weight for term in config.rewards.terms}
    scores_T1 = np.array([[value] for value in entry.terms.values()])
    return float(scalar_rewards(scores_T1, [weights[name] for name in entry.terms])[0])


def summarise(config: RunConfig, records: Sequence[Record], measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Means of every reward term and metric per task and policy, and the paired difference with its interval.

    The interval resamples photos and objects, not images: records that share either are not independent.
    """
    rows: list[dict[str, Any]] = []
    by_task: dict[str, list[int]] = defaultdict(list)
    for position, record in enumerate(records):
        by_task[record.task].append(position)
    for task, positions in by_task.items():
        first = measured["sft"][positions[0]]
        metrics = sorted({key for k in positions for key in measured["sft"][k].metrics})
        labels = [*(["reward"] if first.terms else []), *(f"term/{name}" for name in first.terms), *metrics]
        for label in labels:
            rows.append({"task": task, "quantity": label} | _compare(config, records, measured, positions, label))
    judged = [k for k, record in enumerate(records) if config.grpo.tasks.get(record.task, 0) > 0]
    overall = _compare(config, records, measured, judged, "reward")
    return {
        "split": config.evaluate.split,
        "records": {task: len(positions) for task, positions in by_task.items()},
        "overall": {"quantity": "reward"} | overall,
        "rows": rows,
        "bootstrap": {"draws": config.evaluate.draws, "resampled": "photos and objects", "interval": "95 % percentile"},
    }


def _compare(
    config: RunConfig,
    records: Sequence[Record],
    measured: dict[str, list[Measured]],
    positions: Sequence[int],
    label: str,
) -> dict[str, float | int]:
    pairs = np.array(
        [[quantity(config, measured[name][k], label) for name in POLICIES] for k in positions], dtype=np.float64
    )
    valid = np.asarray(np.isfinite(pairs).all(axis=1))
    if not valid.any():
        return {"sft": float("nan"), "grpo": float("nan"), "difference": float("nan"), "n": 0}
    pairs, kept = pairs[valid], [k for k, good in zip(positions, valid.tolist(), strict=True) if good]
    mean, low, high = paired_bootstrap(
        pairs[:, 1] - pairs[:, 0],
        [records[k].photo_group or None for k in kept],
        [records[k].object_groups[0] for k in kept],
        config.evaluate.draws,
        config.seed,
    )
    return {
        "sft": float(pairs[:, 0].mean()),
        "grpo": float(pairs[:, 1].mean()),
        "difference": mean,
        "low": low,
        "high": high,
        "n": len(kept),
    }


def render_table(results: dict[str, Any]) -> str:
    """Markdown table of the results."""
    overall = results["overall"]
    lines = [
        f"{results['split']} set, paired difference GRPO − SFT with its 95 % interval over photos and objects",
        "",
        "| task | quantity | SFT | GRPO | difference | 95 % interval | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [{"task": "all RL tasks", **overall}, *results["rows"]]:
        if row["n"]:
            lines.append(
                f"| {row['task']} | {row['quantity']} | {row['sft']:.4f} | {row['grpo']:.4f} | "
                f"{row['difference']:+.4f} | [{row['low']:+.4f}, {row['high']:+.4f}] | {row['n']} |"
            )
    return "\n".join(lines) + "\n"
