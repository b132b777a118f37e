"""Does GRPO learn, and with which settings? Trains one SFT policy under many settings and tabulates the test reward.

    python -m benchmarks.study run runs/demo --out runs/study [--only CASE ...]
    python -m benchmarks.study table --out runs/study

``runs/demo`` is a finished demo: its SFT policy and dataset are the starting point of every case. ``wrong_sign`` trains
on the negated advantages: if it did not fall below SFT, a gain of the others would not come from the reward. The two
cases that prove something are evaluated on the test split, those that choose a setting on the validation split.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One training run."""

    name: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1,)
    sign: int = 1
    """−1 negates the advantages."""
    steps: int = 12
    records: int = 30
    """Records per task."""
    split: str = "val"


UPDATES = ("grpo.minibatches=4",)
CASES = (
    Case("default", seeds=(1, 2, 3), steps=30, records=60, split="test"),
    Case("wrong_sign", seeds=(1, 2, 3), sign=-1, steps=30, records=60, split="test"),
    Case("lr_1e-4"),
    Case("lr_3e-5", ("grpo.optimiser.lr=3e-5",)),
    Case("lr_3e-4", ("grpo.optimiser.lr=3e-4",)),
    Case("lr_1e-3", ("grpo.optimiser.lr=1e-3",)),
    Case("window_2", ("grpo.sampling.window.size=2",)),
    Case("window_9", ("grpo.sampling.window.size=9", "grpo.sampling.window.movement=fixed")),
    Case("group_4", ("grpo.group=4", "grpo.prompts=16")),
    Case("group_16", ("grpo.group=16", "grpo.prompts=4")),
    Case("updates_4_eps_1e-4", (*UPDATES, "grpo.objective.clip_range=1e-4")),
    Case("updates_4_eps_1e-3", (*UPDATES, "grpo.objective.clip_range=1e-3")),
    Case("updates_4_eps_1e-2", (*UPDATES, "grpo.objective.clip_range=1e-2")),
    Case("updates_4_guard", (*UPDATES, "grpo.objective.guard=true", "grpo.objective.clip_range=1e-4")),
    Case("cps", ("grpo.kernel={name: cps, eta: 0.8}",)),
    Case("dance", ("grpo.kernel={name: dance, eta: 0.3}",)),
    Case("gdpo", ("rewards.advantage=gdpo",)),
    Case("lora_16", ("grpo.lora={rank: 16}", "grpo.optimiser.lr=1e-3")),
    Case("nft", ("grpo.algorithm=nft",)),
)


def _train(case: Case, seed: int, demo: Path, folder: Path) -> None:
    """One case in this process; the run goes on where it was interrupted."""
    import pipeline.grpo
    from pipeline.config import load_config
    from pipeline.stages import run_stages, stages_of

    if case.sign < 0:
        right = pipeline.grpo.step_advantages
        pipeline.grpo.step_advantages = lambda *given: [-advantages for advantages in right(*given)]
    config = load_config(
        "demo",
        [
            f"name={case.name}",
            f"run_dir={folder}",
            f"seed={seed}",
            f"dataset={demo / 'dataset'}",
            f"grpo.start={demo / 'sft' / 'final' / 'model'}",
            f"grpo.steps={case.steps}",
            "grpo.pictures_every=1000",
            "grpo.watch.every=0",
            f"evaluate.records={case.records}",
            f"evaluate.split={case.split}",
            "tracking.wandb=disabled",
            *case.overrides,
        ],
    )
    run_stages(config, stages_of(config))


def _run(options: argparse.Namespace) -> None:
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        for seed in case.seeds:
            folder = options.out / f"{case.name}-{seed}"
            if (folder / "evaluate" / "final" / "results.json").exists():
                continue
            began = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.study", "one", str(options.demo), "--out", str(folder)]
            folder.parent.mkdir(parents=True, exist_ok=True)
            with folder.with_suffix(".log").open("w") as log:
                done = subprocess.run([*command, "--case", case.name, "--seed", str(seed)], stdout=log, stderr=log)
            minutes = (time.monotonic() - began) / 60
            print(f"{case.name} seed {seed}: exit {done.returncode}, {minutes:.1f} min", flush=True)


def _one(options: argparse.Namespace) -> None:
    case = next(case for case in CASES if case.name == options.case)
    _train(case, options.seed, options.demo.resolve(), options.out.resolve())


def _table(options: argparse.Namespace) -> None:
    print("| case | seed | steps | SFT | GRPO | difference | 95 % interval | clipped | approx. KL | s/step |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for seed in case.seeds:
            folder = options.out / f"{case.name}-{seed}"
            if not (folder / "evaluate" / "final" / "results.json").exists():
                continue
            row = json.loads((folder / "evaluate" / "final" / "results.json").read_text())["overall"]
            events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
            steps = [event for event in events if event["event"] == "step"]

            def mean(key: str, steps: list[dict] = steps) -> float:
                values = [step[key] for step in steps if key in step]
                return sum(values) / len(values) if values else float("nan")

            seconds = mean("sample_s") + mean("train_s")
            print(
                f"| {case.name} | {seed} | {case.steps} | {row['sft']:.4f} | {row['grpo']:.4f} | "
                f"{row['difference']:+.4f} | [{row['low']:+.4f}, {row['high']:+.4f}] | {mean('clipped'):.3f} | "
                f"{mean('approx_kl'):.1e} | {seconds:.1f} |"
            )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="train all cases that have no result yet")
    run.add_argument("demo", type=Path)
    run.add_argument("--only", nargs="*", default=())
    run.set_defaults(handler=_run)
    one = commands.add_parser("one", help="train one case in this process")
    one.add_argument("demo", type=Path)
    one.add_argument("--case", required=True)
    one.add_argument("--seed", type=int, required=True)
    one.set_defaults(handler=_one)
    table = commands.add_parser("table", help="print the results as Markdown")
    table.set_defaults(handler=_table)
    for command in (run, one, table):
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.handler(options)


if __name__ == "__main__":
    main()
