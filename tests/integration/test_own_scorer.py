"""The documented scorer, ten lines of Python and three of YAML, in a whole run beside one that hangs and one that
crashes."""

import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from common.events import group_balance, read_events
from tests.integration.test_whole_loop import OMNIALPHA, environment, wait_until_gone

pytestmark = pytest.mark.xdist_group("ray")

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"


def documented(marker: str) -> str:
    blocks = re.findall(r"(?:^    .*\n)+", DOCUMENT.read_text(), re.MULTILINE)
    (block,) = [block for block in blocks if marker in block]
    return textwrap.dedent(block)


BAD = """
import os, time

def opacity(batch):
    return batch.layers_GLCHW[:, 0, 3].mean(dim=(1, 2))

def hangs(batch):
    if batch.task == "object_removal":
        time.sleep(600)
    return opacity(batch)

def crashes(batch):
    if batch.task == "mask_matting":
        os._exit(1)
    return opacity(batch)
"""


@pytest.fixture
def home(tmp_path) -> Path:
    """A user's folder, with folders in it named like ours that must not be imported."""
    for name in ("data", "rewards", "policy", "actors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user folder was imported')\n")
    (tmp_path / "bad.py").write_text(BAD)
    return tmp_path


def test_a_documented_scorer_trains_beside_one_that_hangs_and_one_that_crashes(home, real_dataset):
    code, yaml = documented("def thin_alpha"), documented("- name: thin_alpha")
    assert len(code.splitlines()) <= 10
    assert len(yaml.splitlines()) == 3
    (home / "thin_alpha.py").write_text(code)
    yaml = yaml.replace("/shared/", "")
    bad = "- {name: crashes, scorer: 'bad.py:crashes'}\n- {name: hangs, scorer: 'bad.py:hangs', deadline_s: 3}\n"
    terms = textwrap.indent("- {name: layer}\n" + yaml + bad, "    ")
    (home / "mine.yaml").write_text(f"base: tiny\nrewards:\n  terms:\n{terms}")
    run = home / "run"
    tasks = "grpo.tasks={mask_matting: 1, automatic_matting: 3, object_removal: 1}"
    command = [OMNIALPHA, "run", "mine.yaml", "run_dir=run", f"dataset={real_dataset}", "cluster.cpus=2", tasks]
    done = subprocess.run(
        [*command, "vae.steps=2", "sft.steps=2", "grpo.steps=2", "evaluate.records=2"],
        cwd=home,
        env=environment(run),
        capture_output=True,
        text=True,
        timeout=420,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    steps = [e for e in read_events(run / "events.jsonl") if e["event"] == "step" and e["stage"] == "grpo"]
    assert len(steps) == 2
    assert all(0 <= step["term/thin_alpha"] <= 1 and step["term/layer"] > 0 for step in steps)
    balance = group_balance(read_events(run / "events.jsonl"))
    assert balance["launched"] == sum(count for key, count in balance.items() if key != "launched")
    missing = (run / "evaluate" / "final" / "results.json").read_text()
    assert '"term/thin_alpha"' in missing
    assert "hangs: no answer within 3 s (deadline_s)" in done.stdout + done.stderr
    assert "crashes: its process ended" in done.stdout + done.stderr
    wait_until_gone(run)


def test_a_scorer_that_cannot_be_imported_ends_the_run_before_its_first_stage(home, real_dataset):
    (home / "mine.yaml").write_text(
        "base: tiny\nrewards:\n  terms:\n    - {name: layer}\n    - {name: far, scorer: 'not_there:score'}\n"
    )
    run = home / "run"
    done = subprocess.run(
        [OMNIALPHA, "run", "mine.yaml", "run_dir=run", f"dataset={real_dataset}", "cluster.cpus=2"],
        cwd=home,
        env=environment(run),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "omnialpha: reward term 'far': reward module 'not_there' cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [e for e in read_events(run / "events.jsonl") if e["event"] == "stage_started"]
    wait_until_gone(run)
