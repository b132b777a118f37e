"""Reward actors: they pull decoded groups as soon as they exist and return small arrays. They also draw pictures,
so that pixels never pass through the driver."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image

from actors.cluster import ClusterConfig
from actors.waiting import wait_all
from common.commit import storage_errors
from data.rgba import draw_grid, encode_png
from data.tasks import get_task
from policy.group import GroupPixels
from policy.rollout_files import read_rollouts, write_rollouts
from rewards.combine import RewardConfig, active_terms
from rewards.groups import GroupScores, build_scorers, score_group
from rewards.metrics import sample_metrics


@dataclass(frozen=True)
class Measured:
    """One evaluated record: raw reward terms and quality metrics."""

    terms: dict[str, float]
    metrics: dict[str, float]
    reasons: tuple[str, ...] = ()
    """Why scores are missing."""


class RewardActor:
    """Scores groups; made into a Ray actor by :class:`RewardPool`."""

    def __init__(self, config: RewardConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self._config = config
        self._scorers = build_scorers(config)

    def score(self, pixels: GroupPixels) -> GroupScores:
        """Scores every member of a group by the terms active for its task."""
        return score_group(self._config, self._scorers, pixels)

    def store(self, path: Path, step: int, names: Sequence[str], *groups: GroupPixels) -> None:
        """Writes groups to a file of stored rollouts."""
        with storage_errors(path):
            write_rollouts(path, step, names, groups)

    def measure(self, groups: Sequence[GroupPixels]) -> list[Measured]:
        """Scores and measures groups of one (evaluation)."""
        measured = []
        for pixels in groups:
            terms: dict[str, float] = {}
            reasons: tuple[str, ...] = ()
            if active_terms(self._config, pixels.task):
                result = self.score(pixels)
                terms = {name: float(value) for name, value in zip(result.terms, result.scores_TG[:, 0], strict=True)}
                reasons = result.reasons
            roles = get_task(pixels.task).targets
            layers, targets = torch.tensor(pixels.layers_GLCHW[0]), torch.tensor(pixels.targets_LCHW)
            measured.append(Measured(terms, sample_metrics(roles, layers, targets), reasons))
        return measured

    def keep(self, path: Path, groups: list[GroupPixels]) -> None:
        """Writes groups of one for :meth:`draw_change`."""
        with storage_errors(path):
            write_rollouts(path, 0, [group.name for group in groups], groups)

    def draw_change(self, path: Path, rows: int, kept: Path, groups: list[GroupPixels]) -> None:
        """PNG and cells as :meth:`draw_comparison` draws them: input | kept earlier | now | truth."""
        before = [stored.pixels for stored in read_rollouts(kept)]
        self.draw_comparison(path, ["before", "now"], rows, before, groups)

    def draw_group(self, path: Path, pixels: GroupPixels, members: int = 6) -> None:
        """PNG: inputs, the first members and the truth; one row per layer."""
        rows = []
        for layer, truth in enumerate(pixels.targets_LCHW):
            image = torch.tensor(pixels.inputs[min(layer, len(pixels.inputs) - 1)]) if pixels.inputs else None
            drawn = [torch.tensor(member[layer]) for member in pixels.layers_GLCHW[:members]]
            rows.append([image, *drawn, torch.tensor(truth)])
        count = len(rows[0]) - 2
        titles = ["input", *(f"sample {k}" for k in range(count)), "truth"]
        _save(path, draw_grid(rows, titles, [pixels.prompt, *([""] * (len(rows) - 1))]))

    def draw_comparison(self, path: Path, titles: Sequence[str], rows: int, *runs: list[GroupPixels]) -> None:
        """PNG: input | one column per run | truth, for the first records; one row per layer.

        In ``cells/<name of the PNG>/`` beside it: the same images one by one with their alpha, and an index.
        """
        grid, prompts, layers = [], [], []
        for groups in list(zip(*runs, strict=True))[:rows]:
            first = groups[0]
            for layer, truth in enumerate(first.targets_LCHW):
                image = torch.tensor(first.inputs[min(layer, len(first.inputs) - 1)]) if first.inputs else None
                outputs = [torch.tensor(group.layers_GLCHW[0][layer]) for group in groups]
                grid.append([image, *outputs, torch.tensor(truth)])
                prompts.append(first.prompt)
                layers.append(get_task(first.task).targets[layer])
        columns = ["input", *titles, "truth"]
        _save(path, draw_grid(grid, columns, prompts))
        _save_cells(path.parent / "cells" / path.stem, grid, columns, prompts, layers)


def _save(path: Path, picture: Image.Image) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


CELL = 256
"""Largest side of a stored cell: enough to judge an edge, and a hundred of them stay a small folder."""


def _save_cells(
    folder: Path,
    grid: Sequence[Sequence[torch.Tensor | None]],
    columns: Sequence[str],
    prompts: Sequence[str],
    layers: Sequence[str],
) -> None:
    """The cells of a grid as RGBA PNGs, equal ones once, and ``index.json`` that says which lies where."""
    names: dict[bytes, str] = {}
    rows = []
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for images, prompt, layer in zip(grid, prompts, layers, strict=True):
            pngs = [image if image is None else encode_png(_reduced(image)) for image in images]
            for png in pngs:
                if png is not None and png not in names:
                    names[png] = f"{len(names):03}.png"
                    (folder / names[png]).write_bytes(png)
            cells = [png if png is None else names[png] for png in pngs]
            rows.append({"prompt": prompt, "layer": layer, "cells": cells})
        (folder / "index.json").write_text(json.dumps({"columns": list(columns), "rows": rows}, indent=1) + "\n")


def _reduced(image_4HW: torch.Tensor) -> torch.Tensor:
    """The image, averaged down by a whole factor where it exceeds :data:`CELL`."""
    factor = math.ceil(max(image_4HW.shape[1:]) / CELL)
    if factor == 1:
        return image_4HW
    # Premultiplied, so that colours hidden under alpha 0 do not bleed into visible pixels.
    premultiplied = torch.cat([image_4HW[:3] * image_4HW[3:], image_4HW[3:]])
    small = torch.nn.functional.avg_pool2d(premultiplied[None], factor, ceil_mode=True)[0]
    return torch.cat([torch.where(small[3:] > 0, small[:3] / small[3:].clamp(min=1e-6), 0.0), small[3:]])


class RewardPool:
    """All reward actors."""

    def __init__(self, config: ClusterConfig, rewards: RewardConfig) -> None:
        role = config.reward
        self._deadline = config.deadline_s
        actor = ray.remote(num_cpus=role.cpus)(RewardActor)
        self.actors = [actor.remote(rewards, role.threads) for _ in range(role.actors)]
        wait_all([a.__ray_ready__.remote() for a in self.actors], "reward actors to start", self._deadline)
        self._next = 0

    def score(self, pixels: Any) -> Any:
        """Submits a group by reference; it is scored as soon as it exists."""
        return self._pick().score.remote(pixels)

    def store(self, path: Path, step: int, names: Sequence[str], pixels: Sequence[Any]) -> Any:
        """Stores groups by reference."""
        return self._pick().store.remote(path, step, names, *pixels)

    def measure(self, pixels: Any) -> Any:
        """Submits evaluation groups by reference."""
        return self._pick().measure.remote(pixels)

    def keep(self, path: Path, pixels: Any) -> Any:
        """Stores evaluation groups by reference, to compare later ones with."""
        return self._pick().keep.remote(path, pixels)

    def draw_change(self, path: Path, rows: int, kept: Path, pixels: Any) -> Any:
        """Draws evaluation groups beside those kept earlier into a PNG."""
        return self._pick().draw_change.remote(path, rows, kept, pixels)

    def draw_group(self, path: Path, pixels: Any) -> Any:
        """Draws a group into a PNG."""
        return self._pick().draw_group.remote(path, pixels)

    def draw_comparison(self, path: Path, titles: Sequence[str], rows: int, *runs: Any) -> Any:
        """Draws evaluation groups of several runs side by side into a PNG, and each image into a file of its own."""
        return self._pick().draw_comparison.remote(path, titles, rows, *runs)

    def _pick(self) -> Any:
        self._next += 1
        return self.actors[self._next % len(self.actors)]
