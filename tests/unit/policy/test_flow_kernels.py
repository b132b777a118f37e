import math

import derivations
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policy.kernels import KernelConfig, ode_step, standard_kl, transition
from policy.schedule import ScheduleConfig

KERNELS = ("flow_sde", "dance", "cps")
ETA = {"flow_sde": 0.7, "dance": 0.3, "cps": 0.8}
SCHEDULE = ScheduleConfig(steps=10, shift=3.0).sigmas()
STEPS = {
    "first (σ = 1)": (SCHEDULE[0], SCHEDULE[1]),
    "second": (SCHEDULE[1], SCHEDULE[2]),
    "middle": (SCHEDULE[5], SCHEDULE[6]),
    "last stochastic": (SCHEDULE[8], SCHEDULE[9]),
}
SHAPE = (3, 2, 4, 6, 6)

SIGMA_1 = 0.95


@st.composite
def noise_levels(draw, first=True):
    """(σ, σ′); with ``first`` also the step from σ = 1, whose σ* is SIGMA_1."""
    sigma = draw(st.floats(0.02, SIGMA_1) | st.just(1.0) if first else st.floats(0.02, SIGMA_1))
    return sigma, sigma * draw(st.floats(0.05, 0.95))


def batch(seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=SHAPE), random.normal(size=SHAPE), random.normal(size=SHAPE)


def star(sigma, sigma_1=SCHEDULE[1]):
    return sigma_1 if sigma == 1 else sigma


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", KERNELS)
def test_mean_scale_and_log_prob_equal_the_papers_formulas(name, sigma, sigma_next, dtype, tolerance):
    x, v, epsilon = (torch.tensor(part, dtype=dtype) for part in batch())
    move = transition(KernelConfig(name=name, eta=ETA[name]), x, v, sigma, sigma_next, SCHEDULE[1])
    mean, scale = derivations.kernel_step(
        name, x.double().numpy(), v.double().numpy(), sigma, sigma_next, star(sigma), ETA[name]
    )
    assert move.mean.dtype == dtype
    assert np.abs(move.mean.double().numpy() - mean).max() <= tolerance * np.abs(mean).max()
    assert move.scale == pytest.approx(scale, rel=1e-12)
    following = move.mean + move.scale * epsilon
    rows = zip(following.double().numpy(), mean, strict=True)
    expected = [derivations.log_prob(name, row, row_mean, scale) for row, row_mean in rows]
    assert move.log_prob(following).shape == (3,)
    assert move.log_prob(following).tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS.values(), ids=STEPS)
def test_cps_can_have_the_normal_density_with_all_its_constants(sigma, sigma_next, dtype, tolerance):
    x, v, epsilon = (torch.tensor(part, dtype=dtype) for part in batch(5))
    levels = (sigma, sigma_next, SCHEDULE[1])
    move = transition(KernelConfig(name="cps", eta=0.8, density="gaussian"), x, v, *levels)
    published = transition(KernelConfig(name="cps", eta=0.8), x, v, *levels)
    assert torch.equal(move.mean, published.mean)
    assert move.scale == published.scale
    mean, scale = derivations.cps(x.double().numpy(), v.double().numpy(), sigma, sigma_next, 0.8)
    following = move.mean + move.scale * epsilon
    rows = list(zip(following.double().numpy(), mean, strict=True))
    expected = [derivations.log_prob("cps", *row, scale, density="gaussian") for row in rows]
    assert move.log_prob(following).tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)
    theirs = torch.distributions.Normal(torch.tensor(mean), scale).log_prob(following.double()).flatten(1).mean(1)
    assert expected == pytest.approx(theirs.tolist(), abs=1e-12)


