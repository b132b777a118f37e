"""The report as one HTML page that needs nothing else: no network, no file beside it.

Whatever comes from a run goes through ``text``; the page's policy refuses every script but its own.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import yaml

from pipeline.report_charts import Line, chart
from pipeline.report_data import PictureRow, RunData, TaskPictures
from pipeline.report_html import anchor, date, image, table, text
from pipeline.report_results import headline, results
from pipeline.report_style import SCRIPT, STYLE
from pipeline.report_watch import alarm, watch

BACKGROUNDS = ("checker", "black", "white", "magenta")
SECTIONS = (
    "Results",
    "Pictures",
    "GRPO",
    "Gaming watch",
    "VAE and SFT",
    "Time",
    "Groups and scores",
    "Data",
    "Configuration",
)
STAGE_WORDS = {
    "start": "before the first stage (data, Ray)",
    "rgb": "RGB VAE",
    "vae": "VAE",
    "sft": "SFT",
    "continued": "SFT continued",
    "grpo": "GRPO",
}


def render(runs: Sequence[RunData]) -> str:
    """The page of one run, or of several side by side."""
    title = " and ".join(run.name for run in runs)
    bodies = (results, pictures, grpo_curves, watch, supervised_curves, times, groups, data, configuration)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{anchor(name)}">{name}</a>' for name in SECTIONS)
    sections = "".join(
        f'<section id="{anchor(name)}"><h2>{name}</h2>{body(runs)}</section>'
        for name, body in zip(SECTIONS, bodies, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)} · omnialpha report</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{text(title)}</h1>{''.join(headline(run, len(runs) > 1) for run in runs)}"
        f"{alarm(runs)}{facts(runs)}{lacking(runs)}<nav>{links}</nav></header><main>{sections}</main>"
        f"<footer><main>Written {date(time.time())} by omnialpha report.</main></footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


# ---- header ---------------------------------------------------------------------------------------------------------


def facts(runs: Sequence[RunData]) -> str:
    """Date, identity, versions and machine."""

    def machine(run: RunData) -> str:
        here = run.environment
        gpus = f", {here['gpus']} GPUs" if here.get("gpus") else ", no GPU"
        return f"{here.get('system')}, {here.get('cpus')} CPUs, {here.get('memory_gib')} GiB memory{gpus}"

    def versions(run: RunData) -> str:
        packages = {"python": run.environment.get("python")} | run.environment.get("packages", {})
        return " · ".join(f"{name} {number}" for name, number in packages.items())

    lines: dict[str, Callable[[RunData], str]] = {
        "Date": lambda run: f"{date(run.started)} to {date(run.last)}",
        "Attempts": lambda run: str(run.attempts),
        "Configuration": lambda run: f"{run.config.get('name', '–')}, identity {run.identity or '–'}",
        "Dataset digest": lambda run: run.dataset_digest[:16] or "–",
        "Driver's machine": machine,
        "Versions": versions,
    }
    if any(run.scorers for run in runs):
        lines["Reward networks"] = lambda run: " · ".join(f"{k}: {v}" for k, v in run.scorers.items()) or "–"
    heads = f"<thead><tr><td></td>{''.join(f'<th>{text(run.name)}</th>' for run in runs)}</tr></thead>"
    rows = "".join(
        f"<tr><th>{label}</th>{''.join(f'<td>{text(value(run))}</td>' for run in runs)}</tr>"
        for label, value in lines.items()
    )
    return (
        f'<div class="scroll"><table class="facts">{heads if len(runs) > 1 else ""}<tbody>{rows}</tbody></table></div>'
    )


def lacking(runs: Sequence[RunData]) -> str:
    """What is missing, in sentences."""
    named = len(runs) > 1
    items = [f"{f'{run.name}: ' if named else ''}{sentence}" for run in runs for sentence in run.lacking]
    if not items:
        return ""
    return f'<div class="lacking">What is missing:<ul>{"".join(f"<li>{text(i)}</li>" for i in items)}</ul></div>'


# ---- pictures -------------------------------------------------------------------------------------------------------


def pictures(runs: Sequence[RunData]) -> str:
    """The evaluated records, with buttons that put another background behind their transparency."""
    if not any(run.pictures for run in runs):
        return "<p>No pictures yet.</p>"
    buttons = "".join(f'<button type="button" data-set="{name}">{name}</button>' for name in BACKGROUNDS)
    switch = f'<div class="switch" role="group" aria-label="Background"><span>Background:</span>{buttons}</div>'
    if not any(task.rows for run in runs for task in run.pictures):
        switch = ""
    parts = []
    for name in dict.fromkeys(task.task for run in runs for task in run.pictures):
        for run in runs:
            label = f"{name} · {run.name}" if len(runs) > 1 else name
            parts += [
                f"<section><h3>{text(label)}</h3>{_task(task)}</section>" for task in run.pictures if task.task == name
            ]
    return f'{switch}<div class="tasks">{"".join(parts)}</div>'


def _task(task: TaskPictures) -> str:
    if task.flat:
        return f'<img class="flat" loading="lazy" alt="{text(task.task)}" src="{image(task.flat)}">'
    if not task.rows:
        return "<p>Too large for this file.</p>"
    head = "".join(f'<div class="head">{text(name)}</div>' for name in task.columns)
    body, before = "", None
    for row in task.rows:
        if row.prompt != before or row.layer == task.rows[0].layer:
            body += f'<div class="prompt" title="{text(row.prompt)}">{text(row.prompt)}</div>'
        before = row.prompt
        body += "".join(_cell(cell, row, column) for cell, column in zip(row.cells, task.columns, strict=True))
    return f'<div class="cells" style="grid-template-columns: repeat({len(task.columns)}, 1fr)">{head}{body}</div>'


def _cell(cell: bytes | None, row: PictureRow, column: str) -> str:
    if cell is None:
        return "<div></div>"
    label = text(f"{column}, {row.layer}")
    return f'<img alt="{label}" title="{label}" src="{image(cell)}">'


# ---- curves ---------------------------------------------------------------------------------------------------------


def curve(run: RunData, stage: str, key: str, label: str, shift: float = 0.0) -> Line:
    """One value of a stage's steps; steps without it are left out."""
    steps = run.steps.get(stage, {})
    points = [(float(s), e[key] + shift) for s, e in steps.items() if isinstance(e.get(key), int | float)]
    return Line(label, points)


