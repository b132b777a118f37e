"""The evaluation stage: the policy that GRPO started from (``sft``), the one that only trained on (``continued``, where
there is one) and GRPO's, on the same held-out records from the same noise."""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.reward import Measured, RewardPool
from actors.rollout import Rollouts
from common.commit import begin, commit, storage_errors
from common.events import finite, read_events
from data.records import Record
from pipeline.config import RunConfig
from pipeline.duels import duels
from pipeline.duels import lines as duel_lines
from pipeline.measure import HeldOut, measure, quantity
from pipeline.report_data import lineage
from pipeline.run import Run
from pipeline.train import starting_point
from rewards.metrics import clearly
from rewards.statistics import paired_bootstrap

log = logging.getLogger("omnialpha")

TITLES = {"sft": "SFT", "continued": "SFT continued", "grpo": "GRPO"}
"""The policies that can be compared, and what they are called."""
RECORDS = "records.parquet"
"""What each record measured (:func:`by_record`), for comparisons that the table does not make."""


def run_evaluate(run: Run, rollouts: Rollouts, rewards: RewardPool) -> None:
    """Samples, scores and draws; writes results.json, records.parquet, table.md and one grid per task."""
    config, stage = run.config, run.config.evaluate
    folders = policies(run)
    held = HeldOut.choose(config, stage.split, None, stage.records)
    measured: dict[str, list[Measured]] = {}
    pixels: dict[str, list[Any]] = {}
    for name, folder in folders.items():
        rollouts.load_folder(folder)
        measured[name], pixels[name] = measure(config, rollouts, rewards, held, f"evaluation of {name}")
        log.info("eval %s: %d records", name, len(measured[name]))
        run.stop_here("evaluate")
    results_json = summarise(config, held.records, measured) | {"training": training_time(run.events.path)}
    if found := duels(config, rewards, held, pixels):
        results_json["duels"] = found
    final = run.final("evaluate")
    temporary = begin(final)
    pictures = []
    titles = [TITLES[name] for name in folders]
    for task in held.tasks:
        columns = [pixels[name][held.first(task)] for name in folders]
        pictures.append(rewards.draw_comparison(temporary / f"{task}.png", titles, stage.rows, *columns))
    rewards.wait(pictures, "pictures")
    table, values = render_table(results_json), by_record(config, held.records, measured)
    with storage_errors(final):
        (temporary / "results.json").write_text(json.dumps(finite(results_json), indent=1) + "\n")
        pq.write_table(values, temporary / RECORDS)
        (temporary / "table.md").write_text(table)
    commit(temporary, final, {"step": 0, "config": config.identity_hash()})
    for task in held.tasks:
        run.tracker.picture(f"evaluate/{task}", final / f"{task}.png")
    run.events.write("evaluated", **results_json["overall"])
    run.events.write("stage_done", stage="evaluate")
    for line in table.splitlines():
        log.info("%s", line)
    log.info("pictures: %s", final)


def policies(run: Run) -> dict[str, Path]:
    """Folders of the policies to compare, by name in the order of the table."""
    found = {"sft": starting_point(run, "eval").policy}
    if run.config.control:
        found["continued"] = run.require("continued", wanted_by="eval") / "model"
    return found | {"grpo": run.require("grpo", wanted_by="eval") / "model"}


def training_time(events: Path) -> dict[str, dict[str, float]]:
    """Steps of each policy's own stage and the seconds that they took, by the event log.

    Only steps that count: what a rollback took back, start-up, commits, pictures and looks of the gaming watch do not.
    """
    found = {}
    for stage, steps in lineage(read_events(events)).items():
        if stage in TITLES:
            keys = ("sample_s", "train_s") if stage == "grpo" else ("max_seconds",)
            seconds = sum(step.get(key) or 0.0 for step in steps.values() for key in keys)
            found[stage] = {"steps": len(steps), "seconds": round(seconds, 1)}
    return found


