"""Each preset of the real base takes a step in every stage, from the command line: all of its settings but those of
size, on a tiny base of the real classes, with real Ray and DeepSpeed on the CPU."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.events import read_events
from pipeline.config import load_config
from policy.folder import starting_policy
from tests.unit.policy.tiny_base import stock_pipeline, write_base

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

OMNIALPHA = str(Path(sys.executable).parent / "omnialpha")
PRESETS = ("gpu_141gb", "node_8x80gb", "cluster_64gpu")
SMALLER = [
    "data.size=32",
    *("sft.steps=1", "sft.micro_batches=2", "sft.lora.rank=2"),
    *("grpo.steps=1", "grpo.prompts=2", "grpo.group=3", "grpo.lora.rank=2"),
    *("grpo.sampling.schedule.steps=4", "grpo.sampling.window.size=2"),
    *("evaluate.records=2", "evaluate.batch=2", "evaluate.schedule.steps=2"),
    *("cluster.learner.actors=2", "cluster.learner.cpus=1", "cluster.learner.gpus=0"),
    *("cluster.reward.actors=1", "cluster.reward.cpus=0.5", "cluster.cpus=4", "tracking.wandb=disabled"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def omnialpha(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST", "OMP_"))}
    return subprocess.run([OMNIALPHA, *arguments], capture_output=True, text=True, timeout=500, env=kept)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_takes_a_step_in_every_stage(preset, base, real_dataset, tmp_path):
    run = tmp_path / "run"
    arguments = [f"run_dir={run}", f"dataset={real_dataset}", f"vae.start={base}", f"sft.start={base}", *SMALLER]
    whole, reduced = load_config(preset), load_config(preset, arguments)
    for stage in ("sft", "grpo"):  # what a preset is about stays
        for name in ("zero_stage", "precision", "gradient_checkpointing", "optimiser", "objective"):
            assert getattr(getattr(reduced, stage), name) == getattr(getattr(whole, stage), name)
        assert getattr(reduced, stage).lora.base_dtype == "bfloat16"

    finished = omnialpha("run", preset, *arguments)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    steps = {event["stage"]: event for event in read_events(run / "events.jsonl") if event["event"] == "step"}
    assert steps.keys() == {"sft", "grpo"}
    assert all(math.isfinite(step["loss"]) and step["max_grad_norm"] > 0 for step in steps.values())
    assert steps["grpo"]["first_ratio_error"] <= reduced.grpo.first_ratio_bound

    exported = omnialpha("export", str(run), str(tmp_path / "out"), "--form", "diffusers")
    assert exported.returncode == 0, exported.stderr
    stock = stock_pipeline(tmp_path / "out").transformer
    ours = starting_policy(run / "grpo" / "final" / "model", None, 0)
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(stock.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
    moved = starting_policy(base, None, 0).state_dict()
    assert any(not torch.equal(moved[name], weight) for name, weight in ours.state_dict().items())