@pytest.mark.parametrize("density", ["published", "gaussian"])
@pytest.mark.parametrize("name", KERNELS)
def test_only_cps_as_published_has_no_normal_density(name, density):
    config = KernelConfig(name=name, eta=ETA[name], density=density)
    x, v, epsilon = (torch.tensor(part) for part in batch(6))
    move = transition(config, x, v, *STEPS["middle"], SCHEDULE[1])
    normal = torch.distributions.Normal(move.mean, move.scale).log_prob(epsilon).flatten(1).mean(1)
    assert config.gaussian == ((name, density) != ("cps", "published"))
    assert torch.allclose(move.log_prob(epsilon), normal, rtol=0, atol=1e-9) == config.gaussian


@pytest.mark.parametrize("row", derivations.PEERS_ROWS, ids=lambda row: f"{row[0]} {row[2]}→{row[3]}")
def test_the_derivation_reproduces_the_numbers_published_by_the_peers(row):
    name, eta, sigma, sigma_next, sigma_star, mean, scale, log_prob = row
    x, v, epsilon = derivations.PEERS_X, derivations.PEERS_V, derivations.PEERS_EPSILON
    got_mean, got_scale = derivations.kernel_step(name, x, v, sigma, sigma_next, sigma_star, eta)
    assert got_mean == pytest.approx(mean, abs=1e-7)
    assert got_scale == pytest.approx(scale, abs=1e-14)
    assert derivations.log_prob(name, got_mean + got_scale * epsilon, got_mean, got_scale) == pytest.approx(
        log_prob, abs=1e-12
    )


@pytest.mark.parametrize(
    "row", [row for row in derivations.PEERS_ROWS if row[3] > 0], ids=lambda row: f"{row[0]} {row[2]}→{row[3]}"
)
def test_the_kernels_reproduce_the_numbers_published_by_the_peers(row):
    name, eta, sigma, sigma_next, sigma_star, mean, scale, log_prob = row
    x, v, epsilon = (
        torch.tensor(part)[None] for part in (derivations.PEERS_X, derivations.PEERS_V, derivations.PEERS_EPSILON)
    )
    move = transition(KernelConfig(name=name, eta=eta), x, v, sigma, sigma_next, sigma_star or 0.75)
    assert move.mean[0].tolist() == pytest.approx(mean, abs=1e-7)
    assert move.scale == pytest.approx(scale, abs=1e-14)
    assert float(move.log_prob(move.mean + move.scale * epsilon)) == pytest.approx(log_prob, abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_half_precision_inputs_are_computed_in_float32(name):
    x, v, epsilon = (torch.tensor(part).bfloat16() for part in batch(1))
    config, levels = KernelConfig(name=name, eta=ETA[name]), (*STEPS["middle"], SCHEDULE[1])
    move = transition(config, x, v, *levels)
    sigma, sigma_next = STEPS["middle"]
    mean, scale = derivations.kernel_step(
        name, x.double().numpy(), v.double().numpy(), sigma, sigma_next, sigma, ETA[name]
    )
    assert move.mean.dtype == torch.float32
    assert np.abs(move.mean.numpy() - mean).max() <= 1e-6 * np.abs(mean).max()
    following = (move.mean + move.scale * epsilon).bfloat16()
    rows = zip(following.double().numpy(), mean, strict=True)
    expected = [derivations.log_prob(name, row, row_mean, scale) for row, row_mean in rows]
    assert move.log_prob(following).tolist() == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_first_step_takes_its_noise_from_the_schedules_second_level():
    x, v, _ = (torch.tensor(part) for part in batch(2))
    near = transition(KernelConfig(eta=0.7), x, v, 1.0, 0.9, 0.9)
    far = transition(KernelConfig(eta=0.7), x, v, 1.0, 0.9, 0.75)
    assert near.scale == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1))
    assert far.scale == pytest.approx(0.7 * math.sqrt(1 / 0.25) * math.sqrt(0.1))
    later = [transition(KernelConfig(eta=0.7), x, v, 0.9, 0.8, sigma_1) for sigma_1 in (0.9, 0.5)]
    assert later[0].scale == later[1].scale
    assert torch.equal(later[0].mean, later[1].mean)


