"""The table of an evaluation from measured records, without any actor."""

from types import SimpleNamespace

import pytest

from actors.reward import Measured
from pipeline.config import load_config
from pipeline.evaluate import render_table, summarise


def records(count: int, task: str):
    return [
        SimpleNamespace(task=task, photo_group=f"photo-{k % 3}", object_groups=(f"object-{k % 4}",))
        for k in range(count)
    ]


def measured(count: int, layer: float, boundary: float | None, mad: float):
    terms = {"layer": layer} | ({} if boundary is None else {"boundary": boundary})
    return [Measured({k: v + 0.001 * n for k, v in terms.items()}, {"alpha_mad": mad}) for n in range(count)]


@pytest.fixture(scope="module")
def results():
    everything = records(12, "automatic_matting") + records(12, "object_removal") + records(4, "text_to_rgba")
    sft = measured(12, 0.5, 0.7, 0.2) + measured(12, 0.4, None, 0.0) + [Measured({}, {"alpha_mad": 0.3})] * 4
    grpo = measured(12, 0.6, 0.7, 0.1) + measured(12, 0.4, None, 0.0) + [Measured({}, {"alpha_mad": 0.3})] * 4
    return summarise(load_config("demo"), everything, {"sft": sft, "grpo": grpo})


def row(results, task: str, quantity: str) -> dict:
    return next(r for r in results["rows"] if r["task"] == task and r["quantity"] == quantity)


def test_differences_are_paired_and_signed_grpo_minus_sft(results):
    assert row(results, "automatic_matting", "term/layer")["difference"] == pytest.approx(0.1)
    assert row(results, "automatic_matting", "alpha_mad")["difference"] == pytest.approx(-0.1)
    assert row(results, "object_removal", "reward")["difference"] == pytest.approx(0.0, abs=1e-12)


def test_the_reward_is_the_mean_of_the_tasks_own_terms(results):
    assert row(results, "automatic_matting", "reward")["difference"] == pytest.approx(0.05)


def test_the_overall_row_covers_the_tasks_of_the_rl_mix_only(results):
    assert results["overall"]["n"] == 24
    assert results["overall"]["difference"] == pytest.approx(0.025)
    assert results["overall"]["low"] <= 0.025 <= results["overall"]["high"]


def test_a_task_without_truth_has_metrics_but_no_reward(results):
    assert not [r for r in results["rows"] if r["task"] == "text_to_rgba" and r["quantity"] == "reward"]
    assert row(results, "text_to_rgba", "alpha_mad")["n"] == 4


def test_the_table_shows_every_row_with_its_interval(results):
    table = render_table(results)
    assert "| all RL tasks | reward |" in table
    assert table.count("\n| ") == len(results["rows"]) + 2