def grpo_curves(runs: Sequence[RunData]) -> str:
    """Rewards per term and per task, and what tells whether training is healthy."""
    keys = list(dict.fromkeys(key for run in runs for event in run.steps.get("grpo", {}).values() for key in event))
    if not keys:
        return "<p>No GRPO step yet.</p>"
    terms = sorted(key for key in keys if key.startswith("term/") and key.count("/") == 1)
    tasks = sorted(key for key in keys if key.startswith("reward/"))

    def over_runs(title: str, key: str, smooth: int = 5, note: str = "", shift: float = 0.0) -> str:
        return chart(title, [curve(run, "grpo", key, run.name, shift) for run in runs], smooth, note=note)

    parts = [over_runs("Reward, mean over groups", "reward")]
    for title, chosen in (("Reward term", terms), ("Reward on task", tasks)):
        if len(runs) == 1:  # one figure; with several runs one figure per curve, its colours are the runs'
            lines = [curve(runs[0], "grpo", key, key.partition("/")[2]) for key in chosen]
            parts.append(chart(f"{title}s" if title == "Reward term" else "Reward per task", lines, smooth=5))
        else:
            parts += [over_runs(f"{title} {key.partition('/')[2]}", key) for key in chosen]
    for title, key, note, shift in (
        ("Reward spread", "reward_spread", "Mean standard deviation within groups.", 0.0),
        ("Advantage spread", "advantage_spread", "Standard deviation over trained members.", 0.0),
        ("Mean ratio − 1", "ratio", "Against the log-probabilities that the sampler computed.", -1.0),
        ("Largest |ratio − 1|", "max_ratio_error", "", 0.0),
        ("Clip fraction", "clipped", "", 0.0),
        ("Approximate KL per update", "approx_kl", "To the policy that sampled.", 0.0),
        ("KL to the starting policy", "kl", "", 0.0),
        ("Drift from the sampling policy", "drift", "", 0.0),
        ("Gradient norm", "max_grad_norm", "Before clipping; the largest of a step's updates.", 0.0),
        ("Loss", "loss", "", 0.0),
    ):
        parts.append(over_runs(title, key, smooth=0, note=note, shift=shift))
    intro = (
        "<p>Pale lines are the steps, strong lines their centred mean over 5. A point under the pointer names it.</p>"
    )
    return f'{intro}<div class="charts">{"".join(parts)}</div>'


def supervised_curves(runs: Sequence[RunData]) -> str:
    """Losses of the supervised stages."""
    parts = []
    for stage, smooth in (("rgb", 9), ("vae", 9), ("sft", 9), ("continued", 9)):
        lines = [curve(run, stage, "loss", run.name) for run in runs]
        parts.append(chart(f"{STAGE_WORDS[stage]} loss", lines, smooth, log=True))
        if stage == "vae" and len(runs) == 1:
            pieces = [curve(runs[0], "vae", key, key) for key in ("blend", "alpha", "colour")]
            parts.append(chart("VAE loss, parts", pieces, smooth, log=True))
        norms = [curve(run, stage, "max_grad_norm", run.name) for run in runs]
        parts.append(chart(f"{STAGE_WORDS[stage]} gradient norm", norms, smooth, log=True))
    if not any(parts):
        return "<p>No step of either stage in this run.</p>"
    return f'<div class="charts">{"".join(parts)}</div>{sft_pictures(runs)}'


def sft_pictures(runs: Sequence[RunData]) -> str:
    """Validation records as SFT's first and newest policies sampled them."""
    shown = [
        f"<h4>{text(f'{run.name}, {name}' if len(runs) > 1 else name)}</h4>"
        f'<img class="flat" loading="lazy" alt="{text(f"validation records, {name}")}" src="{image(picture)}">'
        for run in runs
        for name, picture in run.sft_pictures
    ]
    return f"<h3>Validation records during SFT</h3>{''.join(shown)}" if shown else ""


