"""What a report shows, gathered from run folders as plain values. Reads only; nothing here knows about HTML.

A report may leave the machine: paths keep their last component only, and addresses and host names are left out.
"""

import json
import os
import platform
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from common.commit import verify
from common.errors import CheckpointError, ConfigError
from common.events import group_balance, read_events
from pipeline.doctor import PACKAGES

TRAINED = ("rgb", "vae", "sft", "continued", "grpo")
"""Stages that take steps."""
ALARM_BYTES = 2**20
"""PNG bytes of the gaming watch's pictures in one report, over all its runs."""
SFT_BYTES = 2**20
"""PNG bytes of SFT's validation pictures in one report, over all its runs."""
PICTURE_BYTES = 4 * 2**20
"""PNG bytes in one report, over all its runs; pages that grow with the image size are of no use."""

Event = dict[str, Any]
Steps = dict[str, dict[int, Event]]


@dataclass(frozen=True)
class PictureRow:
    """One layer of one evaluated record."""

    prompt: str
    layer: str
    cells: tuple[bytes | None, ...]
    """RGBA PNGs, one per column."""


@dataclass(frozen=True)
class TaskPictures:
    """Pictures of one task: rows of RGBA cells, or the grid flattened on a checkerboard."""

    task: str
    columns: tuple[str, ...]
    rows: tuple[PictureRow, ...]
    flat: bytes | None
    left_out: int = 0
    """Records that exceeded :data:`PICTURE_BYTES`."""


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one stage in one attempt."""

    stage: str
    attempt: int
    seconds: float
    ended: bool
    """False where the attempt was killed; ``seconds`` then reach to its last event."""


@dataclass
class RunData:
    """Everything a report says about one run."""

    name: str
    """The run folder's name."""
    config: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    dataset_digest: str = ""
    started: float | None = None
    last: float | None = None
    """Time of the last event."""
    attempts: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    scorers: dict[str, str] = field(default_factory=dict)
    """What reward terms say of themselves, such as the network that judges."""
    steps: Steps = field(default_factory=dict)
    """Stage → step → its event, without what a rollback took back."""
    timings: list[Timing] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    missing_scores: int = 0
    missing_because: dict[str, int] = field(default_factory=dict)
    results: dict[str, Any] | None = None
    pictures: list[TaskPictures] = field(default_factory=list)
    looks: dict[int, Event] = field(default_factory=dict)
    """Step → what the gaming watch saw after it."""
    alarms: dict[int, Event] = field(default_factory=dict)
    """Step → the alarm that the gaming watch raised after it."""
    alarm_pictures: list[tuple[str, bytes]] = field(default_factory=list)
    """Names and grids of the last alarm."""
    sft_pictures: list[tuple[str, bytes]] = field(default_factory=list)
    """Names and grids of validation records during SFT, the first and the newest."""
    stopped_early: str = ""
    """A sentence, where the gaming watch ended the stage."""
    manifest: dict[str, Any] | None = None
    """The dataset's sources and counts."""
    lacking: list[str] = field(default_factory=list)
    """What a finished run of this version would have, in sentences."""

    @property
    def finished(self) -> bool:
        return self.results is not None


def collect(folders: Sequence[Path]) -> list[RunData]:
    """Gathers the runs, each under a name of its own.

    Raises:
        ConfigError: a folder that is no run folder.
    """
    runs = [_collect(folder, len(folders)) for folder in folders]
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.name] += 1
        run.name += f" ({seen[run.name]})" if seen[run.name] > 1 else ""
    return runs


