"""``omnialpha judge train``: a stage like the others, on real learner ranks."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.commit import verify
from common.events import read_events
from pipeline.config import load_config
from pipeline.stages import run_stages
from rewards.judge.model import ModelJudge

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("without_ray")]

SETTINGS = (
    "tracking.wandb=disabled",
    "judge.steps=4",
    "judge.commit_every=2",
    "judge.micro_batch=2",
    "judge.micro_batches=2",
    "judge.optimiser.lr=1e-3",
    "judge.tasks.text_to_rgba=1",
    "judge.tasks.automatic_matting=1",
    "judge.objective.network.vision_layers=1",
    "judge.objective.network.layers=1",
    "judge.objective.network.heads=1",
    "judge.objective.network.vision_heads=1",
)


def train(run_dir, dataset):
    config = load_config("tiny", [*SETTINGS, f"run_dir={run_dir}", f"dataset={dataset}"])
    run_stages(config, ("judge",))
    return verify(run_dir / "judge" / "final")


def test_a_judge_is_trained_committed_and_the_same_when_it_is_resumed(tmp_path, real_dataset):
    made = train(tmp_path / "run", real_dataset)
    assert made.facts["seed"] == load_config("tiny").seed
    assert made.facts["templates"] == "small"
    weights = (made.path / "model" / "model.safetensors").read_bytes()
    picture = Image.new("RGB", (128, 128), "grey")
    answer = ModelJudge(made.path / "model").ask("draw . Draw a dog. grade ?", [picture], ("1", "2"))
    assert sum(answer.values()) == pytest.approx(1)

    # A run that dies before its result is committed goes on from its last commit, and hands on the same judge.
    shutil.rmtree(made.path)
    again = train(tmp_path / "run", real_dataset)
    assert (again.path / "model" / "model.safetensors").read_bytes() == weights
    steps = [event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert steps == [1, 2, 3, 4]  # none was trained again


def test_two_runs_of_one_seed_train_the_same_judge_up_to_rounding(tmp_path, real_dataset):
    # Not to the bit: the whitening that the patch embedding starts from is the linear algebra library's, which rounds
    # differently from process to process.
    first, second = (
        load_file(train(tmp_path / name, real_dataset).path / "model" / "model.safetensors") for name in ("a", "b")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name].float(), value.float(), atol=1e-2, rtol=1e-2)
