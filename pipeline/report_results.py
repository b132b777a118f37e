"""The report's results: the headline and the table of paired differences, the runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report_charts import interval_bar
from pipeline.report_data import RunData
from pipeline.report_html import interval, table, text
from rewards.metrics import clearly

OVERALL = "all RL tasks"


def verdict(quantity: str, found: Mapping[str, Any]) -> tuple[str, str]:
    """(direction, quality) of a difference: ``up`` or ``down`` where its interval excludes 0, and whether that is
    ``better`` or ``worse``."""
    low, high = found.get("low"), found.get("high")
    if low is None or high is None or low <= 0 <= high:
        return "", ""
    return ("up" if low > 0 else "down"), clearly(quantity, low, high)


def headline(run: RunData, named: bool) -> str:
    """The run's result in one line."""
    name = f"<b>{text(run.name)}</b>: " if named else ""
    if run.results is None:
        return f'<p class="headline">{name}no result yet</p>'
    row = run.results["overall"]
    if not row.get("n"):
        return f'<p class="headline">{name}no record was scored under all policies</p>'

    def difference(found: Mapping[str, Any], base: str) -> str:
        interval = f"95 % interval [{found['low']:+.4f}, {found['high']:+.4f}]"
        return f"paired difference GRPO − {base} <b>{found['difference']:+.4f}</b>, <span>{interval},</span> "

    means, control = f"SFT {row['sft']:.4f}, GRPO {row['grpo']:.4f}; ", ""
    if over := row.get("over_continued"):
        means = f"SFT {row['sft']:.4f}, SFT continued {row['continued']:.4f}, GRPO {row['grpo']:.4f}; "
        control = difference(over, "SFT continued")
    return (
        f'<p class="headline {verdict("reward", row)[1]}">{name}On the {text(run.results["split"])} set, reward: '
        f"{means}{difference(row, 'SFT')}{control}<span>n = {row['n']}</span></p>"
    )


def results(runs: Sequence[RunData]) -> str:
    """Every row of every results.json; one table, the runs side by side."""
    done = [run for run in runs if run.results]
    if not done:
        return "<p>No evaluation yet.</p>"
    rows = {id(run): _rows(run) for run in done}
    keys = list(dict.fromkeys(key for run in done for key in rows[id(run)]))
    primary = {key for run in done for key, row in rows[id(run)].items() if row.get("primary")}
    control = any("over_continued" in row for run in done for row in rows[id(run)].values())
    reach: dict[str, float] = {}
    for run in done:
        for (_, quantity), row in rows[id(run)].items():
            ends = [abs(row[k]) for k in ("low", "high", "difference") if row.get(k) is not None]
            reach[quantity] = max([reach.get(quantity, 0.0), *ends])
    bars = len(done) == 1  # they and the words take room that two runs need to stand side by side
    columns = ["SFT", "GRPO", "difference", "95 % interval", *([""] if bars else []), "", "n"]
    if control:
        columns[1:3] = ["SFT continued", "GRPO", "− SFT"]
        columns[-1:] = ["− continued", "95 % interval", "", "n"]
    above = "".join(f'<th class="run from" colspan="{len(columns)}">{text(run.name)}</th>' for run in done)
    sortable = [("task", ""), ("quantity", "")] + [
        (name, "from n" if k == 0 else "n") for _ in done for k, name in enumerate(columns)
    ]
    heads = "".join(
        f'<th class="{kind}" data-column="{k}"><button type="button">{name}</button></th>'
        if name and name != "95 % interval"
        else f'<th class="{kind}">{name}</th>'
        for k, (name, kind) in enumerate(sortable)
    )
    body, before = "", None
    for task, quantity in keys:
        kind = "overall" if task == OVERALL else "first" if task != before else ""
        cells = "".join(
            _cells(rows[id(run)].get((task, quantity)), reach[quantity] if bars else None, control) for run in done
        )
        marked = ' class="primary" title="primary metric"' if (task, quantity) in primary else ""
        body += f'<tr class="{kind}"><td>{text(task)}</td><td{marked}>{text(quantity)}</td>{cells}</tr>'
        before = task
    groups = f'<tr><th colspan="2"></th>{above}</tr>' if len(runs) > 1 else ""
    drawn = done[0].results.get("bootstrap", {}) if done[0].results else {}
    compared = "differences GRPO − SFT and GRPO − SFT continued" if control else "difference GRPO − SFT"
    return (
        f"<p>Paired {compared} on the same held-out records from the same noise, with "
        f"{text(drawn.get('interval', '95 % percentile'))} interval from {text(drawn.get('draws', '–'))} bootstrap "
        f"draws over {text(drawn.get('resampled', 'photos and objects'))}. Rows whose interval excludes 0 are marked: "
        f"the arrow is the direction, {'the word' if bars else '✓ or ✗'} says whether that is good. "
        f"{'★ marks the primary metrics, declared before the run. ' if primary else ''}"
        f"{'Bars are scaled per quantity. ' if bars else ''}A click on a heading sorts, a third one restores the "
        f'order.</p>{_training(done)}<div class="scroll"><table class="results grouped {"" if bars else "side"}">'
        f"<thead>{groups}<tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>" + "".join(_duels(run, len(done) > 1) for run in done)
    )


