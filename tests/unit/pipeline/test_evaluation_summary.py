"""The table of an evaluation from measured records, without any actor."""

import math
from types import SimpleNamespace

import pytest

from actors.reward import Measured
from benchmarks.seeds import pooled
from common.events import EventLog
from pipeline.config import load_config
from pipeline.evaluate import by_record, comparisons, primary_lines, render_table, summarise, training_time


def records(count: int, task: str):
    return [
        SimpleNamespace(id=f"{task}-{k}", task=task, photo_group=f"photo-{k % 3}", object_groups=(f"object-{k % 4}",))
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


def test_what_each_record_measured_has_the_tables_means_and_names_its_photo_and_object():
    everything = records(12, "automatic_matting") + records(4, "text_to_rgba")
    sft = measured(12, 0.5, 0.7, 0.2) + [Measured({}, {"alpha_mad": 0.3})] * 4
    grpo = measured(12, 0.6, 0.7, 0.1) + [Measured({}, {"alpha_mad": float("nan")})] * 4
    config, policies = load_config("demo"), {"sft": sft, "grpo": grpo}
    rows = by_record(config, everything, policies).to_pylist()
    for entry in summarise(config, everything, policies)["rows"]:
        values = [r for r in rows if (r["task"], r["quantity"]) == (entry["task"], entry["quantity"])]
        whole = [r for r in values if r["grpo"] is not None]
        assert len(values) == (12 if entry["task"] == "automatic_matting" else 4)
        assert len(whole) == entry["n"]
        if whole:
            assert sum(r["grpo"] - r["sft"] for r in whole) / len(whole) == pytest.approx(entry["difference"])
    assert {(r["record"], r["photo"], r["object"]) for r in rows} >= {("text_to_rgba-3", "photo-0", "object-3")}


def test_seeds_are_pooled_by_record_and_only_records_of_every_seed_count():
    def seed(gain, count):
        sft = measured(count, 0.5, 0.7, 0.2)
        grpo = [Measured(m.terms, {"alpha_mad": 0.2 - gain * (1 + k % 2)}) for k, m in enumerate(sft)]
        everything = records(count, "automatic_matting")
        return by_record(load_config("demo"), everything, {"sft": sft, "grpo": grpo}).to_pylist()

    runs = [seed(0.02, 12), seed(0.04, 10), seed(-0.01, 12)]
    mean, low, high = pooled(runs, {"automatic_matting"}, "alpha_mad", "sft")
    assert mean == pytest.approx(-0.05 / 3 * 1.5)
    assert low < mean < high < 0
    assert math.isnan(pooled(runs, {"automatic_matting"}, "soft_iou", "sft")[0])


def test_a_task_without_truth_has_metrics_but_no_reward(results):
    assert not [r for r in results["rows"] if r["task"] == "text_to_rgba" and r["quantity"] == "reward"]
    assert row(results, "text_to_rgba", "alpha_mad")["n"] == 4


def test_the_table_shows_every_row_with_its_interval(results):
    table = render_table(results)
    assert "| all RL tasks | reward |" in table
    assert table.count("\n| ") == len(results["rows"]) + 2


@pytest.fixture(scope="module")
def three():
    """GRPO is better than SFT in alpha MAD, and than SFT continued too in mask matting alone."""
    everything = records(12, "automatic_matting") + records(12, "mask_matting")
    grpo = measured(24, 0.6, 0.7, 0.1)
    sft = measured(24, 0.5, 0.7, 0.2)
    continued = measured(12, 0.55, 0.7, 0.05) + measured(12, 0.55, 0.7, 0.15)
    config = load_config(
        "demo", ["evaluate.primary={automatic_matting: [alpha_mad], mask_matting: [alpha_mad, soft_iou]}"]
    )
    return summarise(config, everything, {"sft": sft, "continued": continued, "grpo": grpo})


def test_with_a_control_every_row_has_both_differences(three):
    assert three["policies"] == ["sft", "continued", "grpo"]
    found = row(three, "automatic_matting", "term/layer")
    assert (found["sft"], found["continued"]) == pytest.approx((0.5055, 0.5555))
    assert found["difference"] == pytest.approx(0.1)
    assert found["over_continued"]["difference"] == pytest.approx(0.05)
    assert found["over_continued"]["low"] == pytest.approx(0.05) == found["over_continued"]["high"]
    assert three["overall"]["over_continued"]["difference"] == pytest.approx(0.031)


def test_a_record_that_one_policy_has_no_score_for_is_left_out_for_all():
    sft, grpo = measured(6, 0.5, 0.7, 0.2), measured(6, 0.6, 0.7, 0.1)
    continued = [*measured(5, 0.55, 0.7, 0.1), Measured({}, {"alpha_mad": 0.1})]
    found = summarise(
        load_config("demo"), records(6, "mask_matting"), {"sft": sft, "continued": continued, "grpo": grpo}
    )
    assert row(found, "mask_matting", "term/layer")["n"] == 5
    assert row(found, "mask_matting", "alpha_mad")["n"] == 6


def test_a_primary_metric_counts_as_improved_only_against_every_other_policy(three):
    assert row(three, "mask_matting", "alpha_mad")["primary"]
    assert "primary" not in row(three, "mask_matting", "term/layer")
    assert comparisons(row(three, "automatic_matting", "alpha_mad")) == {"sft": "better", "continued": "worse"}
    assert primary_lines(three) == [
        "primary, automatic_matting: better than SFT and SFT continued: none; worse than SFT continued: alpha_mad",
        "primary, mask_matting: better than SFT and SFT continued: alpha_mad",
    ]


def test_the_table_with_a_control_has_both_intervals_and_marks_primary_metrics(three):
    results = three | {"training": {"sft": {"steps": 9, "seconds": 3.2}, "grpo": {"steps": 4, "seconds": 5.0}}}
    table = render_table(results)
    head = next(line for line in table.splitlines() if line.startswith("| task"))
    assert head == (
        "| task | quantity | SFT | SFT continued | GRPO | GRPO − SFT | 95 % interval | GRPO − SFT continued "
        "| 95 % interval | n |"
    )
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {11}
    assert "| mask_matting | alpha_mad \\* |" in table
    assert "training steps took: SFT 3 s (9 steps), GRPO 5 s (4 steps)" in table
    assert "- primary, mask_matting: better than SFT" in table


def test_a_primary_metric_whose_interval_includes_zero_is_undecided():
    sft, grpo = measured(12, 0.5, 0.7, 0.2), measured(12, 0.5, 0.7, 0.2)
    found = summarise(load_config("demo"), records(12, "mask_matting"), {"sft": sft, "grpo": grpo})
    assert primary_lines(found) == ["primary, mask_matting: better than SFT: none; undecided: alpha_mad"]


def test_the_table_of_two_policies_names_neither_control_nor_primary_metrics(results):
    table = render_table(results | {"rows": [{**r, "primary": False} for r in results["rows"]]})
    assert "continued" not in table
    assert "| task | quantity | SFT | GRPO | GRPO − SFT | 95 % interval | n |" in table
    assert "primary, " not in table


def test_training_time_counts_the_steps_that_count(tmp_path):
    events = EventLog(tmp_path / "events.jsonl")
    for step in (1, 2, 3):
        events.write("step", stage="sft", step=step, max_seconds=1.0)
    events.write("rollback", stage="sft", to_step=2)
    events.write("step", stage="sft", step=3, max_seconds=0.5)
    events.write("step", stage="vae", step=1, max_seconds=9.0)
    events.write("step", stage="grpo", step=1, sample_s=2.0, train_s=0.25)
    events.close()
    assert training_time(events.path) == {
        "sft": {"steps": 3, "seconds": 2.5},
        "grpo": {"steps": 1, "seconds": 2.2},
    }
