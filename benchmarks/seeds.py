"""Is what the demo shows more than one lucky seed? Runs it again with other seeds and tabulates all of them.

    python -m benchmarks.seeds run runs/demo --out runs/seeds [--seeds 2 3]
    python -m benchmarks.seeds table runs/demo --out runs/seeds

``runs/demo`` is a finished demo, the first seed; the others take its dataset. A seed varies what SFT, SFT continued and
GRPO train on and in which order, all noise, and the evaluation's noise. The table has every quantity that the reward
is made of and the primary metrics: GRPO against SFT and against SFT continued, with + or - where the 95 % interval of a
seed is on one side of 0.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.evaluate import comparisons

SIGNS = {"better": "+", "worse": "-", "": "·"}


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / "evaluate" / "final" / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


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
    runs = [found for folder in _folders(options) if (found := _results(folder))]
    if not runs:
        sys.exit(f"no results in {options.demo} or {options.out}; run `make demo` and `make study` first")
    bases = [name for name in runs[0]["policies"] if name != "grpo"]
    head = ["task", "quantity", *runs[0]["policies"]]
    head += [cell for base in bases for cell in (f"GRPO − {base}", "seeds")]
    print(f"means over {len(runs)} seeds; + better, - worse, · interval includes 0, one sign per seed\n")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for rows in zip(*([{"task": "all RL tasks", **run["overall"]}, *run["rows"]] for run in runs), strict=True):
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
