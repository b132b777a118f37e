"""What a batch of rollouts becomes: optimiser steps, their checks, and one record."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.learner import Item
from actors.rollout import Weights
from common.errors import NumericsError
from common.events import read_events
from pipeline.config import load_config
from pipeline.grpo import TrainingBatch, check_first_ratio, merge_records, portions, report, update
from pipeline.run import Run

KEY = (1, 7)


def items(count: int) -> list[Item]:
    return [Item(f"trajectory {k}", count=6, cost=1.0, calls=2, extra=k, name=f"group 1.{k}") for k in range(count)]


def names(parts: list[list[Item]]) -> list[list[str]]:
    return [[item.name for item in part] for part in parts]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(1, 4), st.tuples(st.integers(0, 9), st.integers(0, 99)))
def test_every_epoch_holds_every_group_exactly_once_in_shares_of_nearly_one_size(count, minibatches, epochs, key):
    parts = portions(items(count), minibatches, epochs, key)
    steps = min(minibatches, count)
    assert len(parts) == steps * epochs
    for epoch in range(epochs):
        mine = parts[epoch * steps : (epoch + 1) * steps]
        assert Counter(item for part in names(mine) for item in part) == Counter(i.name for i in items(count))
        sizes = [len(part) for part in mine]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


def test_a_single_update_trains_on_all_groups_in_their_own_order():
    assert portions(items(9), 1, 1, KEY) == [items(9)]
    assert portions(items(1), 5, 1, KEY) == [items(1)]


def test_with_more_minibatches_than_groups_each_group_has_an_update_of_its_own():
    assert [len(part) for part in portions(items(3), 8, 2, KEY)] == [1] * 6


def test_groups_travel_whole_with_their_advantages():
    batch = items(6)
    assert {id(item) for part in portions(batch, 3, 1, KEY) for item in part} == {id(item) for item in batch}


def test_the_order_is_the_same_for_the_same_key_and_another_for_another_step_seed_or_epoch():
    def orders(key: tuple[int, int], epochs: int = 1) -> list[list[str]]:
        return names(portions(items(12), 2, epochs, key))

    assert orders(KEY) == orders(KEY)
    assert orders((1, 8)) != orders(KEY)
    assert orders((2, 7)) != orders(KEY)
    assert orders((7, 1)) != orders(KEY)
    first, second = orders(KEY, epochs=2)[:2], orders(KEY, epochs=2)[2:]
    assert first == orders(KEY)  # more epochs do not change those before
    assert second != first


def test_records_of_several_updates_become_means_maxima_and_the_first_ratio_error():
    merged = merge_records(
        [
            {"lr": 1e-4, "loss": 1.0, "ratio": 1.0, "max_ratio_error": 1e-8, "max_grad_norm": 3.0},
            {"lr": 3e-4, "loss": -2.0, "ratio": 1.1, "max_ratio_error": 0.3, "max_grad_norm": 1.0},
            {"lr": 2e-4, "loss": 4.0, "ratio": 1.2, "max_ratio_error": 0.2, "max_grad_norm": 2.0},
        ]
    )
    assert merged == pytest.approx(
        {
            "lr": 2e-4,
            "loss": 1.0,
            "ratio": 1.1,
            "max_ratio_error": 0.3,
            "max_grad_norm": 3.0,
            "first_ratio_error": 1e-8,
            "updates": 3,
        }
    )


def test_a_record_without_ratios_has_no_first_ratio_error():
    assert merge_records([{"lr": 1e-4, "drift": 0.5}]) == {"lr": 1e-4, "drift": 0.5, "updates": 1}


@pytest.mark.parametrize("error", [0.0, 1e-7, 1e-6])
def test_a_first_ratio_within_the_bound_passes(error):
    check_first_ratio(error, 1e-6, step=3)


@pytest.mark.parametrize(
    ("error", "shown"), [(2e-4, "2.00e-04"), (1.0001e-6, "1.00e-06"), (math.inf, "inf"), (math.nan, "nan")]
)
def test_a_first_ratio_beyond_the_bound_or_unknown_stops_and_says_by_how_much(error, shown):
    with pytest.raises(NumericsError, match=rf"step 3: the first ratio is off by {shown}.*1\.0e-06"):
        check_first_ratio(error, 1e-6, step=3)


class Recorder:
    """Takes the learner's calls down and answers with given ratio errors; None answers without a ratio."""

    def __init__(self, *errors: float | None, recomputed: float = 0.0) -> None:
        self.calls: list[tuple] = []
        self.bounds: list[float | None] = []
        self._errors, self._recomputed = iter(errors), recomputed

    def begin_batch(self, sampled_by: Weights | None) -> None:
        self.calls.append(("begin", *([sampled_by.version] if sampled_by else [])))

    def recompute(self, batch: list[Item]) -> tuple[list[Item], float]:
        self.calls.append(("recompute", *(item.payload for item in batch)))
        return [replace(item, payload=f"fresh {item.payload}") for item in batch], self._recomputed

    def train(self, step: int, part: list[Item], ratio_bound: float | None = None) -> dict[str, float]:
        self.bounds.append(ratio_bound)
        self.calls.append(("train", step, *(item.payload for item in part)))
        error = next(self._errors)
        return {"loss": 1.0} | ({} if error is None else {"ratio": 1.0, "max_ratio_error": error})

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


