"""Small run folders, written with the project's own functions, and report pages as a browser would see them."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml

from actors.reward import RewardActor
from common.commit import begin, commit, write_atomic
from common.events import EventLog
from pipeline.config import load_config
from pipeline.report_data import environment
from policy.group import GroupPixels

HOSTILE = "<script>alert(1)</script> a \"cat\" & 'dog' <img src=x onerror=alert(2)>"
ROWS = [
    {"task": "automatic_matting", "quantity": "reward", "sft": 0.1 + 0.2, "grpo": 0.41, "low": 0.01, "high": 0.2},
    {"task": "automatic_matting", "quantity": "alpha_mad", "sft": 1 / 3, "grpo": 0.2, "low": -0.2, "high": -0.1},
    {"task": "object_removal", "quantity": "psnr_white", "sft": 20.123456, "grpo": 19.0, "low": -2.0, "high": -0.5},
    {"task": "object_removal", "quantity": "rgb_l1", "sft": 0.11, "grpo": 0.12, "low": -0.01, "high": 0.03},
    {"task": "object_removal", "quantity": "soft_iou", "sft": None, "grpo": None, "n": 0},
]


class Page(HTMLParser):
    """Elements with their attributes and text, as a browser would see them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.results: list[list[tuple[dict[str, str], str]]] = []
        self._in_results = False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attributes = {key: value or "" for key, value in attrs}
        self.elements.append((tag, attributes))
        if tag == "table":
            self._in_results = "results" in attributes.get("class", "")
        elif tag == "tr" and self._in_results:
            self.results.append([])
        elif tag == "td" and self._in_results:
            self.results[-1].append((attributes, ""))

    def handle_data(self, data):
        self.text.append(data)
        if self._in_results and self.results and self.results[-1]:
            attributes, before = self.results[-1][-1]
            self.results[-1][-1] = (attributes, before + data)

    def handle_endtag(self, tag):
        if tag == "table":
            self._in_results = False

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, task: str, quantity: str) -> list[tuple[dict[str, str], str]]:
        return next(row for row in self.results if [text for _, text in row[:2]] == [task, quantity])


def pixels(prompt: str, size: int = 16, task: str = "automatic_matting", seed: int = 0) -> GroupPixels:
    image = np.random.default_rng(seed).random((4, size, size), dtype=np.float32)
    return GroupPixels("1.0", task, prompt, image[None, None], image[None] * 0.5, (image * 0.25,))


def results_of(offset: float = 0.0) -> dict:
    rows = [
        {"difference": row["grpo"] - row["sft"] + offset, "n": 60, **row} if row["sft"] is not None else row
        for row in ROWS
    ]
    overall = {"quantity": "reward", "sft": 0.47, "grpo": 0.49, "difference": 0.0193 + offset} | {"n": 296}
    return {"split": "test", "overall": overall | {"low": 0.0115, "high": 0.0271}, "rows": rows}


def make_run(
    folder: Path,
    grpo_steps: int = 6,
    finished: bool = True,
    prompt: str = "Cut out the cat.",
    cells: bool = True,
    size: int = 16,
    offset: float = 0.0,
    overrides: tuple[str, ...] = (),
    results: dict | None = None,
) -> Path:
    config = load_config("tiny", [f"run_dir={folder}", "grpo.steps=6", "tracking.wandb=disabled", *overrides])
    write_atomic(folder / "identity.json", json.dumps(config.identity(), indent=1, sort_keys=True) + "\n")
    write_atomic(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    sources = [{"name": "photos", "kind": "photo", "version": "1.2", "licence": HOSTILE}]
    counts = {"train": {"automatic_matting": 1014}, "test": {"automatic_matting": 144}}
    write_atomic(folder / "dataset" / "manifest.json", json.dumps({"sources": sources, "counts": counts}))
    events = EventLog(folder / "events.jsonl", attempt=1)
    events.write("run_started", config=config.identity_hash(), pid=1)
    events.write("environment", **environment())
    for stage in ("vae", "sft", "continued"):
        events.write("stage_started", stage=stage)
        for step in range(1, 5):
            events.write("step", stage=stage, step=step, loss=1.0 / step, max_grad_norm=2.0, max_seconds=0.25)
        events.write("stage_done", stage=stage)
        events.write("stage_seconds", stage=stage, seconds=12.5)
        made = begin(folder / stage / "final")
        (made / "weights").write_text(stage)
        commit(made, folder / stage / "final", {"step": 4, "config": config.identity_hash()})
    events.write("stage_started", stage="grpo")
    for step in range(1, grpo_steps + 1):
        events.write("group_launched", stage="grpo", step=step, group=f"{step}.0", task="automatic_matting")
        values = {
            "reward": 0.3 + step / 100 + offset,
            "term/layer": 0.25,
            "reward/automatic_matting": 0.5,
            "ratio": 1.0,
        }
        values |= {
            f"term/{HOSTILE.partition('/')[0]}": 0.1,
            "clipped": 0.0,
            "approx_kl": 0.0,
            "max_grad_norm": 0.1,
            "reward_spread": 0.02,
        }
        values |= {"sample_s": 3.0, "train_s": 2.0, "missing_scores": 1, "missing_because": {f"boundary: {HOSTILE}": 1}}
        events.write("step", stage="grpo", step=step, **values)
        dropped = {"reason": "zero_variance"} if step == 2 else {}
        events.write(
            "group_dropped" if dropped else "group_trained", stage="grpo", step=step, group=f"{step}.0", **dropped
        )
    if finished:
        events.write("stage_done", stage="grpo")
        events.write("stage_seconds", stage="grpo", seconds=33.0)
        made = begin(folder / "grpo" / "final")
        (made / "weights").write_text("grpo")
        commit(made, folder / "grpo" / "final", {"step": 6, "config": config.identity_hash()})
        made = begin(folder / "evaluate" / "final")
        (made / "results.json").write_text(json.dumps(results or results_of(offset)))
        pair = [[pixels(prompt, size, seed=seed)] for seed in (1, 2)]
        RewardActor(config.rewards, 1).draw_comparison(made / "automatic_matting.png", ["SFT", "GRPO"], 4, *pair)
        if not cells:
            shutil.rmtree(made / "cells")
        commit(made, folder / "evaluate" / "final", {"step": 0, "config": config.identity_hash()})
        events.write("stage_done", stage="evaluate")
    events.close()
    return folder
