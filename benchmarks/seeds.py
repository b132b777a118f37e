"""Is what the demo shows more than one lucky seed? Runs it again with other seeds and tabulates all of them.

    python -m benchmarks.seeds run runs/demo --out runs/seeds [--seeds 2 3]
    python -m benchmarks.seeds table runs/demo --out runs/seeds

``runs/demo`` is a finished demo, the first seed; the others take its dataset. A seed varies what SFT, SFT continued and
GRPO train on and in which order, all noise, and the evaluation's noise. The table has every quantity that the reward
is made of and the primary metrics: GRPO against SFT and against SFT continued, with + or - where the 95 % interval of a
seed is on one side of 0. Where the runs kept what each record measured, the interval of the mean over the seeds
follows: a record's differences are averaged over the seeds, and photos and objects resampled. It speaks of new photos
and objects, for these seeds.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.evaluate import RECORDS, comparisons
from rewards.statistics import paired_bootstrap

FACTS = ("record", "task", "photo", "object", "quantity")
SIGNS = {"better": "+", "worse": "-", "": "·"}


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluate" / "final" / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def _values(folder: Path) -> list[dict[str, Any]]:
    """What each record measured; nothing for a run that did not keep it."""
    path = folder / "evaluate" / "final" / RECORDS
    return pq.read_table(path).to_pylist() if path.exists() else []


def pooled(runs: list[list[dict[str, Any]]], tasks: set[str], quantity: str, base: str) -> tuple[float, float, float]:
    """Mean over records and seeds of GRPO − ``base``, low and high of its 95 % interval over photos and objects.

    Args:
        runs: the rows of each seed's :func:`pipeline.evaluate.by_record`.

    Returns:
        NaN throughout where no record has the quantity with every seed.
    """
    found: dict[str, list[float]] = {}
    of: dict[str, dict[str, Any]] = {}
    for rows in runs:
        for row in rows:
            # As in the table of each run, where a record counts that all policies have the quantity of.
            whole = None not in (value for name, value in row.items() if name not in FACTS)
            if row["task"] in tasks and row["quantity"] == quantity and whole:
                found.setdefault(row["record"], []).append(row["grpo"] - row[base])
                of[row["record"]] = row
    kept = [record for record, differences in found.items() if len(differences) == len(runs)]
    if not kept:
        return math.nan, math.nan, math.nan
    means = [sum(found[record]) / len(runs) for record in kept]
    return paired_bootstrap(means, [of[r]["photo"] for r in kept], [of[r]["object"] for r in kept])


def _folders(options: argparse.Namespace) -> list[Path]:
    return [options.demo, *sorted(options.out.glob("seed-*"))]


def _run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        folder = options.out / f"seed-{seed}"
        if _results(folder):
            continue
        began = time.monotonic()
        overrides = [f"seed={seed}", f"run_dir={folder}", f"dataset={options.demo / 'dataset'}"]
        with folder.with_suffix(".log").open("w") as log:
            command = [str(Path(sys.executable).with_name("omnialpha")), "run", "demo", *overrides]
            done = subprocess.run(command, stdout=log, stderr=log)
        print(f"seed {seed}: exit {done.returncode}, {(time.monotonic() - began) / 60:.1f} min", flush=True)
        if done.returncode:
            sys.exit(f"{folder.with_suffix('.log')} says why")


def _table(options: argparse.Namespace) -> None:
    found = {folder: results for folder in _folders(options) if (results := _results(folder))}
    runs, values = list(found.values()), [_values(folder) for folder in found]
    if not runs:
        sys.exit(f"no results in {options.demo} or {options.out}; run `make demo` and `make study` first")
    for folder, kept in zip(found, values, strict=True):
        if not kept:
            print(f"{folder} has no {RECORDS}, so that the mean has no interval; evaluate it again to have one\n")
    bases = [name for name in runs[0]["policies"] if name != "grpo"]
    head = ["task", "quantity", *runs[0]["policies"]]
    head += [cell for base in bases for cell in (f"GRPO − {base}", "seeds", "mean of records with every seed")]
    print(f"means over {len(runs)} seeds; + better, - worse, · interval includes 0, one sign per seed\n")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    every_task = "all RL tasks"
    for rows in zip(*([{"task": every_task, **run["overall"]}, *run["rows"]] for run in runs), strict=True):
        if len({(row["task"], row["quantity"]) for row in rows}) > 1:
            sys.exit("the runs measured different things; run all seeds with one version and one configuration")
        first = rows[0]
        if not (first["quantity"] == "reward" or first.get("primary")):
            continue

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        cells = [first["task"], first["quantity"], *(f"{mean([r[p] for r in rows]):.4f}" for p in runs[0]["policies"])]
        for base in bases:
            cells.append(f"{mean([row['grpo'] - row[base] for row in rows]):+.4f}")
            cells.append("".join(SIGNS[comparisons(row)[base]] for row in rows))
            tasks = set(runs[0].get("rl_tasks", ())) if first["task"] == every_task else {first["task"]}
            middle, low, high = pooled(values, tasks, first["quantity"], base)
            cells.append("" if math.isnan(low) else f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run the demo with the seeds that have no result yet")
    run.add_argument("--seeds", nargs="*", type=int, default=(2, 3))
    run.set_defaults(handler=_run)
    table = commands.add_parser("table", help="print the results of all seeds as Markdown")
    table.set_defaults(handler=_table)
    for command in (run, table):
        command.add_argument("demo", type=Path)
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.demo, options.out = options.demo.resolve(), options.out.resolve()
    options.handler(options)


if __name__ == "__main__":
    main()