def _collect(folder: Path, runs: int) -> RunData:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder of a run, for example runs/demo")
    if not (folder / "identity.json").is_file():
        raise ConfigError(
            f"{folder}: not a run folder (no identity.json); give the folder that `omnialpha run` names at its end"
        )
    run = RunData(folder.resolve().name)
    config = _mapping(folder / "config.yaml", run)
    run.config = public(config)
    digest = folder / "dataset.digest"
    run.dataset_digest = digest.read_text().strip() if digest.is_file() else ""
    events = [e for e in read_events(folder / "events.jsonl") if isinstance(e, dict) and {"time", "event"} <= e.keys()]
    _read_events(run, events)
    _read_watch(run, events, folder, ALARM_BYTES // runs)
    _read_sft_pictures(run, folder / "sft" / "pictures", SFT_BYTES // runs)
    _say_what_stages_lack(run, events)
    _read_evaluation(run, folder / "evaluate" / "final", PICTURE_BYTES // runs)
    _read_manifest(run, Path(config.get("dataset") or folder / "dataset"))
    return run


def _mapping(path: Path, run: RunData) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        loaded = None
    if isinstance(loaded, dict):
        return loaded
    run.lacking.append(f"{path.name} is missing or damaged: no configuration is shown.")
    return {}


def _read_events(run: RunData, events: Sequence[Event]) -> None:
    starts = [event for event in events if event["event"] == "run_started"]
    run.attempts = len(starts)
    if events:
        run.started, run.last = events[0]["time"], events[-1]["time"]
    run.identity = next((str(event["config"]) for event in reversed(starts) if "config" in event), "")
    run.steps = lineage(events)
    run.timings = timings(events)
    run.groups = group_balance(events)
    because: Counter[str] = Counter()
    for event in run.steps.get("grpo", {}).values():
        run.missing_scores += event.get("missing_scores", 0)
        because.update({scrub(reason): count for reason, count in event.get("missing_because", {}).items()})
    run.missing_because = dict(because.most_common(10))
    for event in events:
        if event["event"] == "scorers":
            run.scorers = {str(name): scrub(str(words)) for name, words in event.get("terms", {}).items()}
    recorded = [event for event in events if event["event"] == "environment"]
    if recorded:
        run.environment = {k: v for k, v in recorded[-1].items() if k not in ("time", "attempt", "event")}
    else:
        run.environment = environment()
        run.lacking.append(
            "This run did not record its environment: versions and machine are those where the report was written."
        )


def _read_watch(run: RunData, events: Sequence[Event], folder: Path, budget: int) -> None:
    run.looks = lineage(events, "watch").get("grpo", {})
    run.alarms = {
        step: event | {"message": scrub(str(event.get("message")))}
        for step, event in lineage(events, "gaming").get("grpo", {}).items()
    }
    for event in lineage(events, "stopped_early").get("grpo", {}).values():
        run.stopped_early = (
            f"GRPO was stopped after step {event['step']}; its result is the policy of step {event.get('handed_on')}."
        )
    for name in run.alarms[max(run.alarms)].get("pictures", ()) if run.alarms else ():
        path = folder / "grpo" / "watch" / "pictures" / Path(str(name)).name
        if path.is_file() and (size := path.stat().st_size) <= budget:
            budget -= size
            run.alarm_pictures.append((path.stem, path.read_bytes()))
        else:
            run.lacking.append(f"The picture {path.name} of the gaming watch is missing or too large for this file.")


def _read_sft_pictures(run: RunData, folder: Path, budget: int) -> None:
    found = sorted(folder.glob("step-*.png"))
    for path in dict.fromkeys([*found[-1:], *found[:1]]):  # the newest comes first where there is room for one
        if (size := path.stat().st_size) <= budget:
            budget -= size
            run.sft_pictures.insert(0, (path.stem, path.read_bytes()))
        else:
            run.lacking.append(f"SFT's picture {path.name} is too large for this file.")


def lineage(events: Iterable[Event], kind: str = "step") -> Steps:
    """Events of steps as they count: what a rollback took back is gone, and a repeated one replaces the earlier."""
    steps: Steps = defaultdict(dict)
    for event in events:
        stage = event.get("stage", "grpo")
        if event["event"] == kind:
            steps[stage][event["step"]] = event
        elif event["event"] == "rollback":
            steps[stage] = {step: kept for step, kept in steps[stage].items() if step <= event["to_step"]}
    return {stage: dict(sorted(entries.items())) for stage, entries in steps.items() if entries}


def timings(events: Iterable[Event]) -> list[Timing]:
    """Time per stage and attempt. ``start`` is what comes before the first stage: data, Ray, checks."""
    found: list[Timing] = []
    stage, attempt, since, until = "", 0, 0.0, 0.0

    def close(ended: bool) -> None:
        if stage and until - since > 0.1:  # a start that found everything done is not worth a row
            found.append(Timing(stage, attempt, until - since, ended))

    for event in events:
        match event["event"]:
            case "run_started":
                close(ended=False)
                stage, attempt, since = "start", event.get("attempt", 0), event["time"]
            case "stage_started":
                until = event["time"]
                close(ended=stage == "start")
                stage, since = event["stage"], event["time"]
            case "stage_seconds":
                found.append(Timing(event["stage"], attempt, event["seconds"], ended=True))
                stage = ""
        until = event["time"]
    close(ended=False)
    return found


def _say_what_stages_lack(run: RunData, events: Sequence[Event]) -> None:
    grpo = run.config.get("grpo")
    expected = ("grpo",) if isinstance(grpo, dict) and grpo.get("start") else TRAINED
    for stage in expected:
        if stage in ("rgb", "continued") and not run.config.get(stage):
            continue
        marks = [
            e["event"] for e in events if e.get("stage") == stage and e["event"] in ("stage_started", "stage_done")
        ]
        if marks and marks[-1] == "stage_done":
            continue
        settings = run.config.get(stage)
        total = settings.get("steps") if isinstance(settings, dict) else None
        last = max(run.steps.get(stage, {0: {}}))
        where = "has not started" if not marks else "has started and not ended"
        if last:
            where = f"is at step {last}" + (f" of {total}" if total else "")
        run.lacking.append(f"Stage {stage} {where}.")
    if events and events[-1]["event"] == "run_failed":
        error = events[-1]
        run.lacking.append(f"The last attempt ended with {error.get('error')}: {scrub(str(error.get('message')))}")


def _read_evaluation(run: RunData, final: Path, budget: int) -> None:
    if not final.is_dir():
        run.lacking.append("There is no evaluation: no results and no pictures.")
        return
    try:
        verify(final)
        results = json.loads((final / "results.json").read_text())
        if not {"overall", "rows", "split"} <= results.keys():
            raise ValueError("results.json lacks entries")
        run.pictures = _all_pictures(final, budget)
    except (CheckpointError, OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        run.lacking.append(f"The evaluation is damaged and not shown: {scrub(str(error))}")
        return
    run.results = results
    if any(task.flat for task in run.pictures):
        run.lacking.append("The evaluation kept no RGBA cells: its pictures are flattened and have one background.")
    if left_out := sum(task.left_out for task in run.pictures):
        run.lacking.append(f"Records left out of the pictures, for the size of this file: {left_out}.")


def _all_pictures(final: Path, budget: int) -> list[TaskPictures]:
    """Every task's pictures, by name; what a small task leaves of its share goes to the larger ones."""
    found = sorted((_pictures(path) for path in final.glob("*.png")), key=_size)
    for place, task in enumerate(found):
        found[place] = _cut(task, budget // (len(found) - place))
        budget -= _size(found[place])
    return sorted(found, key=lambda task: task.task)


def _pictures(grid: Path) -> TaskPictures:
    """Cells of a task, or the flattened grid where there are none."""
    folder = grid.parent / "cells" / grid.stem
    if not (folder / "index.json").is_file():
        return TaskPictures(grid.stem, (), (), grid.read_bytes())
    index = json.loads((folder / "index.json").read_text())
    rows = []
    for entry in index["rows"]:
        cells = tuple(name and (folder / Path(name).name).read_bytes() for name in entry["cells"])
        rows.append(PictureRow(entry["prompt"], entry["layer"], cells))
    return TaskPictures(grid.stem, tuple(index["columns"]), tuple(rows), None)


def _size(task: TaskPictures) -> int:
    return len(task.flat or b"") + sum(len(cell) for row in task.rows for cell in row.cells if cell)


def _cut(task: TaskPictures, budget: int) -> TaskPictures:
    """The task without the last records, as many as it takes to fit; a record keeps all of its layers or none."""
    if task.flat:
        return task if len(task.flat) <= budget else replace(task, flat=None, left_out=1)
    layers = len(dict.fromkeys(row.layer for row in task.rows)) or 1
    left_out = 0
    while _size(task) > budget:
        task, left_out = replace(task, rows=task.rows[:-layers]), left_out + 1
    return replace(task, left_out=left_out)


def _read_manifest(run: RunData, dataset: Path) -> None:
    try:
        manifest = json.loads((dataset / "manifest.json").read_text())
        run.manifest = {
            "schema": manifest.get("schema_version"),
            "sources": [dict(source) for source in manifest.get("sources", [])],
            "skipped": {str(k): scrub(str(v)) for k, v in manifest.get("skipped_sources", {}).items()},
            "counts": {split: dict(tasks) for split, tasks in manifest.get("counts", {}).items()},
            "foregrounds": dict(manifest.get("foregrounds", {})),
            "photos": {split: len(names) for split, names in manifest.get("photo_groups", {}).items()},
        }
    except (OSError, ValueError, AttributeError, TypeError):
        run.lacking.append("The dataset's manifest is not here or cannot be read: sources and counts are not shown.")


def environment() -> dict[str, Any]:
    """Versions and size of this machine, and nothing that names it."""
    import torch

    packages = {}
    for name in ("omnialpha", *PACKAGES):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "python": platform.python_version(),
        "packages": packages,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpus": torch.cuda.device_count(),
    }


_PATH = re.compile(r"""(?<![\w./…])~?/(?:[^\s/:;,'"()\[\]<>]+/)+([^\s/:;,'"()\[\]<>]*)""")
_ADDRESS = re.compile(r"\b\w+://\S+|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b")


def scrub(text: str) -> str:
    """A message without addresses, host name and the folders above a file."""
    text = _PATH.sub(r"…/\1", _ADDRESS.sub("(address)", text))
    return re.sub(rf"\b{re.escape(socket.gethostname())}\b", "(host)", text)


def public(value: Any, key: str = "") -> Any:
    """A configuration without addresses and the folders above a file."""
    if isinstance(value, dict):
        return {str(name): public(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [public(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    if key == "address" or "://" in value:
        return "(address)"
    return f"…/{Path(value).name}" if value.startswith(("/", "~")) else value
