"""GRPO on text-to-RGBA with a judge behind HTTP, on real actors and learner ranks; what stands where vLLM would is
tests/openai_server.py."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError, DeadlineError, RewardError, UnansweredError
from common.events import group_balance, read_events
from pipeline.config import load_config
from pipeline.stages import run_stages
from tests import openai_server
from tests.integration.policies import write_policy
from tests.integration.test_judge_pool import processes, until
from tests.openai_server import brightness, serving, status

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("without_ray")]

STEPS, PROMPTS, MEMBERS = 2, 2, 3
OTHER_TASKS = ("automatic_matting", "mask_matting", "referring_matting", "object_removal", "layer_decomposition")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def train(tmp_path, policy, real_dataset):
    """Runs GRPO with a ``judging`` section; gives the run's folder."""

    def run(judging: dict, params: dict | None = None, stages: tuple[str, ...] = ("grpo",), **cluster) -> Path:
        grpo = {"steps": STEPS, "prompts": PROMPTS, "group": MEMBERS, "start": str(policy), "watch": {"every": 0}}
        settings = {
            "base": "tiny",
            "name": "judged",
            "run_dir": str(tmp_path / "run"),
            "dataset": str(real_dataset),
            "tracking": {"wandb": "disabled"},
            "cluster": {"cpus": 2, "object_store_mib": 128, "learner": {"actors": 1}, "rollout": {"actors": 1}}
            | cluster,
            "grpo": grpo | {"tasks": {"text_to_rgba": 1, **dict.fromkeys(OTHER_TASKS, 0)}},
            "rewards": {
                "terms": [
                    {"name": "judge", "tasks": ["text_to_rgba"], "params": {"templates": "small"} | (params or {})}
                ]
            },
            "judging": judging,
        }
        (tmp_path / "judged.yaml").write_text(yaml.safe_dump(settings))
        run_stages(load_config(str(tmp_path / "judged.yaml")), stages)
        return tmp_path / "run"

    return run


def steps_of(run: Path) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == "step"]


def interpreter(folder: Path) -> Path:
    """What is called as vLLM's interpreter is: -m MODULE --model M --served-model-name NAME --host H --port PORT ..."""
    python = folder / "python"
    python.write_text(
        f"#!/bin/sh\nexec {sys.executable} {openai_server.__file__} "
        f'"${{10}}" "$6" "$VLLM_API_KEY" {folder} {folder / "lives"}\n'
    )
    python.chmod(0o755)
    return python


def test_a_run_whose_judge_is_killed_three_times_trains_on_every_group_and_leaves_no_process(train, tmp_path):
    (tmp_path / "model").mkdir()
    server = {"model": str(tmp_path / "model"), "python": str(interpreter(tmp_path)), "cpus": 0.1}
    run = train({"server": server, "missing": "wait"})

    assert (tmp_path / "lives").read_text() == "xxxx"
    events = read_events(run / "events.jsonl")
    assert group_balance(events) == {"launched": STEPS * PROMPTS, "trained": STEPS * PROMPTS}
    assert [step["missing_scores"] for step in steps_of(run)] == [0] * STEPS
    assert 0 < steps_of(run)[-1]["term/judge/text_to_rgba"] < 1
    assert steps_of(run)[-1]["judge/restarts"] == 3
    assert steps_of(run)[-1]["judge/running"] == 3.0  # of the server's own page
    assert "starting" in (run / "judging" / "judge-0.log").read_text()
    until(lambda: not processes(tmp_path))  # a guard ends when it has told the end of its server
    (described,) = (event["terms"] for event in events if event["event"] == "scorers")
    assert described == {"judge": "model, pointwise, templates small"}


def test_with_drop_a_group_that_a_busy_judge_did_not_score_is_left_out_with_its_reason(train):
    with serving() as server:
        server.likes = brightness
        server.script = [None, *[status(503)] * MEMBERS]  # the first question comes from the driver, as a check
        external = {"url": server.url, "model": "judge"}
        run = train({"external": external, "missing": "drop", "client": {"patience_s": 0.0}})
    balance = group_balance(read_events(run / "events.jsonl"))
    assert balance == {
        "launched": STEPS * PROMPTS,
        "trained": STEPS * PROMPTS - 1,
        "dropped:below_min_group": 1,
    }
    first = steps_of(run)[0]
    assert first["missing_scores"] == MEMBERS
    ((reason, count),) = first["missing_because"].items()
    assert count == MEMBERS
    assert "status 503: out of order" in reason


def test_with_fail_a_judge_that_does_not_answer_ends_the_run_with_one_message(train, tmp_path):
    with serving() as server:
        server.script = [None, *[status(503)] * 99]
        external = {"url": server.url, "model": "judge"}
        with pytest.raises(RewardError) as caught:
            train({"external": external, "missing": "fail", "client": {"patience_s": 0.5}})
    message = str(caught.value)
    assert "reward 'judge' has no score for member 0" in message
    assert "status 503: out of order" in message
    assert "\n" not in message
    balance = group_balance(read_events(tmp_path / "run" / "events.jsonl"))
    assert balance == {"launched": PROMPTS, "in_flight": PROMPTS}


def test_a_judge_that_falls_silent_under_wait_ends_the_run_by_its_name(train, tmp_path):
    with serving() as server:
        server.script = [None, *[status(503)] * 9999]
        with pytest.raises(UnansweredError, match=r"the judge judge has answered nothing for .* status 503"):
            train({"external": {"url": server.url, "model": "judge"}, "missing": "wait"}, deadline_s=90.0)


def test_the_evaluation_rates_single_samples_of_a_grid_and_compares_the_policies(train):
    with serving() as server:
        server.likes = lambda body: 0.7 if len(body["messages"][0]["content"]) > 3 else brightness(body)
        external = {"url": server.url, "model": "judge"}
        run = train({"external": external}, {"protocol": "grid"}, stages=("grpo", "evaluate"))
    results = json.loads((run / "evaluate" / "final" / "results.json").read_text())
    (rated,) = (r for r in results["rows"] if (r["task"], r["quantity"]) == ("text_to_rgba", "term/judge"))
    assert 0 < rated["sft"] < 1
    (duel,) = results["duels"]
    assert (duel["task"], duel["against"], duel["n"]) == ("text_to_rgba", "sft", rated["n"])
    assert "the judge's comparisons" in (run / "evaluate" / "final" / "table.md").read_text()


def launched(run: Path) -> list[dict]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == "group_launched"]


def test_a_model_without_vision_ends_the_run_before_anything_is_sampled(train, tmp_path):
    with serving() as server:
        server.script = [status(400)]
        with pytest.raises(ConfigError, match="serve a model with vision"):
            train({"external": {"url": server.url, "model": "judge"}})
    assert not launched(tmp_path / "run")


def test_a_server_that_does_not_come_up_ends_the_run_with_its_last_lines(train, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of memory\nexit 3\n")
    broken.chmod(0o755)
    (tmp_path / "model").mkdir()
    with pytest.raises(DeadlineError, match=r"(?s)exit code 3 before it was ready.*out of memory"):
        train({"server": {"model": str(tmp_path / "model"), "python": str(broken), "cpus": 0.1}})
    assert not launched(tmp_path / "run")
