import itertools

import derivations
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_models import CHANNELS, make_condition, normal
from torch import nn

from policy.kernels import KernelConfig, dpm_step, ode_step
from policy.sampling import denoise
from policy.schedule import ScheduleConfig

SIGMAS = ScheduleConfig(steps=8, shift=3.0).sigmas()
SHAPE = (3, 2, CHANNELS, 4, 4)
STEPS = {
    "first (σ = 1)": (None, *SIGMAS[:2]),
    "after the first": tuple(SIGMAS[:3]),
    "middle": tuple(SIGMAS[3:6]),
    "before the last": tuple(SIGMAS[-4:-1]),
    "last (σ′ = 0)": tuple(SIGMAS[-3:]),
}
FIRST_ORDER = ("first (σ = 1)", "after the first", "last (σ′ = 0)")


class OnPaper(nn.Module):
    """A velocity known on paper, the same function at every place."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, hidden_states, timestep, **_):
        return (self.function(hidden_states, timestep.view(-1, 1, 1)),)


def curved(x, sigma):
    return x / (1 + x**2) - sigma**2


def integrate(velocity, sigmas, solver, initial=None, **window):
    initial = normal(*SHAPE, seed=7).double() if initial is None else initial
    return denoise(OnPaper(velocity), make_condition(len(initial)), initial, sigmas, solver=solver, **window)


def history(seed=0, dtype=torch.float64):
    return [normal(*SHAPE, seed=3 * seed + k, dtype=torch.float64).to(dtype) for k in range(3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", STEPS)
def test_a_dpm_step_equals_the_papers_formula(name, dtype, tolerance):
    x, clean, previous = history(dtype=dtype)
    if STEPS[name][0] is None:
        previous = None
    moved = dpm_step(x, clean, previous, STEPS[name])
    before = None if previous is None else previous.double().numpy()
    expected = derivations.dpm(x.double().numpy(), clean.double().numpy(), before, *STEPS[name])
    assert moved.dtype == dtype
    assert np.abs(moved.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", STEPS)
def test_first_order_is_eulers_step_and_second_order_is_not(name):
    (_, sigma, sigma_next), (x, v, previous) = STEPS[name], history(1)
    clean, euler = x - sigma * v, ode_step(x, v, sigma, sigma_next)
    assert torch.allclose(dpm_step(x, clean, None, STEPS[name]), euler, rtol=0, atol=1e-12)
    second = dpm_step(x, clean, previous, STEPS[name])
    assert torch.allclose(second, euler, rtol=0, atol=1e-12) == (name in FIRST_ORDER)


@given(st.floats(0.05, 0.99), st.floats(0.1, 0.95), st.floats(0.1, 0.95), st.integers(0, 1000))
def test_a_prediction_that_stays_the_same_makes_both_orders_one(before, fall, next_fall, seed):
    sigmas = (before, before * fall, before * fall * next_fall)
    x, clean, _ = history(seed)
    once, twice = (dpm_step(x, clean, previous, sigmas) for previous in (None, clean))
    assert twice.numpy() == pytest.approx(once.numpy(), abs=1e-12)


@given(st.permutations(range(3)), st.integers(0, 1000))
def test_a_batch_in_another_order_makes_the_same_dpm_steps_in_that_order(order, seed):
    parts = history(seed)
    here, there = (dpm_step(*(part[k] for part in parts), STEPS["middle"]) for k in (slice(None), order))
    assert there.numpy() == pytest.approx(here[order].numpy(), abs=1e-12)


def test_dpm_steps_of_half_precision_latents_are_computed_in_float32():
    x, clean, previous = history(2, torch.bfloat16)
    moved = dpm_step(x, clean, previous, STEPS["middle"])
    expected = derivations.dpm(*(part.double().numpy() for part in (x, clean, previous)), *STEPS["middle"])
    assert moved.dtype == torch.float32
    assert np.abs(moved.double().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_a_whole_dpm_run_equals_the_papers_algorithm(steps):
    sigmas = ScheduleConfig(steps=steps).sigmas()
    result = integrate(curved, sigmas, "dpm2m")
    expected = derivations.dpm_run(curved, normal(*SHAPE, seed=7).double().numpy(), sigmas)
    assert result.latents_BMCHW.dtype == torch.float64
    assert result.latents_BMCHW.numpy() == pytest.approx(expected, abs=1e-9)
    single = integrate(curved, sigmas, "dpm2m", normal(*SHAPE, seed=7)).latents_BMCHW
    assert single.dtype == torch.float32
    assert np.abs(single.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("levels", ["ours", "theirs"])
def test_a_whole_dpm_run_equals_that_of_diffusers(steps, levels):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=3.0,
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    # Theirs start at σ = 0.9997 and so take a true second-order step after the first one; ours start at 1.
    sigmas = ScheduleConfig(steps=steps).sigmas() if levels == "ours" else scheduler.sigmas.tolist()
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.set_begin_index(0)
    x = normal(*SHAPE, seed=7).double()
    for sigma, timestep in zip(sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(curved(x, sigma), timestep, x).prev_sample
    ours = integrate(curved, sigmas, "dpm2m").latents_BMCHW
    assert float((ours - x).abs().max()) <= 1e-6 * float(x.abs().max())  # diffusers rounds states to float32


def test_halving_the_steps_divides_the_error_by_four_where_eulers_is_divided_by_two():
    first, last, mean, spread = 0.9, 0.1, 0.4, 0.5
    initial = normal(*SHAPE, seed=7).double()
    # z = (x − (1 − σ)·mean)/√((1 − σ)²spread² + σ²) stays the same along the ODE.
    start, end = (np.sqrt((1 - s) ** 2 * spread**2 + s**2) for s in (first, last))
    exact = (1 - last) * mean + (initial - (1 - first) * mean) * end / start

    def velocity(x, sigma):
        return derivations.gaussian_velocity(x, sigma, mean, spread)

    def errors(solver):
        runs = [integrate(velocity, np.linspace(first, last, n + 1).tolist(), solver) for n in (40, 80, 160)]
        return [float((run.latents_BMCHW - exact).abs().max()) for run in runs]

    dpm, euler = errors("dpm2m"), errors("euler")
    assert [a / b for a, b in itertools.pairwise(dpm)] == pytest.approx([4, 4], rel=0.1)
    assert [a / b for a, b in itertools.pairwise(euler)] == pytest.approx([2, 2], rel=0.1)


@pytest.mark.parametrize("window", [range(0, 2), range(3, 5), range(6, 7)], ids=["first", "middle", "last stochastic"])
def test_the_solver_forgets_its_history_at_the_window(window):
    initial = normal(*SHAPE, seed=7).double()
    result = integrate(
        curved,
        SIGMAS,
        "dpm2m",
        window=window,
        kernel=KernelConfig(),
        noise=lambda step: normal(*SHAPE, seed=1000 + step),
        storage=torch.float64,
    )
    before = derivations.dpm_run(curved, initial.numpy(), SIGMAS[: window[0] + 1])
    assert result.window_BWMCHW[:, 0].numpy() == pytest.approx(before, abs=1e-9)
    # Without history its first step is Euler's.
    after = derivations.dpm_run(curved, result.window_BWMCHW[:, -1].numpy(), SIGMAS[window[-1] + 1 :])
    assert result.latents_BMCHW.numpy() == pytest.approx(after, abs=1e-9)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValidationError, match="solver"):
        ScheduleConfig(solver="heun")
