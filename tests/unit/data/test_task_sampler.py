from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from data.sampler import TaskSampler, build_schedule
from data.seeding import seed_for

weight_tables = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.05, 10), min_size=1, max_size=8)


def positions_for(weights, size=7):
    return {task: np.arange(k * 100, k * 100 + size) for k, task in enumerate(sorted(weights))}


@settings(max_examples=50, deadline=None)
@given(weight_tables, st.integers(0, 10**9), st.integers(1, 9), st.integers(0, 2**40))
def test_two_samplers_agree_at_any_position_whatever_they_drew_before(weights, position, count, seed):
    one, two = (TaskSampler(positions_for(weights), weights, seed) for _ in range(2))
    for earlier in range(5):
        one.draw(earlier, count)
    a, b = one.draw(position, count), two.draw(position, count)
    assert a.task == b.task
    assert a.indices.tolist() == b.indices.tolist()
    assert len(a.indices) == count


@settings(max_examples=300, deadline=None)
@given(weight_tables)
def test_a_cycle_gives_each_task_its_share(weights):
    schedule = build_schedule(weights)
    counts, total = Counter(schedule), sum(weights.values())
    assert len(schedule) == 60
    for task, weight in weights.items():
        # A task below one place in the cycle is raised to one place, at the cost of the others.
        assert abs(counts[task] - weight / total * 60) <= len(weights)
        assert counts[task] >= 1


def test_rare_tasks_keep_one_place_beside_a_dominant_one():
    counts = Counter(build_schedule({"a": 10.0, **dict.fromkeys("bcdefgh", 0.05)}))
    assert counts == {"a": 53, **dict.fromkeys("bcdefgh", 1)}


def test_whole_shares_are_exact_and_evenly_spread():
    schedule = build_schedule({"a": 3, "b": 2, "c": 1})
    assert Counter(schedule) == {"a": 30, "b": 20, "c": 10}
    for k in range(0, 60, 6):
        assert Counter(schedule[k : k + 6]) == {"a": 3, "b": 2, "c": 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 11), st.integers(0, 1000))
def test_every_epoch_covers_each_record_once_even_if_draws_straddle_epochs(size, count, seed):
    sampler = TaskSampler({"a": np.arange(size) * 3, "b": np.arange(5)}, {"a": 2.0, "b": 1.0}, seed)
    stream: list[int] = []
    position = 0
    while len(stream) < 3 * size:
        draw = sampler.draw(position, count)
        if draw.task == "a":
            stream += draw.indices.tolist()
        position += 1
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == (np.arange(size) * 3).tolist()


def test_the_number_of_earlier_draws_is_what_counting_gives():
    sampler = TaskSampler(positions_for("ab"), {"a": 1.0, "b": 0.3}, 0)
    seen: Counter[str] = Counter()
    for position in range(200):
        assert sampler.draws_before(position, "a") == seen["a"]
        seen[sampler.task_at(position)] += 1


def test_another_seed_gives_another_order():
    orders = [TaskSampler({"a": np.arange(50)}, {"a": 1.0}, seed).draw(0, 50).indices.tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_tasks_with_weight_zero_are_never_drawn_and_may_be_absent():
    sampler = TaskSampler({"a": np.arange(3)}, {"a": 1.0, "b": 0.0}, 0)
    assert set(sampler.schedule) == {"a"}


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"z": 1.0}, ConfigError, "task weight z=1.0: the dataset has no such task"),
        ({"a": 0.0}, ConfigError, "none is positive"),
        ({}, ConfigError, "none is positive"),
        ({"a": -1.0}, ConfigError, "task weight a=-1.0"),
        ({"a": float("nan")}, ConfigError, "finite"),
        ({"empty": 1.0}, DataError, "'empty' has a weight but no usable records"),
    ],
)
def test_unusable_weights_are_refused_by_name(weights, error, message):
    with pytest.raises(error, match=message):
        TaskSampler({"a": np.arange(3), "empty": np.arange(0)}, weights, 0)


def test_seeds_depend_on_every_part_its_type_and_its_place():
    seeds = {seed_for(*parts) for parts in [(1, 2), (2, 1), ("1", 2), (12,), ("ab", "c"), ("a", "bc"), (1, 2, 0)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(0, "x") == seed_for(0, "x")
    with pytest.raises(TypeError, match=r"1\.5"):
        seed_for(1.5)


shape_counts = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def shaped(counts):
    """Positions of task a, beside a task b of one shape, and the shapes of all records."""
    shapes = [(16 * (k + 1), 32) for k, n in enumerate(counts) for _ in range(n)]
    order = np.random.default_rng(len(shapes)).permutation(len(shapes))
    everything = [shapes[k] for k in order] + [(16, 16)] * 5
    return {"a": np.arange(len(shapes)), "b": np.arange(len(shapes), len(everything))}, everything


@settings(max_examples=60, deadline=None)
@given(shape_counts, st.integers(1, 9), st.integers(0, 1000), st.integers(0, 10**6))
def test_records_of_one_draw_have_one_shape_and_the_draw_says_which(counts, count, seed, position):
    positions, shapes = shaped(counts)
    draw = TaskSampler(positions, {"a": 1.0, "b": 1.0}, seed, shapes).draw(position, count)
    assert {shapes[index] for index in draw.indices} == {draw.shape}
    assert len(draw.indices) == count


@settings(max_examples=60, deadline=None)
@given(shape_counts, st.integers(1, 6), st.integers(0, 1000))
def test_records_of_all_shapes_come_equally_often(counts, count, seed):
    positions, shapes = shaped(counts)
    sampler = TaskSampler({"a": positions["a"]}, {"a": 1.0}, seed, shapes)
    drawn = Counter(int(index) for p in range(sum(counts)) for index in sampler.draw(p, count).indices)
    assert drawn == dict.fromkeys(range(sum(counts)), count)


@settings(max_examples=40, deadline=None)
@given(shape_counts, st.integers(1, 6), st.integers(0, 1000), st.integers(0, 500))
def test_a_stream_of_shapes_goes_on_in_mid_epoch_as_if_it_had_never_stopped(counts, count, seed, position):
    positions, shapes = shaped(counts)
    one, resumed = (TaskSampler(positions, {"a": 2.0, "b": 1.0}, seed, shapes) for _ in range(2))
    through = [one.draw(p, count) for p in range(position + 5)][position:]
    for k, draw in enumerate(through):
        again = resumed.draw(position + k, count)
        assert (again.task, again.shape, again.indices.tolist()) == (draw.task, draw.shape, draw.indices.tolist())


@given(st.integers(1, 6), st.integers(0, 1000), st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_a_dataset_of_one_shape_is_drawn_as_one_that_does_not_say_its_shape(count, seed, position):
    positions = {"a": np.arange(7), "b": np.arange(7, 12)}
    plain = TaskSampler(positions, {"a": 2.0, "b": 1.0}, seed)
    told = TaskSampler(positions, {"a": 2.0, "b": 1.0}, seed, [(64, 64)] * 12)
    assert plain.draw(position, count).indices.tolist() == told.draw(position, count).indices.tolist()