def summarise(config: RunConfig, records: Sequence[Record], measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Means of every reward term and metric per task and policy, and GRPO's paired differences with their intervals.

    The interval resamples photos and objects, not images: records that share either are not independent.
    """
    rows: list[dict[str, Any]] = []
    by_task = _by_task(records)
    for task, positions in by_task.items():
        for label in _labels(measured, positions):
            row = {"task": task, "quantity": label} | _compare(config, records, measured, positions, label)
            rows.append(row | ({"primary": True} if label in config.evaluate.primary.get(task, ()) else {}))
    judged = [k for k, record in enumerate(records) if config.grpo.tasks.get(record.task, 0) > 0]
    overall = _compare(config, records, measured, judged, "reward")
    return {
        "split": config.evaluate.split,
        "policies": list(measured),
        "records": {task: len(positions) for task, positions in by_task.items()},
        "overall": {"quantity": "reward"} | overall,
        "rl_tasks": sorted({records[k].task for k in judged}),
        "rows": rows,
        "bootstrap": {"draws": config.evaluate.draws, "resampled": "photos and objects", "interval": "95 % percentile"},
    }


def by_record(config: RunConfig, records: Sequence[Record], measured: dict[str, list[Measured]]) -> pa.Table:
    """Every quantity of the table, of every record: columns record, task, photo, object, quantity, and one per policy
    (null where it is missing)."""
    rows = []
    for task, positions in _by_task(records).items():
        for label in _labels(measured, positions):
            for k in positions:
                photo, thing = records[k].photo_group or None, records[k].object_groups[0]
                facts = {"record": records[k].id, "task": task, "photo": photo, "object": thing, "quantity": label}
                rows.append(facts | finite({name: quantity(config, of[k], label) for name, of in measured.items()}))
    texts = [pa.field(name, pa.string()) for name in ("record", "task", "photo", "object", "quantity")]
    return pa.Table.from_pylist(rows, pa.schema([*texts, *(pa.field(name, pa.float64()) for name in measured)]))


def _by_task(records: Sequence[Record]) -> dict[str, list[int]]:
    """Positions of each task's records."""
    found: dict[str, list[int]] = defaultdict(list)
    for position, record in enumerate(records):
        found[record.task].append(position)
    return found


def _labels(measured: dict[str, list[Measured]], positions: Sequence[int]) -> list[str]:
    """What was measured of a task's records, in the table's order."""
    first = measured["sft"][positions[0]]
    metrics = sorted({key for k in positions for key in measured["sft"][k].metrics})
    return [*(["reward"] if first.terms else []), *(f"term/{name}" for name in first.terms), *metrics]


def _compare(
    config: RunConfig,
    records: Sequence[Record],
    measured: dict[str, list[Measured]],
    positions: Sequence[int],
    label: str,
) -> dict[str, Any]:
    """Means by policy, GRPO − SFT as ``difference``, ``low``, ``high``, and GRPO − SFT continued, where there is one,
    as the same under ``over_continued``; over the records that all policies have the quantity of."""
    names = list(measured)
    values_NP = np.array(
        [[quantity(config, measured[name][k], label) for name in names] for k in positions], dtype=np.float64
    ).reshape(len(positions), len(names))
    valid = np.asarray(np.isfinite(values_NP).all(axis=1))
    kept = [k for k, good in zip(positions, valid.tolist(), strict=True) if good]
    values = dict(zip(names, values_NP[valid].T, strict=True))

    def over(base: str) -> dict[str, float]:
        if not kept:
            return dict.fromkeys(("difference", "low", "high"), float("nan"))
        mean, low, high = paired_bootstrap(
            values["grpo"] - values[base],
            [records[k].photo_group or None for k in kept],
            [records[k].object_groups[0] for k in kept],
            config.evaluate.draws,
            config.seed,
        )
        return {"difference": mean, "low": low, "high": high}

    means = {name: float(column.mean()) if kept else float("nan") for name, column in values.items()}
    continued = {"over_continued": over("continued")} if "continued" in names else {}
    return means | over("sft") | continued | {"n": len(kept)}


def comparisons(row: dict[str, Any]) -> dict[str, str]:
    """What a row's intervals say of GRPO against each other policy: better, worse, or nothing."""
    bases = {"sft": row, **({"continued": row["over_continued"]} if "over_continued" in row else {})}
    return {base: clearly(row["quantity"], found.get("low"), found.get("high")) for base, found in bases.items()}


def primary_lines(results: dict[str, Any]) -> list[str]:
    """One line per task: which of its primary metrics improved against every other policy, and which did not."""
    bases = [name for name in results["policies"] if name != "grpo"]
    by_task: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in results["rows"]:
        if row.get("primary"):
            by_task[row["task"]][row["quantity"]] = comparisons(row)
    lines = []
    for task, metrics in by_task.items():
        improved = [name for name, found in metrics.items() if set(found.values()) == {"better"}]
        parts = [f"better than {' and '.join(TITLES[base] for base in bases)}: {', '.join(improved) or 'none'}"]
        for base in bases:
            if worse := [name for name, found in metrics.items() if found[base] == "worse"]:
                parts.append(f"worse than {TITLES[base]}: {', '.join(worse)}")
        if undecided := [
            name for name, found in metrics.items() if name not in improved and "worse" not in found.values()
        ]:
            parts.append(f"undecided: {', '.join(undecided)}")
        lines.append(f"primary, {task}: {'; '.join(parts)}")
    return lines


def render_table(results: dict[str, Any]) -> str:
    """Markdown table of the results, what the primary metrics say, and what the policies' training took."""
    names, rows = results["policies"], [{"task": "all RL tasks", **results["overall"]}, *results["rows"]]
    bases = [name for name in names if name != "grpo"]
    differences = [f"GRPO − {TITLES[base]}" for base in bases]
    head = ["task", "quantity", *(TITLES[name] for name in names)]
    head += [cell for title in differences for cell in (title, "95 % interval")] + ["n"]
    lines = [
        f"{results['split']} set, paired differences {' and '.join(differences)} with their 95 % intervals over photos "
        "and objects; \\* marks the primary metrics, declared before the run",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in rows:
        if row["n"]:
            cells = [row["task"], row["quantity"] + (" \\*" if row.get("primary") else "")]
            cells += [f"{row[name]:.4f}" for name in names]
            for found in (row, *([row["over_continued"]] if "continued" in names else [])):
                cells += [f"{found['difference']:+.4f}", f"[{found['low']:+.4f}, {found['high']:+.4f}]"]
            lines.append(f"| {' | '.join(cells)} | {row['n']} |")
    primary = primary_lines(results)
    took = [f"{TITLES[s]} {t['seconds']:.0f} s ({t['steps']} steps)" for s, t in results.get("training", {}).items()]
    lines += ["", *(f"- {line}" for line in primary)] if primary else []
    lines += ["", f"training steps took: {', '.join(took)}"] if took else []
    lines += duel_lines(results.get("duels", ()), TITLES)
    return "\n".join(lines) + "\n"
