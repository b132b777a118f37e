"""The judge's comparison of two policies: a reward actor's own code in this process, and a real HTTP server."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from actors.reward import RewardActor
from common.errors import RewardError
from pipeline.config import RunConfig, load_config
from pipeline.duels import duels, lines
from pipeline.evaluate import TITLES
from pipeline.measure import HeldOut
from policy.group import GroupPixels
from rewards.judge.client import FixedEndpoints, JudgeClient, JudgeClientConfig
from rewards.judge.exchange import Endpoint
from rewards.judge.served import judging_term, with_judge
from tests.openai_server import brighter, serving, status
from tests.unit.pipeline.report_runs import Page, make_run, results_of

RECORDS = 6
CHUNKS = (("automatic_matting", (0, 1)), ("text_to_rgba", (2, 3, 4)), ("text_to_rgba", (5, 6, 7)))


class Here:
    """What a pool of reward actors does, without processes: works are their own results."""

    def __init__(self, rewards):
        self._actor = RewardActor(rewards, threads=1)

    def compare(self, task, first, second):
        return self._actor.compare(task, first, second)

    def compared(self, works, what):
        return [verdict for verdicts in works for verdict in verdicts]


@pytest.fixture
def server():
    with serving() as running:
        running.likes = brighter()
        yield running


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    judge = {"name": "judge", "tasks": ["text_to_rgba"], "params": {"templates": "small", "protocol": "grid"}}
    tree = {"base": "tiny", "rewards": {"terms": [{"name": "layer"}, judge]}}
    tree["judging"] = {"external": {"url": "http://127.0.0.1:9", "model": "judge"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return load_config("mine.yaml", ["evaluate.draws=200"])


def held() -> HeldOut:
    records = tuple(
        SimpleNamespace(id=f"r{k}", task=task, prompt=f"Draw number {k}.", photo_group="", object_groups=(f"o{k}",))
        for task, places in CHUNKS
        for k in places
    )
    return HeldOut("test", CHUNKS, records)


def samples(level):
    """Pixels of every chunk as a policy would leave them, the brighter the higher the ``level`` of a record."""
    return [
        [
            GroupPixels(
                f"r{k}",
                task,
                f"Draw number {k}.",
                np.full((1, 1, 4, 64, 64), level(k), np.float32),
                np.full((1, 4, 64, 64), 0.5, np.float32),
                () if task == "text_to_rgba" else (np.full((4, 64, 64), 0.5, np.float32),),
            )
            for k in places
        ]
        for task, places in CHUNKS
    ]


def found(config, server, grpo, patience_s=30.0, **bases):
    client = JudgeClientConfig(patience_s=patience_s, backoff_s=0.01, concurrency=2)
    asker = JudgeClient(FixedEndpoints((Endpoint(server.url, "judge"),)), client)
    return duels(config, Here(with_judge(config.rewards, asker)), held(), {**bases, "grpo": grpo})


def test_the_policy_whose_samples_the_judge_likes_better_wins_on_the_tasks_that_it_judges(config, server):
    bright, dark = samples(lambda k: 0.9), samples(lambda k: 0.3)
    (entry,) = found(config, server, bright, sft=dark)
    assert (entry["task"], entry["against"], entry["n"], entry["missing"]) == ("text_to_rgba", "sft", RECORDS, {})
    assert (entry["win"][0], entry["tie"][0], entry["loss"][0]) == (1.0, 0.0, 0.0)
    assert entry["preference"][1] > 0.5
    assert entry["position_bias"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert len(server.asked) == 2 * RECORDS
    (other,) = found(config, server, dark, sft=bright)
    assert other["loss"][0] == 1.0
    assert other["preference"][0] == pytest.approx(-entry["preference"][0])


def test_every_other_policy_is_compared_with(config, server):
    middle = samples(lambda k: 0.5)
    sft, continued = found(config, server, middle, sft=samples(lambda k: 0.2), continued=samples(lambda k: 0.8))
    assert (sft["against"], sft["win"][0]) == ("sft", 1.0)
    assert (continued["against"], continued["loss"][0]) == ("continued", 1.0)


def test_a_leaning_to_one_place_is_told_and_decides_nothing(config, server):
    server.likes = brighter(first_place=3.0)
    (entry,) = found(config, server, samples(lambda k: 0.5), sft=samples(lambda k: 0.5))
    assert entry["tie"][0] == 1.0
    assert entry["position_bias"][1] > 0.5
    assert entry["preference"][0] == pytest.approx(0, abs=1e-6)


def test_the_least_sure_pairs_are_named(config, server):
    (entry,) = found(config, server, samples(lambda k: 0.2 + 0.1 * k), sft=samples(lambda k: 0.2 + 0.05 * k))
    assert [pair["record"] for pair in entry["least_sure"]] == ["r2", "r3", "r4"]
    assert entry["least_sure"][0]["prompt"] == "Draw number 2."


def test_a_comparison_that_lacks_an_answer_is_counted_with_its_reason_and_not_as_a_tie(config, server):
    server.script = [status(503)]
    (entry,) = found(config, server, samples(lambda k: 0.9), patience_s=0.0, sft=samples(lambda k: 0.3))
    assert entry["n"] == RECORDS - 1
    assert entry["win"][0] == 1.0
    ((reason, count),) = entry["missing"].items()
    assert count == 1
    assert "status 503" in reason


def test_with_fail_a_missing_comparison_ends_the_evaluation(config, server):
    strict = config.model_copy(update={"judging": config.judging.model_copy(update={"missing": "fail"})})
    server.script = [status(503)]
    with pytest.raises(RewardError, match=r"1 of 6 comparisons by the judge are missing.*status 503.*missing: drop"):
        found(strict, server, samples(lambda k: 0.9), patience_s=0.0, sft=samples(lambda k: 0.3))


def test_without_any_answer_there_is_an_entry_that_says_so(config, server):
    server.script = [status(503)] * 99
    (entry,) = found(config, server, samples(lambda k: 0.9), patience_s=0.0, sft=samples(lambda k: 0.3))
    assert entry["n"] == 0
    assert sum(entry["missing"].values()) == RECORDS
    assert "| text_to_rgba | SFT | – | – | – | – | – | 0 | 6 |" in lines([entry], TITLES)


def test_it_can_be_switched_off(config, server):
    off = config.model_copy(update={"judging": config.judging.model_copy(update={"compare": False})})
    assert found(off, server, samples(lambda k: 0.9), sft=samples(lambda k: 0.3)) == []
    assert found(config.model_copy(update={"judging": None}), server, samples(lambda k: 0.9), sft=[]) == []
    assert not server.asked
    assert judging_term(config.rewards, "automatic_matting") is None
    assert off.identity_hash() != config.identity_hash()
    assert config.identity()["judging"] == {"model": "judge"}  # runs from before the switch can be resumed


def test_the_table_and_the_report_show_the_comparisons(config, server, tmp_path):
    compared = found(config, server, samples(lambda k: 0.9), sft=samples(lambda k: 0.3))
    table = lines(compared, TITLES)
    assert table[-1].startswith("| text_to_rgba | SFT | 1.000 [1.000, 1.000] | 0.000 [0.000, 0.000] |")
    assert {line.count("|") for line in table if line.startswith("|")} == {10}
    assert lines([], TITLES) == []

    from pipeline.report import write_report

    folder = make_run(tmp_path / "run", results=results_of() | {"duels": compared})
    shown = " ".join(Page(write_report([folder], tmp_path / "page.html").read_text()).text)
    assert "The judge's comparisons" in shown
    assert "1.000 [1.000, 1.000]" in shown
    assert "Draw number 2." in shown
