"""Reward actors: they pull decoded groups as soon as they exist and return small arrays. They also draw pictures,
so that pixels never pass through the driver."""

import asyncio
import json
import math
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from actors.cluster import ClusterConfig
from actors.crew import Crew, Notify, Work, unheard
from actors.devices import own_device
from actors.isolation import ScorerPool, isolated_terms
from actors.rollout import Group
from actors.waiting import wait_futures
from common.commit import storage_errors
from common.errors import OmniAlphaError
from common.role_logs import recorded
from data.rgba import draw_grid, encode_png, layer_rows
from data.tasks import get_task
from policy.group import GroupPixels
from policy.rollout_files import read_rollouts, write_rollouts
from rewards.base import Scores, build, reward_batch
from rewards.combine import RewardConfig, active_terms
from rewards.groups import GroupScores, join_scores, score_terms
from rewards.judge.protocols import Verdict
from rewards.judge.served import judging_term, served_terms
from rewards.judge.term import Judge
from rewards.metrics import sample_metrics
from rewards.set_features import Cloud, layer_features


@dataclass(frozen=True)
class Measured:
    """One evaluated record: raw reward terms and quality metrics."""

    terms: dict[str, float]
    metrics: dict[str, float]
    reasons: tuple[str, ...] = ()
    """Why scores are missing."""
    features: Cloud = ()
    """Of the predicted layers, where they were asked for."""
    truth: Cloud = ()
    """Of the true layers."""


@dataclass(frozen=True)
class MeasuredHere:
    """One evaluated record as a reward actor knows it: isolated terms are still missing."""

    name: str
    scores: list[Scores]
    metrics: dict[str, float]
    features: tuple[Cloud, Cloud] = ((), ())
    """Of the predicted and the true layers."""


@recorded
class RewardActor:
    """Scores groups by the terms that share its process; made into a Ray actor by :class:`RewardPool`."""

    def __init__(self, config: RewardConfig, threads: int, gpus: float = 0.0) -> None:
        torch.set_num_threads(threads)
        self._config, self._device = config, own_device(gpus)
        self._scorers = {t.name: build(t.source, t.params) for t in config.terms if not t.own_process}

    def score(self, pixels: GroupPixels, cells: int | None = None) -> list[Scores]:
        """Scores every member of a group by the terms active for its task; with ``cells`` their contributions too."""
        return score_terms(self._config, self._scorers, pixels, self._device, cells)

    def store(self, path: Path, step: int, names: Sequence[str], *groups: GroupPixels) -> None:
        """Writes groups to a file of stored rollouts."""
        with storage_errors(path):
            write_rollouts(path, step, names, groups)

    def measure(self, groups: Sequence[GroupPixels], features: bool) -> list[MeasuredHere]:
        """Scores and measures groups of one (evaluation), with ``features`` for distances of whole sets."""
        measured = []
        for pixels in groups:
            scores = self.score(pixels) if active_terms(self._config, pixels.task) else []
            roles = get_task(pixels.task).targets
            layers, targets = torch.tensor(pixels.layers_GLCHW[0]), torch.tensor(pixels.targets_LCHW)
            clouds = (layer_features(layers), layer_features(targets)) if features else ((), ())
            measured.append(MeasuredHere(pixels.name, scores, sample_metrics(roles, layers, targets), clouds))
        return measured

    def compare(
        self, task: str, first: Sequence[GroupPixels], second: Sequence[GroupPixels]
    ) -> list[Verdict | OmniAlphaError]:
        """Has the run's judge compare two policies' samples of the same records of one task."""
        term = judging_term(self._config, task)
        assert term
        judge = Judge(**term.params)  # here, wherever the term itself scores: who asks needs no large model
        return judge.compare([reward_batch(p) for p in first], [reward_batch(p) for p in second])

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
        rows = _rows(pixels, list(pixels.layers_GLCHW[:members]))
        count = len(rows[0]) - 2
        titles = ["input", *(f"sample {k}" for k in range(count)), "truth"]
        _save(path, draw_grid(rows, titles, [pixels.prompt, *([""] * (len(rows) - 1))]))

    def draw_comparison(self, path: Path, titles: Sequence[str], rows: int, *runs: list[GroupPixels]) -> None:
        """PNG: input | one column per run | truth, for the first records; one row per layer.

        In ``cells/<name of the PNG>/`` beside it: the same images one by one with their alpha, and an index.
        """
        grid, prompts, layers = list[list[torch.Tensor | None]](), list[str](), list[str]()
        for groups in list(zip(*runs, strict=True))[:rows]:
            first, roles = groups[0], get_task(groups[0].task).targets
            grid += _rows(first, [group.layers_GLCHW[0] for group in groups])
            prompts += [first.prompt] * len(roles)
            layers += roles
        columns = ["input", *titles, "truth"]
        _save(path, draw_grid(grid, columns, prompts))
        _save_cells(path.parent / "cells" / path.stem, grid, columns, prompts, layers)