def version(number: int) -> Weights:
    return Weights(number, "digest", "index", "buffer")


def run_with(*overrides: str) -> SimpleNamespace:
    return SimpleNamespace(config=load_config("tiny", overrides))


def test_a_batch_begins_once_and_every_group_is_trained_on_in_every_epoch():
    learner = Recorder(0.0, 0.1, 0.2, 0.3)
    record = update(run_with("grpo.minibatches=2", "grpo.epochs=2"), learner, 5, items(4), version(5))
    assert learner.names() == ["begin", "train", "train", "train", "train"]
    assert {call[1] for call in learner.calls[1:]} == {5}
    counts = Counter(payload for call in learner.calls[1:] for payload in call[2:])
    assert counts == {f"trajectory {k}": 2 for k in range(4)}
    assert record["updates"] == 4


def test_only_the_first_update_must_find_the_policy_that_sampled():
    learner = Recorder(1e-9, 0.4, 0.3)
    record = update(run_with("grpo.minibatches=3", "grpo.first_ratio_bound=1e-2"), learner, 0, items(3), version(0))
    assert learner.bounds == [1e-2, None, None]
    assert (record["first_ratio_error"], record["max_ratio_error"]) == (1e-9, 0.4)


def test_of_groups_that_an_older_version_sampled_no_first_ratio_is_asked_for_and_the_program_hears_who_it_was():
    learner = Recorder(0.3, 0.4)
    record = update(run_with("grpo.epochs=2", "grpo.max_staleness=2"), learner, 5, items(2), version(3))
    assert learner.bounds == [None, None]
    assert learner.calls[0] == ("begin", 3)
    assert record["first_ratio_error"] == 0.3
    learner = Recorder(0.0, recomputed=0.3)
    options = ["grpo.max_staleness=1", "grpo.objective.old_log_probs=recomputed"]
    update(run_with(*options), learner, 5, items(2), version(4))
    assert learner.names() == ["begin", "recompute", "train"]


def test_recomputed_log_probabilities_come_before_the_first_update_which_trains_on_them():
    learner = Recorder(0.0, 0.2)
    update(run_with("grpo.objective.old_log_probs=recomputed", "grpo.epochs=2"), learner, 0, items(2), version(0))
    assert learner.calls[:2] == [("begin",), ("recompute", "trajectory 0", "trajectory 1")]
    for call in learner.calls[2:]:
        assert sorted(call[2:]) == ["fresh trajectory 0", "fresh trajectory 1"]
    assert learner.names()[2:] == ["train", "train"]


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_recomputed_log_probabilities_that_differ_from_the_delivered_ones_stop_before_any_update(error):
    learner = Recorder(0.0, recomputed=error)
    with pytest.raises(NumericsError, match="step 1: the first ratio"):
        update(run_with("grpo.objective.old_log_probs=recomputed"), learner, 0, items(2), version(0))
    assert learner.names() == ["begin", "recompute"]


def test_an_objective_without_ratios_is_trained_without_a_ratio_check():
    learner = Recorder(None, None)
    run = run_with("grpo.algorithm=nft", "grpo.epochs=2", "grpo.objective.old_log_probs=recomputed")
    assert update(run, learner, 0, items(2), version(0)) == {"loss": 1.0, "updates": 2}
    assert learner.names() == ["begin", "train", "train"]


POLICY_GRADIENT = {
    "version_lag": 0, "lr": 1e-4, "loss": 0.1, "ratio": 1.0, "max_ratio_error": 0.2, "first_ratio_error": 0.0,
    "clipped": 0.5, "max_grad_norm": 1.0, "updates": 2,
}  # fmt: skip
FORWARD_PROCESS = {"version_lag": 0, "lr": 1e-4, "loss": 0.1, "drift": 0.0, "kl": 0.2, "max_grad_norm": 1.0}


@pytest.mark.parametrize("record", [POLICY_GRADIENT, FORWARD_PROCESS, {"version_lag": 0}])
def test_the_event_of_a_step_holds_its_record_means_and_spreads_whatever_the_objective(tmp_path, record):
    run = Run(load_config("tiny", [f"run_dir={tmp_path}", "tracking.wandb=disabled", "cluster.rollout.actors=2"]))
    batch = TrainingBatch(
        items=[],
        trained=["3.0", "3.1"],
        dropped={"3.2": "zero_variance"},
        rewards={"reward": 0.5, "term/layer": 0.4, "term/layer/object_removal": 0.3},
        spread=0.11,
        advantage_spread=0.97,
        reasons=Counter({"layer: too dark": 2}),
        sampling_s=1.2,
    )
    report(run, 3, record, batch, 1.0, 2.0, 2)
    run.close()
    [event] = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "step"]
    expected = record | batch.rewards | {
        "stage": "grpo", "step": 3, "groups": 2, "reward_spread": 0.11, "advantage_spread": 0.97,
        "missing_scores": 2, "missing_because": {"layer: too dark": 2}, "dropped/zero_variance": 1,
        "sample_s": 1.0, "train_s": 2.0, "idle_learner": 0.333, "idle_rollout": 0.8,
    }  # fmt: skip
    assert {key: event[key] for key in expected} == expected
