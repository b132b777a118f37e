"""The parts of the engine that need no DeepSpeed: the learning rate and the sums of logged quantities."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine import OptimiserConfig, learning_rate, sum_stats

quiet = settings(deadline=None, derandomize=True, database=None)


def rates(steps, **values):
    config = OptimiserConfig(lr=2e-3, **values)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_without_warm_up_a_constant_rate_is_the_peak_from_the_first_step_on():
    assert rates(4) == [2e-3] * 4


def test_warm_up_rises_evenly_from_its_first_step_to_the_peak():
    assert rates(7, warmup=4) == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3, 2e-3])


def test_cosine_starts_at_the_peak_after_warm_up_and_falls_from_there():
    values = rates(50, warmup=10, decay="cosine")
    assert values[9] == values[10] == pytest.approx(2e-3)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))


@pytest.mark.parametrize(("steps", "warmup"), [(4, 0), (4, 1), (100, 30), (900, 50)])
def test_cosine_falls_to_a_tenth_at_the_last_step(steps, warmup):
    assert rates(steps, warmup=warmup, decay="cosine")[-1] == pytest.approx(2e-4)


def test_cosine_is_halfway_between_peak_and_tenth_at_half_time():
    assert learning_rate(OptimiserConfig(lr=1.0, decay="cosine"), 50, 101) == pytest.approx(0.55)


@quiet
@given(st.integers(1, 300), st.integers(0, 400), st.sampled_from(["constant", "cosine"]))
def test_the_rate_is_always_positive_and_never_above_the_peak(steps, warmup, decay):
    for rate in rates(steps, warmup=warmup, decay=decay):
        assert 0 < rate <= 2e-3 * (1 + 1e-12)


@quiet
@given(st.integers(2, 200), st.integers(0, 50))
def test_neighbouring_steps_after_warm_up_differ_by_no_jump(steps, warmup):
    values = rates(steps + warmup, warmup=warmup, decay="cosine")[warmup:]
    largest = max(a - b for a, b in itertools.pairwise(values))
    assert largest <= 0.45 * 2e-3 * math.pi / (steps - 1) + 1e-12


def test_stats_are_added_and_maxima_kept():
    parts = [{"loss": 1.0, "max_norm": 3.0}, {"loss": 2.5, "max_norm": 2.0, "clipped": 1.0}, {"loss": -1.0}]
    assert sum_stats(parts) == {"loss": 2.5, "max_norm": 3.0, "clipped": 1.0}


def test_a_maximum_of_negative_numbers_is_negative():
    assert sum_stats([{"max_error": -3.0}, {"max_error": -2.0}]) == {"max_error": -2.0}


def test_no_stats_are_no_stats_and_the_parts_stay_as_they_are():
    first = {"loss": 1.0, "max_norm": 1.0}
    assert sum_stats([]) == {}
    sum_stats([first, {"loss": 2.0, "max_norm": 5.0}])
    assert first == {"loss": 1.0, "max_norm": 1.0}


@quiet
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["loss", "ratio", "max_norm", "max_seconds"]), st.integers(-99, 99)), max_size=6
    ),
    st.integers(0, 6),
)
def test_ranks_can_sum_first_and_the_driver_afterwards(parts, cut):
    assert sum_stats([sum_stats(parts[:cut]), sum_stats(parts[cut:])]) == sum_stats(parts)


def test_an_infinite_maximum_is_not_lost():
    for parts in ([{"max_norm": math.inf}, {"max_norm": 1.0}], [{"max_norm": 1.0}, {"max_norm": math.inf}]):
        assert sum_stats(parts) == {"max_norm": math.inf}
