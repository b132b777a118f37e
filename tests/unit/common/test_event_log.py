import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StorageError
from common.events import EventLog, group_balance, read_events


def write(path, *events, attempt=1):
    log = EventLog(path, attempt)
    for name, fields in events:
        log.write(name, **fields)
    log.close()


def test_events_are_read_back_in_order_with_time_and_attempt(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    write(path, ("step", {"stage": "vae", "loss": 0.5}), ("commit", {"step": 1}))
    write(path, ("step", {"stage": "sft"}), attempt=2)
    events = read_events(path)
    assert [(e["event"], e["attempt"]) for e in events] == [("step", 1), ("commit", 1), ("step", 2)]
    assert events[0]["loss"] == 0.5
    assert all(e["time"] > 1.7e9 for e in events)
    assert len(path.read_text().splitlines()) == 3


def test_an_event_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1)
    assert [e["step"] for e in read_events(log.path)] == [1]
    log.close()


def test_a_log_that_does_not_exist_has_no_events(tmp_path):
    assert read_events(tmp_path / "nothing.jsonl") == []


def test_text_of_any_kind_stays_on_its_line(tmp_path):
    text = 'a "quoted"\nsecond line\u2028third \x85 ρ 猫'
    write(tmp_path / "e.jsonl", ("step", {"message": text}), ("step", {"message": "next"}))
    assert [e["message"] for e in read_events(tmp_path / "e.jsonl")] == [text, "next"]


@pytest.mark.parametrize("keep", [1, 10, -2, -1])
def test_a_line_torn_by_a_crash_is_left_out_and_costs_no_later_event(tmp_path, keep):
    path = tmp_path / "events.jsonl"
    write(path, ("step", {"step": 1}), ("step", {"step": 2}))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:keep])
    complete = [1, 2] if keep == -1 else [1]  # without its newline a line is still whole
    assert [e["step"] for e in read_events(path)] == complete
    write(path, ("step", {"step": 3}), attempt=2)
    write(path, ("step", {"step": 4}), attempt=3)
    assert [e["step"] for e in read_events(path)] == [*complete, 3, 4]


def test_numbers_that_are_not_finite_become_null_which_every_json_reader_takes(tmp_path):
    write(tmp_path / "e.jsonl", ("step", {"loss": float("nan"), "norm": float("inf")}))
    (event,) = read_events(tmp_path / "e.jsonl")
    assert event["loss"] is None
    assert event["norm"] is None
    assert "NaN" not in (tmp_path / "e.jsonl").read_text()


def test_a_full_disk_is_one_message_when_written_to_and_no_other_error_when_closed():
    log = EventLog(Path("/dev/full"))
    with pytest.raises(StorageError, match=r"full: cannot write \(No space left on device, \d+ MiB free\)"):
        log.write("step")
    with contextlib.suppress(StorageError):
        log.close()


def launched(group, step):
    return {"event": "group_launched", "stage": "grpo", "group": group, "step": step}


def trained(group, step):
    return {"event": "group_trained", "stage": "grpo", "group": group, "step": step}


def dropped(group, step, reason):
    return {"event": "group_dropped", "stage": "grpo", "group": group, "step": step, "reason": reason}


def rollback(to_step, stage="grpo"):
    return {"event": "rollback", "stage": stage, "to_step": to_step}


def test_groups_are_counted_by_what_became_of_them():
    events = [
        *(launched(f"1.{k}", 1) for k in range(4)),
        trained("1.0", 1),
        dropped("1.1", 1, "zero_variance"),
        dropped("1.2", 1, "below_min_group"),
        {"event": "step", "stage": "grpo", "step": 1},
    ]
    assert group_balance(events) == {
        "launched": 4, "trained": 1, "dropped:zero_variance": 1, "dropped:below_min_group": 1, "in_flight": 1,
    }  # fmt: skip
    assert group_balance([]) == {}


def test_a_rollback_takes_back_what_was_trained_dropped_or_in_flight_after_it():
    first = [launched("1.0", 1), trained("1.0", 1), launched("2.0", 2), trained("2.0", 2)]
    lost = [
        launched("3.0", 3),
        dropped("3.0", 3, "zero_variance"),
        launched("3.1", 3),
        launched("3.2", 3),
        trained("3.2", 3),
    ]
    again = [rollback(2), launched("3.0", 3), trained("3.0", 3)]
    assert group_balance(first + lost + again) == {"launched": 6, "trained": 3, "dropped:rolled back": 3}


def test_a_rollback_of_another_stage_changes_nothing():
    events = [launched("1.0", 1), trained("1.0", 1), rollback(0, stage="sft")]
    assert group_balance(events) == {"launched": 1, "trained": 1}


@st.composite
def histories(draw):
    """A GRPO run that commits now and then and is killed anywhere: what its log would hold."""
    events, committed, step = [], 0, 0
    for _ in range(draw(st.integers(1, 30))):
        step += 1
        names = [f"{step}.{k}" for k in range(draw(st.integers(1, 4)))]
        round_ = [launched(name, step) for name in names]
        for name in names:
            reason = draw(st.sampled_from(["", "zero_variance", "below_min_group"]))
            round_.append(dropped(name, step, reason) if reason else trained(name, step))
        if draw(st.integers(0, 4)) == 0:  # killed inside this step
            events += [*round_[: draw(st.integers(0, len(round_)))], rollback(committed)]
            step = committed
            continue
        events += round_
        if draw(st.booleans()):
            committed = step
    return events[: draw(st.integers(0, len(events)))]


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(histories())
def test_every_launched_group_is_trained_dropped_or_in_flight_at_any_moment(events):
    balance = group_balance(events)
    assert sum(count for key, count in balance.items() if key != "launched") == balance.get("launched", 0)
    assert all(count >= 0 for count in balance.values())


@settings(deadline=None, max_examples=50, derandomize=True, database=None)
@given(histories())
def test_the_balance_is_the_same_after_a_trip_through_the_file(tmp_path_factory, events):
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    write(path, *((e["event"], {k: v for k, v in e.items() if k != "event"}) for e in events))
    path.write_text(path.read_text() + json.dumps(launched("9.9", 9))[:-3])  # and a torn line
    assert group_balance(read_events(path)) == group_balance(events)