@pytest.mark.parametrize("name", KERNELS)
def test_the_step_to_zero_is_refused_because_it_is_always_an_ode_step(name):
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="last step of a schedule is an ODE step"):
        transition(KernelConfig(name=name, eta=0.5), x, x, 0.25, 0.0, 0.75)


@pytest.mark.parametrize("name", KERNELS)
@given(levels=noise_levels(), seed=st.integers(0, 2**32))
def test_without_noise_every_kernel_is_the_euler_step(name, levels, seed):
    random = np.random.default_rng(seed)
    x, v = torch.tensor(random.normal(size=(2, 7))), torch.tensor(random.normal(size=(2, 7)))
    expected = derivations.euler(x.numpy(), v.numpy(), *levels)
    move = transition(KernelConfig(name=name, eta=1e-6), x, v, *levels, SIGMA_1)
    assert move.mean.numpy() == pytest.approx(expected, abs=1e-8)
    assert move.scale < 1e-5
    assert ode_step(x, v, *levels).numpy() == pytest.approx(expected, abs=1e-12)


@given(levels=noise_levels(), eta=st.floats(0.001, 1.0))
def test_cps_gives_the_next_state_exactly_the_variance_of_the_flow_at_its_level(levels, eta):
    sigma, sigma_next = levels
    # Two samples: clean end 1 and noise end 0, then the other way round. The means are the coefficients of the ends.
    x0, x1 = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    move = transition(
        KernelConfig(name="cps", eta=eta), (1 - sigma) * x0 + sigma * x1, x1 - x0, sigma, sigma_next, 0.75
    )
    of_clean, of_noise = move.mean[:, 0].tolist()
    assert of_clean == pytest.approx(1 - sigma_next, abs=1e-12)
    assert of_clean**2 + of_noise**2 + move.scale**2 == pytest.approx((1 - sigma_next) ** 2 + sigma_next**2, abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@given(levels=noise_levels(), seed=st.integers(0, 2**32), size=st.floats(1e-3, 10.0))
def test_the_mean_is_the_likeliest_next_state(name, levels, seed, size):
    random = np.random.default_rng(seed)
    x, v, away = (torch.tensor(random.normal(size=(2, 5))) for _ in range(3))
    move = transition(KernelConfig(name=name, eta=ETA[name]), x, v, *levels, SIGMA_1)
    best = move.log_prob(move.mean)
    assert bool((move.log_prob(move.mean + size * away) < best).all())
    assert bool((move.log_prob(move.mean - size * away) < best).all())


@given(levels=noise_levels(first=False), eta=st.floats(0.05, 1.5), seed=st.integers(0, 2**32))
def test_dance_is_the_flow_sde_with_a_constant_noise_level(levels, eta, seed):
    sigma, _ = levels
    random = np.random.default_rng(seed)
    x, v = torch.tensor(random.normal(size=(1, 5))), torch.tensor(random.normal(size=(1, 5)))
    dance = transition(KernelConfig(name="dance", eta=eta), x, v, *levels, SIGMA_1)
    flow = transition(KernelConfig(name="flow_sde", eta=eta / math.sqrt(sigma / (1 - sigma))), x, v, *levels, SIGMA_1)
    assert dance.mean.numpy() == pytest.approx(flow.mean.numpy(), abs=1e-9)
    assert dance.scale == pytest.approx(flow.scale, rel=1e-9)


@pytest.mark.parametrize("name", KERNELS)
def test_each_sample_of_a_batch_has_its_own_log_prob(name):
    x, v, epsilon = (torch.tensor(part) for part in batch(3))
    config, levels = KernelConfig(name=name, eta=ETA[name]), (*STEPS["middle"], SCHEDULE[1])
    together = transition(config, x, v, *levels).log_prob(epsilon)
    singles = [(x[k : k + 1], v[k : k + 1], epsilon[k : k + 1]) for k in range(3)]
    alone = [float(transition(config, *pair, *levels).log_prob(following)) for *pair, following in singles]
    assert together.tolist() == pytest.approx(alone, abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_log_prob_carries_gradient_to_the_velocity(name):
    x, v, epsilon = (torch.tensor(part) for part in batch(4))
    v.requires_grad_()
    move = transition(KernelConfig(name=name, eta=ETA[name]), x, v, *STEPS["middle"], SCHEDULE[1])
    move.log_prob(epsilon).sum().backward()
    assert v.grad is not None
    assert float(v.grad.abs().min()) > 0


@pytest.mark.parametrize("name", KERNELS)
@given(order=st.permutations(range(3)), levels=noise_levels(), seed=st.integers(0, 2**32))
def test_a_batch_in_another_order_makes_the_same_steps_in_that_order(name, order, levels, seed):
    random = np.random.default_rng(seed)
    x, v, following = (torch.tensor(random.normal(size=(3, 2, 5))) for _ in range(3))
    config = KernelConfig(name=name, eta=ETA[name])
    here, there = (transition(config, x[k], v[k], *levels, SIGMA_1) for k in (slice(None), order))
    assert there.mean.numpy() == pytest.approx(here.mean[order].numpy(), abs=1e-12)
    expected = here.log_prob(following)[order].tolist()
    assert there.log_prob(following[order]).tolist() == pytest.approx(expected, abs=1e-9, rel=1e-12)
    kl = standard_kl(here.mean, following, here.scale)[order].tolist()
    assert standard_kl(there.mean, following[order], there.scale).tolist() == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", KERNELS)
def test_the_kl_of_two_policies_is_that_of_their_normal_steps_per_dimension(name, sigma, sigma_next, dtype, tolerance):
    x, v, reference = (torch.tensor(part, dtype=dtype) for part in batch(7))
    config = KernelConfig(name=name, eta=ETA[name])
    here, there = (transition(config, x, velocity, sigma, sigma_next, SCHEDULE[1]) for velocity in (v, reference))
    kl = standard_kl(here.mean, there.mean, here.scale)
    assert kl.shape == (3,)
    (mean, scale), (other, _) = (
        derivations.kernel_step(name, x.double().numpy(), u.double().numpy(), sigma, sigma_next, star(sigma), ETA[name])
        for u in (v, reference)
    )
    expected = [derivations.standard_kl(a, b, scale) for a, b in zip(mean, other, strict=True)]
    assert kl.tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)
    normals = (torch.distributions.Normal(torch.tensor(m), scale) for m in (mean, other))
    theirs = torch.distributions.kl_divergence(*normals).flatten(1).sum(1) / x[0].numel()
    assert kl.tolist() == pytest.approx(theirs.tolist(), abs=tolerance, rel=tolerance)


def test_the_kl_pulls_the_mean_to_the_reference_and_is_zero_there():
    mean, other, _ = (torch.tensor(part) for part in batch(8))
    mean.requires_grad_()
    standard_kl(mean, other, 0.3).sum().backward()
    expected = (mean.detach() - other) / (0.3**2 * other[0].numel())
    assert mean.grad.numpy() == pytest.approx(expected.numpy(), abs=1e-12)
    assert standard_kl(other, other, 0.3).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("name", "eta"), [("flow_sde", 0.0), ("dance", -0.1), ("cps", 0.0), ("cps", 1.01), ("flow_sde", float("nan"))]
)
def test_a_noise_level_that_does_not_fit_the_kernel_is_refused(name, eta):
    with pytest.raises(ValidationError, match="eta"):
        KernelConfig(name=name, eta=eta)


def test_an_unknown_density_is_refused():
    with pytest.raises(ValidationError, match="density"):
        KernelConfig(name="cps", density="normal")