# ---- time, groups, data, configuration ------------------------------------------------------------------------------


def times(runs: Sequence[RunData]) -> str:
    """Wall-clock time per stage and attempt."""
    rows = []
    for run in runs:
        longest = max((timing.seconds for timing in run.timings), default=1.0)
        newest = {timing.stage: timing for timing in run.timings}
        for timing in run.timings:
            bar = f'<span class="time" style="width: {100 * timing.seconds / longest:.1f}%"></span>'
            note = _pace(run, timing.stage) if timing is newest[timing.stage] else ""
            note += "" if timing.ended else " (no end recorded: until the last event)"
            stage = STAGE_WORDS.get(timing.stage, timing.stage)
            rows.append((run.name, stage, timing.attempt, f"{timing.seconds:.1f}", bar, note))
    if not rows:
        return "<p>Nothing has been timed yet.</p>"
    head = ("run", "phase", "attempt", "seconds", "", "per step (median)")
    return table(head, rows, "ttnnht", "times").replace("<td><span", '<td class="wide"><span')


def _pace(run: RunData, stage: str) -> str:
    steps = list(run.steps.get(stage, {}).values())
    if stage == "grpo":
        pairs = [(e["sample_s"], e["train_s"]) for e in steps if "sample_s" in e and "train_s" in e]
        if pairs:
            sample, train = ([pair[k] for pair in pairs] for k in (0, 1))
            return (
                f"sampling and scoring {median(sample):.2f} s, update {median(train):.2f} s; "
                f"in all {sum(sample):.0f} s and {sum(train):.0f} s"
            )
    seconds = [e["max_seconds"] for e in steps if isinstance(e.get("max_seconds"), int | float)]
    return f"{median(seconds):.2f} s in the slowest learner rank, {len(seconds)} steps" if seconds else ""


def groups(runs: Sequence[RunData]) -> str:
    """What became of every launched group, and scores that are missing."""
    keys = ["launched", "trained"]
    keys += sorted({key for run in runs for key in run.groups} - {"launched", "trained"})
    rows = [(key.replace("dropped:", "dropped: "), *(run.groups.get(key, 0) for run in runs)) for key in keys]
    rows.append(("missing scores", *(run.missing_scores for run in runs)))
    names = [run.name for run in runs] if len(runs) > 1 else ["count"]
    body = table(("groups", *names), rows, "t" + "n" * len(runs))
    reasons = [(run.name, reason, count) for run in runs for reason, count in run.missing_because.items()]
    if reasons:
        body += "<h3>Why scores are missing</h3>" + table(("run", "reason", "count"), reasons, "ttn")
    return body


def data(runs: Sequence[RunData]) -> str:
    """Sources with their licences, and counts of records; runs on equal data share an entry."""
    parts = []
    known = [run for run in runs if run.manifest is not None]
    for first in [run for k, run in enumerate(known) if all(run.manifest != other.manifest for other in known[:k])]:
        manifest = first.manifest or {}
        if len(runs) > 1:
            sharing = [run.name for run in known if run.manifest == manifest]
            parts.append(f"<h3>{text(', '.join(sharing))}</h3>")
        fields = ("name", "kind", "version", "licence")
        sources = [[source.get(key, "–") for key in fields] for source in manifest["sources"]]
        parts.append(table(("source", *fields[1:]), sources, "tttt"))
        if manifest["skipped"]:
            parts.append(table(("skipped source", "because"), manifest["skipped"].items(), "tt"))
        counts = manifest["counts"]
        tasks = sorted({task for split in counts.values() for task in split})
        rows = [(f"records: {task}", *(split.get(task, 0) for split in counts.values())) for task in tasks]
        rows.append(("objects", *(manifest["foregrounds"].get(split, "–") for split in counts)))
        rows.append(("photos", *(manifest["photos"].get(split, "–") for split in counts)))
        parts.append("<h3>Counts</h3>" + table(("", *counts), rows, "t" + "n" * len(counts)))
    return "".join(parts) or "<p>No manifest of the dataset here.</p>"


def configuration(runs: Sequence[RunData]) -> str:
    """Resolved configurations, collapsed; for several runs the settings that differ."""
    body = ""
    if len(runs) > 1:
        flat = [dict(_leaves(run.config)) for run in runs]
        keys = dict.fromkeys(key for entries in flat for key in entries)
        rows = [(key, *(entries.get(key, "–") for entries in flat)) for key in keys]
        differing = [row for row in rows if len(set(map(str, row[1:]))) > 1]
        body += "<h3>Settings that differ</h3>"
        body += table(("setting", *(run.name for run in runs)), differing, "t" * (len(runs) + 1))
    for run in runs:
        dumped = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
        body += (
            f"<details><summary>{text(run.name)}: resolved configuration</summary><pre>{text(dumped)}</pre></details>"
        )
    return body + "<p><small>Folders above a file and addresses are left out.</small></p>"


def _leaves(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree
