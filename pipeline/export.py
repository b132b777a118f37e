"""``omnialpha export``: a run's policy as a folder to hand on, with the record of how it was trained."""

import argparse
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from common.errors import CheckpointError

log = logging.getLogger("omnialpha")

STAGES = ("sft", "grpo", "judge")
DTYPES = ("float32", "bfloat16", "float16")
FORMS = {
    "policy": "a policy folder, an adapter merged; of a real base's policy diffusers' pipeline opens it",
    "diffusers": "the same, refused where no pipeline of diffusers could open it",
    "lora": "lora/ for load_lora_weights, and rgba_vae/",
}

LOGGED_STEPS = 200
"""Steps per stage in the record, evenly spread."""


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("export", help="a run's policy as a folder to hand on, with its training record")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--stage", choices=STAGES, help="whose policy, or the judge; default: grpo, else sft")
    shown = "; ".join(f"{name}: {text}" for name, text in FORMS.items())
    parser.add_argument("--form", choices=FORMS, default="policy", help=shown)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights")
    parser.set_defaults(handler=_export)


def _export(options: argparse.Namespace) -> None:
    import torch

    from common.commit import begin, commit, storage_errors, verify
    from policy.folder import check_opens_in_diffusers, export_folder, export_lora

    stages = [options.stage] if options.stage else ["grpo", "sft"]
    finished = [stage for stage in stages if (options.run / stage / "final").is_dir()]
    if not finished:
        raise CheckpointError(
            f"{options.run}: no finished stage out of {', '.join(stages)} here; give a run folder, or run that stage"
        )
    if options.out.exists():
        raise CheckpointError(f"{options.out}: exists; remove it or name another folder")
    source = verify(options.run / finished[0] / "final").path / "model"
    if options.form == "diffusers":
        check_opens_in_diffusers(source)
    write = export_lora if options.form == "lora" else export_folder
    if finished[0] == "judge":  # it is stored in bfloat16 as it is
        write = _copied
    temporary = begin(options.out)
    with storage_errors(options.out):
        write(source, temporary, getattr(torch, options.dtype))
        (temporary / "training.json").write_text(json.dumps(training_record(options.run, finished[0]), indent=1) + "\n")
    dtype = "bfloat16" if finished[0] == "judge" else options.dtype
    commit(temporary, options.out, {"step": 0, "stage": finished[0], "dtype": dtype})
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    log.info("wrote the model of stage %s to %s (%.1f MB)", finished[0], options.out, size / 1e6)


def _copied(source: Path, target: Path, dtype: Any) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def training_record(run: Path, stage: str) -> dict[str, Any]:
    """What is needed to train the policy again and to judge how it went: seed, config, data manifest, versions, log."""
    import yaml

    from common.events import read_events
    from pipeline.report_data import public

    read = yaml.safe_load((run / "config.yaml").read_text())
    config = public(read)
    outside = {"run_dir", "dataset", "cluster", "tracking"}
    events = read_events(run / "events.jsonl")
    environments = [event for event in events if event["event"] == "environment"]
    manifest = Path(read.get("dataset") or run / "dataset") / "manifest.json"
    steps: dict[str, dict[int, dict[str, Any]]] = {}
    for event in events:
        if event["event"] == "step":  # of a step that was trained twice, after a kill, the later one counts
            kept = {k: v for k, v in event.items() if k not in ("event", "stage", "attempt", "time")}
            steps.setdefault(event["stage"], {})[event["step"]] = kept
    seconds: dict[str, float] = {}
    for event in events:
        if event["event"] == "stage_seconds":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    return {
        "stage": stage,
        "seed": config["seed"],
        "config": {key: value for key, value in config.items() if key not in outside},
        "data": json.loads(manifest.read_text()) if manifest.is_file() else None,
        "environment": {k: v for k, v in environments[-1].items() if k not in ("event", "attempt", "time")}
        if environments
        else None,
        "seconds_of_the_last_attempt": seconds,
        "log": {name: _thinned(rows) for name, rows in steps.items()},
        "start": record_of_the_start(read, stage),
    }


def record_of_the_start(config: dict[str, Any], stage: str) -> dict[str, Any] | None:
    """The record of what a stage started from, where that was an exported model or what another stage handed on."""
    if stage == "judge":
        start = config["judge"]["objective"]["model"]
    else:
        start = config["sft"].get("start") or config["vae"].get("start")
        start = (config["grpo"].get("start") if stage == "grpo" else None) or start
    if not start:
        return None
    record, final = Path(start) / "training.json", Path(start).parent
    if record.is_file():
        recorded: dict[str, Any] = json.loads(record.read_text())
        return recorded
    run = final.parent.parent  # RUN/STAGE/final/model
    handed_on = final.name == "final" and (run / "config.yaml").is_file()
    return training_record(run, final.parent.name) if handed_on else None


def _thinned(rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    ordered = [rows[step] for step in sorted(rows)]
    every = max(1, -(-len(ordered) // LOGGED_STEPS))
    return [row for k, row in enumerate(ordered) if (k + 1) % every == 0 or k == len(ordered) - 1]
