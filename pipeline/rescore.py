"""What ``omnialpha reward score`` shows and writes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common.commit import storage_errors, write_atomic
from common.errors import DataError
from common.events import finite
from data.rgba import draw_grid
from policy.rollout_files import read_rollouts
from rewards.groups import Rescored
from rewards.statistics import cluster_mean_interval

SHOWN = 6
"""Samples at either end of a contact sheet."""


def render(result: Rescored) -> list[list[tuple[str, ...]]]:
    """Tables of text: the terms' distributions, their agreement, and why scores are missing.

    Raises:
        DataError: there was nothing to score.
    """
    if not result.terms:
        raise DataError("no stored group has a task that these rewards judge; name others, or other rollouts")
    rows: list[tuple[str, ...]] = [
        ("term", "scores", "mean", "std", "min", "max", "spread in group", "missing", "ms per sample")
    ]
    for name, term in result.terms.items():
        values = np.array(term.values or [np.nan])
        numbers = (values.mean(), values.std(), values.min(), values.max(), np.mean(term.spreads or [np.nan]))
        speed = f"{1000 * term.seconds / term.samples:.1f}"
        rows.append((name, str(len(term.values)), *(f"{x:.4f}" for x in numbers), str(term.missing), speed))
    tables: list[list[tuple[str, ...]]] = [rows]
    if result.agreement:
        agreement: list[tuple[str, ...]] = [("rank correlation within groups", "with", "mean", "95 %", "groups")]
        for (name, other), found in sorted(result.agreement.items()):
            mean, low, high = _over_groups(found)
            agreement.append((name, other, f"{mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]", str(len(found))))
        tables.append(agreement)
    if result.reasons:
        counted = Counter(result.reasons).most_common(5)
        tables.append([("missing because", "times"), *((reason, str(count)) for reason, count in counted)])
    return tables


def write(result: Rescored, rollouts: Path, out: Path) -> list[Path]:
    """Writes ``scores.json`` and, for each term, a sheet with its best and worst samples; returns the paths."""
    written = [out / "scores.json"]
    summary = {
        "terms": {
            name: {"scores": len(t.values), "mean": float(np.mean(t.values)), "missing": t.missing}
            | {"spread": float(np.mean(t.spreads)), "seconds": t.seconds}
            for name, t in result.terms.items()
            if t.values
        },
        "agreement": {
            f"{a} ~ {b}": dict(zip(("mean", "low", "high"), _over_groups(values), strict=True))
            | {"groups": len(values)}
            for (a, b), values in result.agreement.items()
        },
    }
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(written[0], json.dumps(finite(summary), indent=1) + "\n")
    chosen = {name: _ends(entries) for name, entries in result.ranked.items() if entries}
    wanted = {number for entries in chosen.values() for _, number, _ in entries}
    groups = {n: g.pixels for n, g in enumerate(read_rollouts(rollouts)) if n in wanted}
    for name, entries in chosen.items():
        rows, labels = [], []
        for score, number, member in entries:
            pixels = groups[number]
            for layer, truth in enumerate(pixels.targets_LCHW):
                image = torch.tensor(pixels.inputs[0]) if pixels.inputs else None
                rows.append([image, torch.tensor(pixels.layers_GLCHW[member][layer]), torch.tensor(truth)])
                labels.append(f"{score:.4f} {pixels.task}" if not layer else "")
        path = out / f"best-and-worst-{name}.png"
        with storage_errors(path):
            draw_grid(rows, ["input", "sample", "truth"], labels).save(path)
        written.append(path)
    return written


def _over_groups(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval; whole groups are resampled."""
    return cluster_mean_interval(values, [str(number) for number in range(len(values))])


def _ends(entries: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    ordered = sorted(entries, reverse=True)
    return ordered if len(ordered) <= 2 * SHOWN else [*ordered[:SHOWN], *ordered[-SHOWN:]]
