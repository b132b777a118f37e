"""Line charts as inline SVG: axes, ticks, a legend, and a title under the pointer for every point. No script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

COLOURS = ("#0067a5", "#c8500a", "#00845a", "#a8447f", "#8a6d00", "#3a8fc4", "#555555")
"""Told apart by people with colour-blindness, and dark enough on white."""
MOST_POINTS = 150
"""Points of a line; more are averaged in equal parts, so a page's size does not grow with the run's length."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 250, 62, 10, 10, 36


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    """(step, value), by step."""


def chart(title: str, lines: Sequence[Line], smooth: int = 0, log: bool = False, note: str = "") -> str:
    """A figure, or nothing where no line has a point.

    Args:
        title: caption, as text.
        lines: curves; their order chooses the colours.
        smooth: steps of a centred moving mean, drawn over the pale curve; 0 draws the curve alone.
        log: logarithmic values, where all are positive.
        note: a remark under the figure, as text.
    """
    shown = [(number, line.label, thin(line.points)) for number, line in enumerate(lines) if line.points]
    if not shown:
        return ""
    xs = [x for _, _, points in shown for x, _ in points]
    ys = [y for _, _, points in shown for _, y in points]
    log = log and min(ys) > 0
    if min(ys) == max(ys):
        note = f"{note} Constant: {ys[0]:g}.".strip()
    for place, (_, label, points) in enumerate(shown):  # or a line that is hidden by another would seem to be missing
        equal = next((other for _, other, same in shown[:place] if same == points), None)
        note = f"{note} {label} equals {equal}.".strip() if equal else note
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(ys), max(ys))
    high = 1.0 if low == high == 0 and not log else high  # counts and shares that stay 0 lie on the axis
    pad = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - pad, high + pad
    first, last = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (high - (math.log10(y) if log else y)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(first, last, low, high, log, across, down)]
    for number, label, points in shown:
        colour = COLOURS[number % len(COLOURS)]
        smoothed = moving_mean(points, smooth)
        if smoothed:
            parts.append(_path(points, across, down, colour, "raw"))
        parts.append(_path(smoothed or points, across, down, colour, "line"))
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(label)}, step {x:g}: {y:.6g}</title></circle>"
            for x, y in points
        ]
    legend = ""
    if len(lines) > 1:
        entries = (f'<li><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{escape(t)}</li>' for n, t, _ in shown)
        legend = f'<ul class="legend">{"".join(entries)}</ul>'
    caption = f"<b>{escape(title)}</b>" + (" <small>(log scale)</small>" if log else "")
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{legend}{below}</figure>"
    )


def _axes(
    first: float,
    last: float,
    low: float,
    high: float,
    log: bool,
    across: Callable[[float], float],
    down: Callable[[float], float],
) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    values = log_ticks(low, high) if log else ticks(low, high, 5)
    step = values[1] - values[0] if len(values) > 1 else 1.0
    parts = []
    for value in values:
        y, text = down(value), f"{value:g}" if log else tick_text(value, step)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value in ticks(first, last, 6, whole=True):
        x = across(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)


def _path(
    points: Sequence[tuple[float, float]],
    across: Callable[[float], float],
    down: Callable[[float], float],
    colour: str,
    kind: str,
) -> str:
    places = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in points)
    return f'<path class="{kind}" stroke="{colour}" d="M{places}"/>'


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: means of equal parts of a longer curve."""
    if len(points) <= most:
        return list(points)
    edges = [round(k * len(points) / most) for k in range(most + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def moving_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred moving mean over ``window`` points, fewer at the ends; empty for short curves, where it says nothing."""
    if window < 2 or len(points) < 2 * window:
        return []
    half = window // 2
    parts = [(x, points[max(0, k - half) : k + half + 1]) for k, (x, _) in enumerate(points)]
    return [(x, sum(y for _, y in part) / len(part)) for x, part in parts]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``most`` of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, round(step))
    start = math.ceil(low / step - 1e-9)
    return [(start + k) * step for k in range(math.floor(high / step + 1e-9) - start + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between 10^``low`` and 10^``high``, with halves and fifths of them where there are few."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    return inside if len(inside) > 1 else [10.0**y for y in (low, (low + high) / 2, high)]


def tick_text(value: float, step: float) -> str:
    """A tick's number with the digits that its step needs."""
    if abs(value) < step / 1e6:
        return "0"
    if step < 1e-4 or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def interval_bar(difference: float, low: float, high: float, reach: float, kind: str) -> str:
    """A difference and its interval on a line from -``reach`` to ``reach``, with a mark at 0."""
    width, height = 120, 14

    def across(value: float) -> float:
        return width / 2 + max(-1.0, min(1.0, value / (reach or 1.0))) * (width / 2 - 3)

    return (
        f'<svg class="bar {kind}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="0" y2="{height}"/>'
        f'<line class="span" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="7" y2="7"/>'
        f'<circle cx="{across(difference):.1f}" cy="7" r="3"/></svg>'
    )
