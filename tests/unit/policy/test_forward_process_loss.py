import derivations
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import normal

from policy.objectives import flow_matching_pair, nft_loss
from policy.rl import training_times
from policy.schedule import ScheduleConfig

SIGMAS = ScheduleConfig(steps=10).sigmas()
SHAPE = (5, 2, 4, 4, 4)
ADVANTAGES = [-9.0, -2.0, 0.0, 1.3, 12.0]  # the first and the last beyond A_max
BETAS = (0.1, 0.5, 1.0, 2.0)


def drawn(seed=0, dtype=torch.float64):
    """Clean latents, noise, velocity and old velocity, as a trained model has them: near ε − x₀."""
    clean, noise, near, step = (normal(*SHAPE, seed=4 * seed + k, dtype=torch.float64) for k in range(4))
    old = noise - clean + 0.5 * near
    return [part.to(dtype) for part in (clean, noise, old + 0.2 * step, old)]


def loss_of(clean, noise, v, old, time, advantages, beta, advantage_max=5.0):
    noisy, _ = flow_matching_pair(clean, noise, torch.full((len(clean),), time, dtype=clean.dtype))
    weights = torch.tensor(advantages, dtype=clean.dtype)
    return nft_loss(v, old, noisy, clean, time, weights, beta, advantage_max)


@pytest.mark.parametrize(
    ("beta", "positive", "negative", "policy"), [(1.0, 0.06, 0.18, 0.48), (0.5, 0.0, 0.12, 0.36)], ids=["β 1", "β ½"]
)
def test_the_nft_loss_reproduces_the_numbers_published_by_the_peers(beta, positive, negative, policy):
    # Their "policy" is the whole loss, A_max·(r·L⁺ + (1 − r)·L⁻)/β, with A_max and 1/β in it: at β = 1
    # 5·(.7·.06 + .3·.18) = .48, at β = ½ 5·(.7·0 + .3·.12)/.5 = .36. Beyond ±A_max only one of L± is left.
    point = [np.array(part) for part in ([0.5, -0.5], [1.0, 0.0], [0.6, 0.4], [0.4, 0.6])]
    parts = [torch.tensor(part).view(1, 1, 1, 1, 2).expand(3, -1, -1, -1, -1) for part in point]
    losses = loss_of(*parts, 0.6, [2.0, 5.0, -5.0], beta)
    assert losses.tolist() == pytest.approx([policy, 5 * positive / beta, 5 * negative / beta], abs=1e-12)
    clean, noise, v, old = point
    assert derivations.nft(clean, noise, 0.6, v, old, 2.0, beta, 5.0) == pytest.approx(
        (positive, negative, policy), abs=1e-12
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("time", [1.0, 0.75, 0.25], ids="t = {}".format)
@pytest.mark.parametrize("beta", BETAS)
def test_the_nft_loss_equals_the_papers_formula(beta, time, dtype, tolerance):
    parts = drawn(dtype=dtype)
    losses = loss_of(*parts, time, ADVANTAGES, beta)
    rows = zip(*(part.double().numpy() for part in parts), ADVANTAGES, strict=True)
    expected = [derivations.nft(x, e, time, v, u, a, beta, 5.0)[2] for x, e, v, u, a in rows]
    assert losses.dtype == dtype
    assert losses.tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)


