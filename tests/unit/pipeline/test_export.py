"""``omnialpha export``: a policy to hand on, and the record of how it came about."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from common.commit import begin, commit, verify
from common.events import EventLog
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.export import LOGGED_STEPS
from policy import folder
from policy.dit import DitConfig, build_dit
from policy.folder import load_transformer, load_vae, save_policy, shipped_policies
from policy.vae import VaeConfig, build_vae, set_latent_statistics


def make_run(root: Path, steps: int = 3, start: Path | None = None) -> Path:
    """What a run leaves behind once its SFT stage is done."""
    run = root / "run"
    vae = build_vae(VaeConfig(channels=(8, 16), latent_channels=4, norm_groups=4), 0)
    set_latent_statistics(vae, torch.zeros(4), torch.ones(4))
    final = run / "sft" / "final"
    temporary = begin(final)
    save_policy(
        temporary / "model", vae, build_dit(DitConfig(layers=1, heads=1, head_dim=12, rope_axes=(4, 4, 4)), 4, 16, 0)
    )
    commit(temporary, final, {"step": steps})
    config = load_config("tiny", [f"run_dir={run}", "seed=7", *([f"vae.start={start}"] if start else [])])
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (run / "dataset").mkdir()
    (run / "dataset" / "manifest.json").write_text('{"content_digest": "abc"}')
    log = EventLog(run / "events.jsonl", 1)
    for step in [*range(1, steps + 1), steps]:  # the last one was trained twice, as after a kill
        log.write("step", stage="sft", step=step, loss=1.0 / step)
    log.write("stage_seconds", stage="sft", seconds=2.5)
    log.close()
    return run


def test_an_exported_policy_loads_and_is_the_runs_own_in_the_dtype_asked_for(tmp_path):
    run, out = make_run(tmp_path), tmp_path / "out"
    assert main(["export", str(run), str(out), "--dtype", "bfloat16"]) == 0
    with safe_open(out / "transformer" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    source = run / "sft" / "final" / "model"
    for load in (load_transformer, load_vae):
        theirs, ours = load(source).state_dict(), load(out).state_dict()
        assert all(torch.equal(theirs[name].bfloat16().float(), ours[name]) for name in theirs)
    assert load_vae(out).config.latents_std == [1.0] * 4
    verify(out)


def test_the_training_record_holds_seed_config_manifest_and_log_and_no_folder_of_the_machine(tmp_path):
    run, out = make_run(tmp_path), tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    text = (out / "training.json").read_text()
    record = json.loads(text)
    assert record["stage"] == "sft"
    assert record["seed"] == 7
    assert record["config"]["sft"]["steps"] == 4
    assert record["data"] == {"content_digest": "abc"}
    assert [row["step"] for row in record["log"]["sft"]] == [1, 2, 3]
    assert record["seconds_of_the_last_attempt"] == {"sft": 2.5}
    assert str(tmp_path) not in text


def test_the_record_of_a_policy_that_was_trained_on_holds_that_of_the_one_it_started_from(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["export", str(make_run(tmp_path / "a")), str(first)]) == 0
    assert main(["export", str(make_run(tmp_path / "b", steps=5, start=first)), str(second)]) == 0
    record = json.loads((second / "training.json").read_text())
    assert record["start"] == json.loads((first / "training.json").read_text())
    assert record["start"]["start"] is None
    assert len(record["log"]["sft"]) == 5


def test_a_long_log_is_thinned_and_keeps_its_last_step(tmp_path):
    run, out = make_run(tmp_path, steps=2 * LOGGED_STEPS + 1), tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    steps = [row["step"] for row in json.loads((out / "training.json").read_text())["log"]["sft"]]
    assert len(steps) <= LOGGED_STEPS
    assert steps[-1] == 2 * LOGGED_STEPS + 1


@pytest.mark.parametrize("spoil", ["nothing there", "other stage", "target exists", "damaged", "diffusers", "lora"])
def test_an_export_that_cannot_be_done_is_one_message_and_leaves_nothing(tmp_path, capsys, spoil):
    run, out = make_run(tmp_path), tmp_path / "out"
    arguments, words = ["export", str(run), str(out)], "grpo, sft"
    if spoil == "nothing there":
        arguments[1] = str(tmp_path)
    elif spoil == "other stage":
        arguments, words = [*arguments, "--stage", "grpo"], "no finished stage out of grpo"
    elif spoil == "target exists":
        out.mkdir()
        words = "exists; remove it"
    elif spoil == "diffusers":
        arguments, words = (
            [*arguments, "--form", spoil],
            "no pipeline of diffusers opens it: its VAE is an AutoencoderKL where",
        )
    elif spoil == "lora":
        arguments, words = [*arguments, "--form", spoil], "there is no LoRA"
    else:
        path = run / "sft" / "final" / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        words = "bytes, not"
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert not list(out.glob("*"))


def test_a_policy_that_comes_with_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setattr(folder, "SHIPPED", tmp_path / "shipped")
    assert main(["export", str(run), str(tmp_path / "shipped" / "small")]) == 0
    assert shipped_policies() == {"small": tmp_path / "shipped" / "small"}
    config = load_config("tiny", ["vae.start=small", "sft.start=small"])
    assert config.vae.start == config.sft.start == tmp_path / "shipped" / "small"
    assert load_config("tiny", ["vae.start=other"]).vae.start == Path("other").resolve()
