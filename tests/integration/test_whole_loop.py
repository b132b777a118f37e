"""The command a user types, from a folder of their own, on real data and real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, QwenImageTransformer2DModel

from common.commit import verify
from common.events import group_balance, read_events
from pipeline.config import load_config
from pipeline.status import read_status, render_status
from policy.rollout_files import read_rollouts
from rewards.groups import build_scorers, score_group

pytestmark = pytest.mark.xdist_group("ray")

OMNIALPHA = str(Path(sys.executable).parent / "omnialpha")


def environment(run: Path) -> dict[str, str]:
    """A clean environment with a mark by which every process of the run can be found."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTEST", "OMP_"))}
    return kept | {"OMNIALPHA_TEST_RUN": str(run)}


def processes_of(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OMNIALPHA_TEST_RUN") == str(run) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until_gone(run: Path) -> None:
    """Ray notices the end of a killed driver by itself: beside other tests that has taken more than 30 s."""
    end = time.monotonic() + 120
    while left := processes_of(run):
        assert time.monotonic() < end, f"still there after 120 s: {left}"
        time.sleep(0.1)


def wait_until(condition, seconds: float, what: str, look_every_s: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(look_every_s)


def command(run: Path, dataset: Path, verb: str = "run") -> list[str]:
    return [OMNIALPHA, verb, "tiny", f"run_dir={run}", f"dataset={dataset}", "cluster.cpus=2"]


def weights_of(run: Path, stage: str) -> dict[str, torch.Tensor]:
    folder = run / stage / "final" / "model"
    kind, part = (AutoencoderKL, "vae") if stage == "vae" else (QwenImageTransformer2DModel, "transformer")
    return kind.from_pretrained(folder, subfolder=part, local_files_only=True).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, real_dataset) -> tuple[Path, subprocess.CompletedProcess]:
    """One whole run, started where the user has folders named like ours that must not be imported."""
    home = tmp_path_factory.mktemp("user")
    for name in ("data", "rewards", "policy", "configs"):
        (home / name).mkdir()
        (home / name / "__init__.py").write_text("raise RuntimeError('the user folder was imported')\n")
    run = home / "mine" / "whole"
    # Relative paths, as a person types them.
    arguments = [*command(Path("mine/whole"), Path(os.path.relpath(real_dataset, home))), "grpo.keep_rollouts=2"]
    done = subprocess.run(arguments, cwd=home, env=environment(run), capture_output=True, text=True, timeout=420)
    return run, done


def test_the_whole_loop_runs_from_a_folder_with_clashing_names(finished):
    _, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all RL tasks | reward |" in done.stdout


def test_every_stage_leaves_a_verifiable_result(finished):
    run, _ = finished
    for stage in ("vae", "sft", "continued", "grpo", "evaluate"):
        verify(run / stage / "final")
    before = weights_of(run, "sft")
    for stage in ("continued", "grpo"):
        after = weights_of(run, stage)
        assert before.keys() == after.keys()
        assert any((before[name] != after[name]).any() for name in before)


def test_the_evaluation_leaves_a_table_results_and_pictures(finished):
    run, _ = finished
    final = run / "evaluate" / "final"
    results = json.loads((final / "results.json").read_text())
    assert results["overall"]["n"] > 0
    assert {"low", "high", "difference", "sft", "continued", "grpo"} <= results["overall"].keys()
    values = pq.read_table(final / "records.parquet")
    assert values.column_names == ["record", "task", "photo", "object", "quantity", "sft", "continued", "grpo"]
    assert set(values["task"].to_pylist()) == results["records"].keys()
    assert results["overall"]["over_continued"].keys() == {"difference", "low", "high"}
    assert {stage: entry["steps"] for stage, entry in results["training"].items()} == {
        "sft": 4,
        "continued": 2,
        "grpo": 4,
    }
    index = json.loads((final / "cells" / "automatic_matting" / "index.json").read_text())
    assert index["columns"] == ["input", "SFT", "SFT continued", "GRPO", "truth"]
    assert "primary, automatic_matting: better than SFT and SFT continued: " in (final / "table.md").read_text()
    assert (final / "table.md").read_text().count("|") > 20
    assert (final / "automatic_matting.png").read_bytes().startswith(b"\x89PNG")
    assert list((final / "cells" / "automatic_matting").glob("*.png"))
    assert f"{results['overall']['difference']:+.4f}" in (run / "report.html").read_text()
    assert list((run / "grpo" / "pictures").glob("*.png"))


def looks(run: Path) -> dict[int, list[dict]]:
    found = [json.loads(path.read_text()) for path in sorted((run / "grpo" / "watch").glob("look-*.json"))]
    return {look["step"]: look["entries"] for look in found}


def test_the_gaming_watch_looked_before_training_and_when_it_was_due(finished):
    run, _ = finished
    assert list(looks(run)) == [0, 2, 4]
    judged = [event["step"] for event in read_events(run / "events.jsonl") if event["event"] == "watch"]
    assert judged == [2, 4]
    assert all(entry["metrics"] for entries in looks(run).values() for entry in entries)


def test_stored_rollouts_are_those_that_were_scored(finished):
    run, _ = finished
    groups = list(read_rollouts(run / "grpo" / "rollouts"))
    assert [(g.group, g.step) for g in groups] == [(f"{step}.{n}", step) for step in (2, 4) for n in range(3)]
    steps = {e["step"]: e for e in read_events(run / "events.jsonl") if e["event"] == "step" and e["stage"] == "grpo"}
    config = load_config("tiny").rewards
    for step in (2, 4):
        scored = [score_group(config, build_scorers(config), g.pixels) for g in groups if g.step == step]
        # Eight bits are stored: the reward is the logged one within what they can move SSIM and PSNR.
        assert np.mean([s.scores_TG.mean() for s in scored]) == pytest.approx(steps[step]["reward"], abs=0.01)


def test_every_launched_group_is_accounted_for(finished):
    balance = group_balance(read_events(finished[0] / "events.jsonl"))
    assert balance["launched"] == 12
    others = sum(count for key, count in balance.items() if key == "trained" or key.startswith("dropped"))
    assert balance["launched"] == others
    assert "in_flight" not in balance


def test_the_first_ratio_is_exactly_one(finished):
    steps = [e for e in read_events(finished[0] / "events.jsonl") if e["event"] == "step" and e["stage"] == "grpo"]
    assert len(steps) == 4
    assert all(step["max_ratio_error"] == 0.0 for step in steps)
    assert all(step["ratio"] == 1.0 for step in steps)


def test_an_uninterrupted_run_rolls_nothing_back(finished):
    assert not [e for e in read_events(finished[0] / "events.jsonl") if e["event"] == "rollback"]


def test_wandb_keeps_an_offline_run(finished):
    assert list((finished[0] / "wandb").glob("offline-run-*/*.wandb"))


def status_of(run: Path) -> str:
    return subprocess.run(
        [OMNIALPHA, "status", str(run)], env=environment(run), check=True, capture_output=True, text=True, timeout=60
    ).stdout


def test_the_status_of_a_finished_run_says_so(finished):
    text = status_of(finished[0])
    assert ": finished, attempt 1, " in text
    assert text.count("done in ") == 5
    assert "12 launched" in text


def test_no_process_is_left(finished):
    run, _ = finished
    wait_until_gone(run)


def test_the_same_command_again_skips_what_is_done(finished, real_dataset):
    run, _ = finished
    again = subprocess.run(
        command(run, real_dataset), env=environment(run), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0
    assert again.stdout.count("done, skipped") == 5


def attempts(run: Path) -> int:
    return sum(event["event"] == "run_started" for event in read_events(run / "events.jsonl"))


def kill_at(run: Path, dataset: Path, stage: str, step: int) -> None:
    """Starts the run and kills the driver with SIGKILL as soon as it reports ``step`` of ``stage``."""
    log = (run.parent / "killed.log").open("a")
    driver = subprocess.Popen(
        command(run, dataset), env=environment(run), stdout=log, stderr=log, start_new_session=True
    )

    def reached() -> bool:
        assert driver.poll() is None, (run.parent / "killed.log").read_text()
        events = read_events(run / "events.jsonl")
        return any(e["event"] == "step" and e["stage"] == stage and e["step"] >= step for e in events)

    wait_until(reached, 240, f"{stage} step {step}")
    assert f"running, attempt {attempts(run)}, process {driver.pid}, " in render_status(read_status(run))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until_gone(run)
    assert "without a word" in render_status(read_status(run))


@pytest.mark.timeout(1200)  # five starts of Ray
def test_a_run_killed_in_every_stage_ends_with_the_weights_of_an_uninterrupted_one(
    finished, tmp_path_factory, real_dataset
):
    run = tmp_path_factory.mktemp("runs") / "killed"
    for stage in ("vae", "sft", "continued", "grpo"):
        kill_at(run, real_dataset, stage, 1 if stage in ("sft", "continued") else 3)
    done = subprocess.run(command(run, real_dataset), env=environment(run), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("vae", "sft", "continued", "grpo"):
        ours, theirs = weights_of(run, stage), weights_of(finished[0], stage)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    ours, theirs = looks(run), looks(finished[0])
    assert ours.keys() == theirs.keys()
    for step in ours:
        assert [e["record"] for e in ours[step]] == [e["record"] for e in theirs[step]]
        assert [e["reward"] for e in ours[step]] == pytest.approx([e["reward"] for e in theirs[step]], abs=1e-5)
    balance = group_balance(read_events(run / "events.jsonl"))
    accounted = sum(count for key, count in balance.items() if key != "launched")
    assert balance["launched"] == accounted
    assert balance["trained"] + sum(v for k, v in balance.items() if k in ("dropped:zero_variance",)) == 12
    assert balance.get("dropped:rolled back", 0) > 0


def test_sigterm_stops_at_a_commit_with_its_exit_code(tmp_path_factory, real_dataset):
    run = tmp_path_factory.mktemp("runs") / "stopped"
    driver = subprocess.Popen(
        [*command(run, real_dataset), "sft.steps=4000", "stop_grace_s=30"],
        env=environment(run),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(
        lambda: any(e["event"] == "step" and e["stage"] == "sft" for e in read_events(run / "events.jsonl")), 240, "sft"
    )
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "stopped in stage 'sft'" in err
    assert "stopped on request, attempt 1" in status_of(run)
    assert "Traceback" not in err
    commits = list((run / "sft").glob("step-*"))
    assert commits
    verify(max(commits))
    wait_until_gone(run)


def test_a_vae_grows_out_of_an_rgb_one_and_all_stages_train_in_bfloat16_where_the_config_asks_for_it(
    tmp_path, real_dataset
):
    run = tmp_path / "run"
    size = "steps: 2, micro_batch: 2, micro_batches: 2, precision: bfloat16"
    stage = f"rgb={{{size}, optimiser: {{lr: 1e-3}}, tasks: {{layer_decomposition: 1}}}}"
    overrides = [stage, "vae.loss.reference=1e-3", "vae.steps=1", "vae.optimiser.warmup=0", "vae.optimiser.lr=1e-6"]
    overrides += ["sft.precision=bfloat16", "sft.steps=1", "vae.loss.perceptual=0.1", "vae.loss.adversarial=0.1"]
    for verb in ("rgb", "vae", "sft"):
        done = subprocess.run(
            [*command(run, real_dataset, verb), *overrides, "vae.ema=0"],
            env=environment(run),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    load = AutoencoderKL.from_pretrained
    rgb, rgba = (
        load(run / stage / "final" / "model", subfolder="vae", local_files_only=True) for stage in ("rgb", "vae")
    )
    assert (rgb.config.in_channels, rgba.config.in_channels) == (3, 4)
    # One step of Adam at 1e-6 moves a weight by about as much: what is not new is still the RGB network's.
    old, new = rgb.state_dict(), rgba.state_dict()
    assert all(float((new[name] - old[name]).abs().max()) < 2e-6 for name in old if new[name].shape == old[name].shape)
    assert float((new["decoder.conv_out.weight"][:3] - old["decoder.conv_out.weight"]).abs().max()) < 2e-6
    step = next(e for e in read_events(run / "events.jsonl") if e["event"] == "step" and e["stage"] == "vae")
    assert step["reference"] == pytest.approx(0, abs=1e-6)  # the encoder is still the one it started from
