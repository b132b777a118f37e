"""``omnialpha judge check`` of judges that servers hold, and rewards that ask one, on stored rollouts."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from data.records import RecordDataset
from data.tasks import get_task
from pipeline.cli import main
from policy.group import GroupPixels
from policy.rollout_files import write_rollouts
from tests import openai_server
from tests.openai_server import brightness, serving, status


@pytest.fixture
def server():
    with serving(key="secret") as running:
        running.likes = brightness
        yield running


@pytest.fixture
def python(tmp_path):
    """What is called as vLLM's interpreter is."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {openai_server.__file__} "${{10}}" "$6" "$VLLM_API_KEY"\n')
    path.chmod(0o755)
    return path


def test_a_judge_is_checked_through_its_server(server, real_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    out = tmp_path / "check.json"
    command = ["judge", "check", server.url, str(real_dataset), "--model", "judge", "--key-env", "JUDGE_KEY"]
    assert main([*command, "--records", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "questions without an answer    0\n" in shown
    assert "secret" not in shown + out.read_text()
    found = json.loads(out.read_text())
    # Who likes bright pictures is led astray, and prefers no place.
    assert -1 < found["spearman"][0] < 0.8
    assert found["records"] == 2 * len(RecordDataset(real_dataset, "test").tasks)
    assert {body["model"] for body in server.asked} == {"judge"}
    assert len(server.asked) > 100


def no_process_of(folder: Path) -> bool:
    """Whether every process that names something under ``folder`` ends: a guard does so when it has told the end of its
    server."""
    end = time.monotonic() + 60.0
    while any(str(folder) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_judge_is_served_for_a_check_and_nothing_of_it_is_left(python, real_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model").mkdir()
    command = ["judge", "check", str(tmp_path / "model"), str(real_dataset), "--records", "2"]
    assert main([*command, "--serve", f"python={python}", "cpus=0.5"]) == 0
    assert "questions without an answer    0\n" in capsys.readouterr().out
    assert no_process_of(tmp_path)
    assert not list(tmp_path.glob("omnialpha-judge-*"))


def test_a_server_that_does_not_come_up_says_why_and_leaves_its_log(
    python, real_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model").mkdir()
    python.write_text("#!/bin/sh\necho out of memory\nexit 3\n")
    assert main(["judge", "check", str(tmp_path / "model"), str(real_dataset), "--serve", f"python={python}"]) == 1
    said = capsys.readouterr().err
    assert "it ended with exit code 3 before it was ready" in said
    assert "out of memory" in said
    assert no_process_of(tmp_path)
    assert len(list(tmp_path.glob("omnialpha-judge-*/judge-0.log"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], "--model NAME"),
        (["http://127.0.0.1:9", "--model", "m", "--serve"], "--serve is for a folder"),
        (["folder", "--model", "m"], "are for a server, whose URL has http"),
        (["folder", "--serve", "gpu=true"], "did you mean 'gpus'?"),
        (["./nowhere", "--serve"], "nowhere: no such folder"),
        (["http://127.0.0.1:9", "--model", "m", "--key-env", "NOT_SET"], "environment variable NOT_SET is not set"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_check_that_cannot_be_made_is_one_message(arguments, message, real_dataset, capsys):
    judge, *options = arguments
    assert main(["judge", "check", judge, str(real_dataset), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_served_model_without_vision_is_not_checked(server, real_dataset, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server.script = [status(400)]
    command = ["judge", "check", server.url, str(real_dataset), "--model", "judge", "--key-env", "JUDGE_KEY"]
    assert main(command) == 2
    assert "serve a model with vision" in capsys.readouterr().err


def test_stored_rollouts_are_scored_by_the_judge_that_the_config_names(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    task = get_task("text_to_rgba")
    layers = np.linspace(0, 1, 4, dtype=np.float32)[:, None, None, None, None] * np.ones((4, 1, 4, 16, 16), np.float32)
    layers[:, :, 3] = 1
    group = GroupPixels(
        task=task.name, prompt="Draw a dog.", layers_GLCHW=layers, targets_LCHW=layers[0], inputs=(), name="1.0"
    )
    write_rollouts(tmp_path / "rollouts.parquet", 1, ["1.0"], [group])
    external = {"url": server.url, "model": "judge", "key_env": "JUDGE_KEY"}
    terms = [{"name": "layer"}, {"name": "judge", "tasks": ["text_to_rgba"], "params": {"templates": "small"}}]
    settings = {"base": "tiny", "rewards": {"terms": terms}, "judging": {"external": external}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    command = ["reward", "score", str(tmp_path / "rollouts.parquet"), "--config", str(tmp_path / "mine.yaml")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["terms"]["judge"]
    assert (found["scores"], found["missing"]) == (4, 0)
    assert found["spread"] > 0.05  # brighter members score higher