def test_a_nearly_perfect_prediction_is_not_divided_by_next_to_nothing():
    clean, noise, *_ = drawn(1)
    v = noise - clean + 1e-7
    losses = loss_of(clean, noise, v, v, 0.5, ADVANTAGES, 1.0)
    assert losses.tolist() == pytest.approx([5 * (0.5e-7) ** 2 / 1e-5] * 5, rel=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_nft_gradient_is_that_of_its_formula_with_the_divisors_held_still(beta):
    time, (clean, noise, v, old) = 0.6, [part[:, :1, :1, :2, :2] for part in drawn(2)]
    v = v.clone().requires_grad_()
    loss_of(clean, noise, v, old, time, ADVANTAGES, beta).sum().backward()
    rows = zip(*(part.detach().numpy() for part in (clean, noise, v, old)), ADVANTAGES, strict=True)
    for row, (x, e, here, u, a) in enumerate(rows):
        divisors = derivations.nft_divisors(x, e, time, here, u, beta)
        for place in np.ndindex(here.shape):
            step = np.zeros_like(here)
            step[place] = 1e-3  # the loss is a parabola in v: its central difference is exact
            up, down = (derivations.nft(x, e, time, here + s, u, a, beta, 5.0, divisors)[2] for s in (step, -step))
            assert float(v.grad[row][place]) == pytest.approx((up - down) / 2e-3, abs=1e-9)


@given(st.integers(0, 1000), st.floats(0.05, 1.0), st.floats(0.05, 3.0), st.floats(1.0, 10.0))
def test_at_the_old_policy_the_nft_gradient_is_the_advantage_times_that_of_a_plain_regression(
    seed, time, beta, advantage_max
):
    clean, noise, _, old = (part[:, :1] for part in drawn(seed))
    v = old.clone().requires_grad_()
    loss_of(clean, noise, v, old, time, ADVANTAGES, beta, advantage_max).sum().backward()
    error = time * (noise - clean - old)
    plain = -2 * time * error / error[0].numel() / error.abs().mean((1, 2, 3, 4), keepdim=True)
    capped = torch.tensor(ADVANTAGES, dtype=torch.float64).clamp(-advantage_max, advantage_max).view(-1, 1, 1, 1, 1)
    assert v.grad.numpy() == pytest.approx((capped * plain).numpy(), abs=1e-9)


def test_the_old_policy_gets_no_nft_gradient():
    clean, noise, v, old = (part.requires_grad_() for part in drawn(3))
    loss_of(clean.detach(), noise.detach(), v, old, 0.6, ADVANTAGES, 0.5).sum().backward()
    assert v.grad is not None
    assert old.grad is None


@given(st.permutations(range(5)), st.integers(0, 1000), st.sampled_from(BETAS))
def test_members_in_another_order_get_the_same_nft_losses_in_that_order(order, seed, beta):
    parts = drawn(seed)
    here = loss_of(*parts, 0.6, ADVANTAGES, beta)
    there = loss_of(*(part[order] for part in parts), 0.6, [ADVANTAGES[k] for k in order], beta)
    assert there.tolist() == pytest.approx(here[order].tolist(), abs=1e-12)


@st.composite
def draws_of_times(draw):
    steps = draw(st.integers(1, 40))
    key = draw(st.tuples(st.integers(0, 2**31), st.integers(0, 10_000), st.integers(0, 500)))
    return key, draw(st.integers(1, steps)), steps


@given(draws_of_times())
def test_training_times_are_distinct_steps_of_the_schedule_in_its_order(arguments):
    _, times, steps = arguments
    picked = training_times(*arguments)
    assert len(picked) == times
    assert list(picked) == sorted(set(picked))
    assert set(picked) <= set(range(steps))
    assert {type(step) for step in picked} == {int}


@given(draws_of_times(), st.integers(0, 2**32 - 1))
def test_training_times_follow_from_their_arguments_alone(arguments, seed):
    before = training_times(*arguments)
    state = np.random.get_state()
    np.random.seed(seed)
    training_times((seed, 1, 2), 1, 5)  # what others ask for leaves no trace
    assert training_times(*arguments) == before
    np.random.set_state(state)


def test_training_times_differ_with_seed_step_and_group():
    for axis in range(3):
        picked = {training_times(tuple(n if k == axis else 7 for k in range(3)), 4, 20) for n in range(20)}
        assert len(picked) > 15


def test_every_step_of_the_schedule_is_trained_about_equally_often():
    picked = [step for n in range(500) for step in training_times((0, n, 3), 4, 10)]
    counts = [picked.count(step) for step in range(10)]
    assert min(counts) > 160  # 200 each on average, standard deviation 11
    assert max(counts) < 240
