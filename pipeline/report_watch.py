"""The report's gaming watch: a banner where it raised an alarm, and curves of the reward and every watched metric."""

import math
from collections.abc import Sequence

from pipeline.report_charts import Line, chart
from pipeline.report_data import RunData
from pipeline.report_html import image, text


def alarm(runs: Sequence[RunData]) -> str:
    """What the header says where a reward seems to have been gamed."""
    items = []
    for run in runs:
        named = f"{run.name}: " if len(runs) > 1 else ""
        items += [f"{named}{event['message']}" for event in run.alarms.values()]
        if run.stopped_early:
            items.append(f"{named}{run.stopped_early}")
    if not items:
        return ""
    listed = "".join(f"<li>{text(item)}</li>" for item in items)
    return f'<div class="alarm">The reward may have been gamed:<ul>{listed}</ul></div>'


def watch(runs: Sequence[RunData]) -> str:
    """Reward and watched metrics on the validation records, one line per task, and pictures of alarms."""
    parts = []
    for run in runs:
        if not run.looks:
            continue
        named = f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{named}<div class="charts">{_curves(run)}</div>')
        parts += [
            f'<h3>{text(name)}: input | before | now | truth</h3><img class="flat" loading="lazy" alt="{text(name)}" '
            f'src="{image(png)}">'
            for name, png in run.alarm_pictures
        ]
    if not parts:
        return "<p>The run had no gaming watch, or has not looked yet (grpo.watch.every).</p>"
    return (
        "<p>Means over fixed validation records, before training (step 0) and at every look. A metric is watched on "
        "the tasks whose reward does not train on it; an alarm is a reward that rose clearly while such a metric of "
        f"the same task got clearly and relevantly worse.</p>{''.join(parts)}"
    )


def _curves(run: RunData) -> str:
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for step, event in run.looks.items():
        for change in event["changes"]:
            points = lines.setdefault(change["quantity"], {}).setdefault(change["task"], [])
            if not points and _number(change["before"]):
                points.append((0.0, change["before"]))
            if _number(change["now"]):
                points.append((float(step), change["now"]))
    return "".join(
        chart(f"Validation {quantity}", [Line(task, points) for task, points in tasks.items()])
        for quantity, tasks in lines.items()
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