def _duels(run: RunData, named: bool) -> str:
    """The judge's comparisons of the policies, and the pairs that it was least sure of."""
    found = (run.results or {}).get("duels")
    if not found:
        return ""
    words = {"sft": "SFT", "continued": "SFT continued"}
    columns = ("win", "tie", "loss", "preference", "position_bias")
    rows = [
        (
            entry["task"],
            words.get(entry["against"], entry["against"]),
            *(interval(entry.get(name)) for name in columns),
            entry["n"],
            sum(entry["missing"].values()),
        )
        for entry in found
    ]
    unsure = [
        (entry["task"], words.get(entry["against"], entry["against"]), pair["prompt"], f"{pair['preference']:+.3f}")
        for entry in found
        for pair in entry.get("least_sure", ())
    ]
    head = ("task", "against", "GRPO wins", "tie", "loses", "preference", "position bias", "n", "missing")
    return (
        f"<h3>{text(run.name) + ': ' if named else ''}The judge's comparisons</h3>"
        "<p>GRPO's samples beside another policy's for the same records, each pair shown in both orders; a pair whose "
        "orders contradict each other is a tie. Preference is −1 to 1, and so is the judge's for the first place.</p>"
        + table(head, rows, "ttnnnnnnn")
        + "<p>The pairs that it was least sure of:</p>"
        + table(("task", "against", "prompt", "preference for GRPO"), unsure, "tttn")
    )


def _training(runs: Sequence[RunData]) -> str:
    """What the training of each policy took."""
    words = {"sft": "SFT", "continued": "SFT continued", "grpo": "GRPO"}
    lines = ""
    for run in runs:
        took = (run.results or {}).get("training", {})
        parts = [f"{words.get(s, s)} {entry['seconds']:.0f} s ({entry['steps']} steps)" for s, entry in took.items()]
        named = f"{run.name}: " if len(runs) > 1 else ""
        lines += f"<p>{text(named)}training steps took: {text(', '.join(parts))}.</p>" if parts else ""
    return lines


def _rows(run: RunData) -> dict[tuple[str, str], dict[str, Any]]:
    assert run.results is not None
    listed = [{"task": OVERALL, **run.results["overall"]}, *run.results["rows"]]
    return {(str(row["task"]), str(row["quantity"])): row for row in listed}


def _cells(row: Mapping[str, Any] | None, reach: float | None, control: bool) -> str:
    """A run's cells in a row; ``reach`` scales the bar of the interval, None leaves it out; ``control`` has columns
    for SFT continued."""
    bar = "" if reach is None else "<td></td>"
    if row is None:
        return f'<td class="from n">–</td>{bar}' + "<td></td>" * (9 if control else 5)
    quantity = str(row["quantity"])

    def number(source: Mapping[str, Any], key: str, form: str, kind: str = "n") -> str:
        value = source.get(key)
        shown, raw = ("–", "") if value is None else (format(value, form), repr(value))
        return f'<td class="{kind}" data-v="{text(raw)}">{shown}</td>'

    def interval(found: Mapping[str, Any]) -> str:
        low, high = found.get("low"), found.get("high")
        if low is None or high is None:
            return "<td></td>"
        return f'<td class="n" data-low="{low!r}" data-high="{high!r}">[{low:+.4f}, {high:+.4f}]</td>'

    def mark(found: Mapping[str, Any]) -> str:
        direction, quality = verdict(quantity, found)
        if not direction:
            return "<td></td>"
        word = f" {quality}" if reach is not None else {"better": "✓", "worse": "✗"}.get(quality, "")
        sign = {"up": "▲", "down": "▼"}[direction]
        return f'<td class="{direction} {quality}" title="{quality}">{sign}{word}</td>'

    if reach is not None and row.get("low") is not None and row.get("high") is not None:
        drawn = interval_bar(row["difference"], row["low"], row["high"], reach, verdict(quantity, row)[1])
        bar = f"<td>{drawn}</td>"
    over = row.get("over_continued") or {}
    return (
        number(row, "sft", ".4f", "from n")
        + (number(row, "continued", ".4f") if control else "")
        + number(row, "grpo", ".4f")
        + number(row, "difference", "+.4f")
        + interval(row)
        + bar
        + mark(row)
        + (number(over, "difference", "+.4f") + interval(over) + mark(over) if control else "")
        + number(row, "n", "d")
    )
