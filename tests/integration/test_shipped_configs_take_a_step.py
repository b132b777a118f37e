"""Each shipped config that is no preset of the real base takes a step in all of its stages, from the command line: all
of its settings but those of size, with real Ray and DeepSpeed."""

import json
import math
from pathlib import Path

import pytest

from common.commit import verify
from common.events import read_events
from pipeline.config import shipped_configs
from pipeline.export import record_of_the_start
from tests.integration.test_judge_in_a_run import interpreter
from tests.integration.test_presets_take_a_step import PRESETS, omnialpha
from tests.integration.tiny_vlm import save_tiny_vlm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

COMMON = ["data.size=32", "tracking.wandb=disabled", "cluster.cpus=2", "cluster.object_store_mib=256"]
VAE = ["vae.steps=1", "vae.micro_batch=2", "vae.micro_batches=2"]
SFT = ["sft.steps=1", "sft.micro_batch=2", "sft.micro_batches=2"]
GRPO = [
    "grpo.steps=1",
    "grpo.prompts=2",
    "grpo.group=3",
    "grpo.sampling.schedule.steps=4",
    "grpo.sampling.window.size=2",
]
WATCH = ["grpo.watch.every=1", "grpo.watch.records=2"]
EVALUATE = ["evaluate.records=2", "evaluate.batch=2", "evaluate.schedule.steps=2", "evaluate.draws=100"]
JUDGE = ["judge.steps=1", "judge.micro_batch=2", "judge.micro_batches=2"]
RUNS = {
    "scratch": [*VAE, *SFT, *GRPO, "grpo.supervised={weight: 0.1, micro_batches: 2}", *WATCH, *EVALUATE],
    "tiny": [*VAE, *SFT, *GRPO, "continued.steps=1", *WATCH, *EVALUATE],
    "demo": [*SFT, *GRPO, "continued.steps=1", *WATCH, *EVALUATE],
}
STAGES = {
    "scratch": {"vae", "sft", "grpo"},
    "tiny": {"vae", "sft", "continued", "grpo"},
    "demo": {"sft", "continued", "grpo"},
}


def test_every_shipped_config_is_run_here_or_with_the_presets():
    others = {"demo-base", "demo-base-more", "demo-judge", "judge-small", "judge-small-more", "judge-qwen2.5-vl-7b"}
    assert {Path(name).name for name in shipped_configs()} == RUNS.keys() | others | set(PRESETS)


def steps(run: Path) -> dict[str, dict]:
    """The one step of each stage."""
    taken = [event for event in read_events(run / "events.jsonl") if event["event"] == "step"]
    assert len({event["stage"] for event in taken}) == len(taken)
    assert all(math.isfinite(event["loss"]) and event["max_grad_norm"] > 0 for event in taken)
    return {event["stage"]: event for event in taken}


def command(*arguments: str) -> None:
    done = omnialpha(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_config_takes_a_step_in_every_stage(name, real_dataset, tmp_path):
    run = tmp_path / "run"
    command("run", name, f"run_dir={run}", f"dataset={real_dataset}", *COMMON, *RUNS[name])
    assert steps(run).keys() == STAGES[name]
    assert (run / "report.html").is_file()


def test_the_demo_with_a_judge_takes_a_step(real_dataset, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "model").mkdir()
    judge = [f"judging.server.model={tmp_path / 'model'}", f"judging.server.python={interpreter(tmp_path)}"]
    mix = [
        "grpo.tasks={text_to_rgba: 1, automatic_matting: 0, mask_matting: 0, referring_matting: 0, object_removal: 0}"
    ]
    mix += ["grpo.tasks.layer_decomposition=0"]
    settings = [*COMMON, *SFT, *GRPO, *WATCH, *EVALUATE, *judge, *mix]
    command("run", "demo-judge", f"run_dir={run}", f"dataset={real_dataset}", *settings)
    taken = steps(run)
    assert 0 < taken["grpo"]["term/judge/text_to_rgba"] < 1
    assert -1 < taken["grpo"]["term/prompt_fidelity/text_to_rgba"] < 1


def test_the_base_of_the_demo_is_trained_in_its_two_halves(real_dataset, tmp_path):
    first, more = tmp_path / "first", tmp_path / "more"
    settings = [
        f"dataset={real_dataset}",
        *COMMON,
        *VAE,
        *SFT,
        "rgb.steps=1",
        "rgb.micro_batch=2",
        "rgb.micro_batches=2",
    ]
    for verb in ("rgb", "vae", "sft"):
        command(verb, "demo-base", f"run_dir={first}", *settings)
    assert steps(first).keys() == {"rgb", "vae", "sft"}
    command("export", str(first), str(tmp_path / "exported"), "--stage", "sft")
    start = [f"vae.start={tmp_path / 'exported'}", f"sft.start={tmp_path / 'exported'}"]
    for verb in ("vae", "sft"):
        command(verb, "demo-base-more", f"run_dir={more}", *settings[:1], *COMMON, *VAE, *SFT, *start)
    assert steps(more).keys() == {"vae", "sft"}


@pytest.mark.parametrize("name", ["judge-small", "judge-qwen2.5-vl-7b"])
def test_a_judge_takes_a_step(name, real_dataset, tmp_path):
    settings = [*COMMON, *JUDGE, f"run_dir={tmp_path / 'run'}", f"dataset={real_dataset}"]
    if name != "judge-small":
        model = save_tiny_vlm(tmp_path / "model")
        settings += [f"judge.objective.model={model}", "judge.objective.lora.rank=2"]
        settings += ["cluster.learner={actors: 2, cpus: 0.5, threads: 1, gpus: 0}"]
    command("judge", "train", name, *settings)
    assert steps(tmp_path / "run").keys() == {"judge"}
    assert (tmp_path / "run" / "judge" / "final" / "model" / "config.json").is_file()


def test_the_second_half_of_the_small_judge_starts_from_the_first_and_its_record_has_both(real_dataset, tmp_path):
    first, more, halves = tmp_path / "first", tmp_path / "more", [tmp_path / "half", tmp_path / "whole"]
    settings = [*COMMON, *JUDGE, f"dataset={real_dataset}"]
    command("judge", "train", "judge-small", *settings, f"run_dir={first}")
    command("export", str(first), str(halves[0]), "--stage", "judge")
    command("judge", "train", "judge-small-more", *settings, f"run_dir={more}", f"judge.objective.model={halves[0]}")
    command("export", str(more), str(halves[1]), "--stage", "judge")
    record = json.loads((verify(halves[1]).path / "training.json").read_text())
    assert (record["config"]["name"], record["start"]["config"]["name"]) == ("judge-small-more", "judge-small")
    assert record["start"]["start"] is None
    assert {path.name for path in halves[0].iterdir()} == {path.name for path in halves[1].iterdir()}
    straight = {"judge": {"objective": {"model": str(first / "judge" / "final" / "model")}}}
    assert record_of_the_start(straight, "judge") == record["start"]


def test_the_record_of_sft_has_nothing_of_a_later_stages_start():
    config = {"grpo": {"start": "run/sft/final/model"}, "sft": {"start": None}, "vae": {"start": None}}
    assert record_of_the_start(config, "sft") is None
