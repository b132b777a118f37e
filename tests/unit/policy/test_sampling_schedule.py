import itertools
import math

import derivations
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import validate
from common.errors import ConfigError
from policy.schedule import SamplingConfig, ScheduleConfig, WindowConfig

MOVEMENTS = ("fixed", "random", "progressive")


@st.composite
def samplings(draw, movements=MOVEMENTS):
    steps = draw(st.integers(2, 30))
    movement = draw(st.sampled_from(movements))
    size = draw(st.integers(1, steps - 1))
    start = draw(st.integers(0, steps - 1 - size))
    window = WindowConfig(size=size, start=start, movement=movement, every=draw(st.integers(1, 20)))
    return SamplingConfig(schedule=ScheduleConfig(steps=steps), window=window)


def sampling(steps, **window):
    return SamplingConfig(schedule=ScheduleConfig(steps=steps), window=WindowConfig(**window))


@given(st.integers(2, 60), st.floats(0.5, 20.0))
def test_levels_follow_the_time_shift_over_an_even_grid(steps, shift):
    expected = [derivations.shifted(1 - k / steps, shift) for k in range(steps + 1)]
    assert ScheduleConfig(steps=steps, shift=shift).sigmas() == pytest.approx(expected, abs=1e-12)


@given(st.integers(2, 60), st.floats(0.01, 20.0))
def test_levels_fall_strictly_from_exactly_one_to_exactly_zero(steps, shift):
    sigmas = ScheduleConfig(steps=steps, shift=shift).sigmas()
    assert len(sigmas) == steps + 1
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    assert sigmas[-1] == 0.0
    assert sigmas[0] == 1.0  # anything beside it makes the first step's noise √(σ / (1 − σ)) explode


def test_a_shift_of_e_to_the_mu_gives_the_published_qwen_image_levels():
    published = [1, 0.94412938, 0.88249729, 0.81416409, 0.73797405, 0.65248946, 0.55589907, 0.44588829, 0.31945134,
                 0.17261241, 0]  # fmt: skip
    assert ScheduleConfig(steps=10, shift=math.exp(0.63)).sigmas() == pytest.approx(published, abs=5.1e-9)
    layered = [1, 0.99096, 0.97989, 0.96602, 0.94812, 0.92414, 0.89037, 0.83926, 0.75282, 0.57512, 0]
    assert ScheduleConfig(steps=10, shift=math.exp(2.5)).sigmas() == pytest.approx(layered, abs=5.1e-6)


def test_the_papers_shift_of_three_is_3t_over_1_plus_2t():
    assert ScheduleConfig(steps=4).sigmas() == pytest.approx([1, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0])


@given(samplings(), st.integers(0, 2**31), st.integers(0, 10_000), st.integers(0, 500))
def test_a_window_is_never_empty_and_never_holds_the_last_step(config, seed, step, group):
    window = config.window_steps(seed, step, group)
    assert len(window) == config.window.size >= 1
    assert window.step == 1
    assert window[0] >= 0
    assert window[-1] <= config.schedule.steps - 2


@given(samplings(), st.integers(0, 2**31), st.integers(0, 10_000), st.integers(0, 500))
def test_a_window_follows_from_seed_step_and_group_alone(config, seed, step, group):
    before = config.window_steps(seed, step, group)
    config.window_steps(seed + 1, step, group)  # what others ask for leaves no trace
    again = SamplingConfig.model_validate(config.model_dump())
    assert again.window_steps(seed, step, group) == before == config.window_steps(seed, step, group)


def test_a_fixed_window_stays_where_it_is_told():
    config = sampling(10, size=3, start=2, movement="fixed")
    assert {config.window_steps(s, t, g) for s in range(3) for t in range(30) for g in range(3)} == {range(2, 5)}


def test_a_random_window_reaches_every_place_about_equally_often():
    config = sampling(6, size=2, movement="random")
    starts = [config.window_steps(0, step, group).start for step in range(40) for group in range(20)]
    counts = [starts.count(start) for start in range(4)]
    assert sum(counts) == len(starts)
    assert min(counts) > 150  # 200 each on average, standard deviation 12


def test_a_random_window_differs_between_groups_steps_and_seeds():
    config = sampling(12, size=1, movement="random")
    for axis in range(3):
        windows = {config.window_steps(*(value if k == axis else 7 for k in range(3))) for value in range(20)}
        assert len(windows) > 3


def test_a_random_window_ignores_the_start_of_the_other_movements():
    assert sampling(10, size=4, start=9, movement="random").window_steps(0, 0, 0)[-1] <= 8


def test_a_progressive_window_moves_by_its_size_and_wraps_round():
    config = sampling(10, size=2, start=1, movement="progressive", every=3)
    starts = [config.window_steps(5, step, step % 4).start for step in range(15)]
    assert starts == [1, 1, 1, 3, 3, 3, 5, 5, 5, 7, 7, 7, 1, 1, 1]


@given(samplings(("progressive",)))
def test_a_progressive_window_visits_each_of_its_places_before_it_wraps(config):
    every, size, first = config.window.every, config.window.size, config.window.start
    starts = [config.window_steps(0, turn * every, 0).start for turn in range(40)]
    turns = starts.index(first, 1) if first in starts[1:] else len(starts)
    assert starts[:turns] == [first + size * k for k in range(turns)]
    # The next place would not fit.
    assert first + size * turns + size > config.schedule.steps - 1


@given(st.integers(2, 20), st.integers(1, 30), st.integers(0, 30), st.sampled_from(MOVEMENTS))
def test_a_window_that_does_not_fit_is_refused_with_the_numbers(steps, size, start, movement):
    assume((0 if movement == "random" else start) + size > steps - 1)
    with pytest.raises(
        ValidationError, match=f"window of {size} steps .*does not fit.*first {steps - 1} can be trained"
    ):
        sampling(steps, size=size, start=start, movement=movement)


def test_a_bad_fit_reaches_the_user_as_a_configuration_error_with_its_place():
    values = {"schedule": {"steps": 4}, "window": {"size": 4, "movement": "fixed"}}
    with pytest.raises(ConfigError, match=r"my\.yaml: .*window of 4 steps from step 0 does not fit: of 4 sampling"):
        validate(SamplingConfig, values, "my.yaml")


@pytest.mark.parametrize("values", [{"steps": 1}, {"shift": 0.0}, {"shift": -1.0}])
def test_schedules_without_a_trainable_step_or_with_a_senseless_shift_are_refused(values):
    with pytest.raises(ValidationError):
        ScheduleConfig(**values)