def _rows(pixels: GroupPixels, stacks: Sequence[np.ndarray]) -> list[list[torch.Tensor | None]]:
    inputs, drawn = ([torch.tensor(image) for image in images] for images in (pixels.inputs, stacks))
    return layer_rows(inputs, drawn, torch.tensor(pixels.targets_LCHW))


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


@dataclass(frozen=True)
class Scoring:
    """What is being scored: by a reward actor, and by isolated terms at the same time."""

    name: str
    shared: Work
    """What a reward actor finds."""
    own: Future[Any] | None
    """What the isolated terms find; None where there are none."""


class RewardPool:
    """All reward actors, which are replaced when they die, and the processes of isolated terms."""

    def __init__(
        self, config: ClusterConfig, rewards: RewardConfig, notify: Notify = unheard, strict: Collection[str] = ()
    ) -> None:
        """
        Args:
            config: where the actors live.
            rewards: what they score by.
            notify: hears of losses and replacements of reward actors.
            strict: terms of which no score may be missing.

        Raises:
            OmniAlphaError: an actor does not start, or a scorer cannot be built.
        """
        role, isolated = config.reward, isolated_terms(rewards)
        self._config, self._strict = rewards, frozenset(strict)
        judges = ", ".join(dict.fromkeys(term.params["asker"].name for term in served_terms(rewards)))
        self._asked = f" (the judge {judges} is asked; logs/reward-*.log say what it answers)" if judges else ""
        actor = ray.remote(num_cpus=role.cpus, num_gpus=role.gpus)(RewardActor)
        self.crew = Crew(
            "reward",
            lambda: actor.remote(rewards, role.threads, role.gpus),
            role.actors,
            replacements=config.replacements,
            deadline_s=config.deadline_s,
            notify=notify,
            spares=role.spares,
        )
        self._scorers = ScorerPool(isolated, config.deadline_s) if isolated else None
        self.crew.begin()

    def close(self) -> None:
        """Ends the processes of isolated terms."""
        if self._scorers:
            self._scorers.close()

    def score(self, group: Group, cells: int | None = None) -> Scoring:
        """Submits a group by reference; ``cells`` asks for local credit on such a grid."""
        scorers = self._scorers
        own = scorers.run(self._score_isolated(scorers, group, cells)) if scorers else None
        return Scoring(group.request.name, self.crew.ask(lambda a: a.score.remote(group.pixels, cells)), own)

    def scores(self, groups: Sequence[Scoring]) -> list[GroupScores]:
        """Waits for the scores of groups.

        Raises:
            RewardError: a score is missing and the policy is ``fail``; an isolated term lost process after process.
            ClusterError: an actor failed, or took too long.
        """
        return [
            join_scores(self._config, [*shared, *own], f"group {group.name}", self._strict)
            for group, shared, own in zip(groups, *self._wait(groups, "reward actors: scores"), strict=True)
        ]

    def measure(self, task: str, count: Any, pixels: Any, features: bool = False) -> Scoring:
        """Submits evaluation groups of one task by reference; with ``features`` their clouds are measured too."""
        scorers = self._scorers
        own = scorers.run(self._measure_isolated(scorers, task, count, pixels)) if scorers else None
        return Scoring(task, self.crew.ask(lambda a: a.measure.remote(pixels, features)), own)

    def measured(self, chunks: Sequence[Scoring], what: str) -> list[Measured]:
        """Waits for evaluated records; raises as :meth:`scores`."""
        measured = []
        for shared, own in zip(*self._wait(chunks, what), strict=True):
            for number, here in enumerate(shared):
                scores = [*here.scores, *(own[number] if own else ())]
                joined = join_scores(self._config, scores, f"record {here.name}", self._strict) if scores else None
                terms = dict(zip(joined.terms, joined.scores_TG[:, 0].tolist(), strict=True)) if joined else {}
                measured.append(Measured(terms, here.metrics, joined.reasons if joined else (), *here.features))
        return measured

    def _wait(self, scorings: Sequence[Scoring], what: str) -> tuple[list[Any], list[Any]]:
        what += self._asked
        shared = self.crew.wait([scoring.shared for scoring in scorings], what)
        own = [scoring.own for scoring in scorings if scoring.own]
        return shared, wait_futures(own, f"{what} of isolated terms") if own else [[] for _ in scorings]

    async def _score_isolated(self, scorers: ScorerPool, group: Group, cells: int | None) -> list[Scores]:
        meta = await group.meta  # small, and there as soon as the pixels are
        active, members = self._active(meta.task), group.request.members
        return await scorers.score(active, group.pixels, members, meta.name, cells=cells)

    async def _measure_isolated(self, scorers: ScorerPool, task: str, count: Any, pixels: Any) -> list[list[Scores]]:
        active, records = self._active(task), range(await count)
        return await asyncio.gather(*(scorers.score(active, pixels, 1, f"{task} {k}", k) for k in records))

    def _active(self, task: str) -> list[str]:
        return [self._config.terms[k].name for k in active_terms(self._config, task)]

    def compare(self, task: str, first: Any, second: Any) -> Work:
        """Submits two policies' evaluation groups of the same records by reference."""
        return self.crew.ask(lambda a: a.compare.remote(task, first, second))

    def compared(self, works: Sequence[Work], what: str) -> list[Verdict | OmniAlphaError]:
        """Waits for comparisons, in the records' order; raises as :meth:`scores`."""
        return [verdict for verdicts in self.crew.wait(works, what + self._asked) for verdict in verdicts]

    def store(self, path: Path, step: int, names: Sequence[str], pixels: Sequence[Any]) -> Work:
        """Stores groups by reference."""
        return self.crew.ask(lambda a: a.store.remote(path, step, names, *pixels))

    def keep(self, path: Path, pixels: Any) -> Work:
        """Stores evaluation groups by reference, to compare later ones with."""
        return self.crew.ask(lambda a: a.keep.remote(path, pixels))

    def draw_change(self, path: Path, rows: int, kept: Path, pixels: Any) -> Work:
        """Draws evaluation groups beside those kept earlier into a PNG."""
        return self.crew.ask(lambda a: a.draw_change.remote(path, rows, kept, pixels))

    def draw_group(self, path: Path, pixels: Any) -> Work:
        """Draws a group into a PNG."""
        return self.crew.ask(lambda a: a.draw_group.remote(path, pixels))

    def draw_comparison(self, path: Path, titles: Sequence[str], rows: int, *runs: Any) -> Work:
        """Draws evaluation groups of several runs side by side into a PNG, and each image into a file of its own."""
        return self.crew.ask(lambda a: a.draw_comparison.remote(path, titles, rows, *runs))

    def wait(self, works: Sequence[Work], what: str) -> None:
        """Waits for files to be written."""
        self.crew.wait(works, what)
