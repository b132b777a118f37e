"""Learner ranks that sample themselves, in a run from the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from common.events import group_balance, read_events
from pipeline.config import load_config
from policy.folder import load_transformer
from tests.integration.policies import write_policy

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]

OMNIALPHA = str(Path(sys.executable).parent / "omnialpha")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy"))


def run(folder: Path, policy: Path, dataset: Path, *settings: str) -> list[dict]:
    own = [f"run_dir={folder}", f"dataset={dataset}", f"grpo.start={policy}", "cluster.cpus=2"]
    finished = subprocess.run(
        [OMNIALPHA, "run", "tiny", *own, "tracking.wandb=disabled", *settings],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return read_events(folder / "events.jsonl")


def results(events: list[dict]) -> dict:
    (evaluated,) = [e for e in events if e["event"] == "evaluated"]
    return {key: value for key, value in evaluated.items() if key != "time"}


def test_a_run_whose_ranks_sample_ends_with_the_weights_and_the_results_of_one_with_rollout_actors(
    policy, real_dataset, tmp_path
):
    ways = {"apart": [], "together": ["cluster.colocated=true", "cluster.offload=true"]}
    events = {
        way: run(tmp_path / way, policy, real_dataset, "grpo.zero_stage=3", *settings) for way, settings in ways.items()
    }
    weights = {way: load_transformer(tmp_path / way / "grpo" / "final" / "model").state_dict() for way in ways}
    assert all(torch.equal(weights["apart"][name], value) for name, value in weights["together"].items())
    assert results(events["apart"]) == results(events["together"])
    assert group_balance(events["apart"]) == group_balance(events["together"])
    looks = [sorted((tmp_path / way / "grpo" / "watch").glob("look-*.json")) for way in ways]
    assert len(looks[0]) > 1
    assert [a.read_text() for a in looks[0]] == [b.read_text() for b in looks[1]]
    logs = {path.stem for path in (tmp_path / "together" / "logs").glob("*.log")}
    assert "learner-1" in logs
    assert not any(name.startswith("rollout") for name in logs)


def test_ranks_that_sample_cannot_be_asked_to_train_meanwhile():
    with pytest.raises(ConfigError, match=r"cluster.colocated: ranks that sample .* set grpo.max_staleness to 0"):
        load_config("tiny", ["cluster.colocated=true", "grpo.max_staleness=1"])
