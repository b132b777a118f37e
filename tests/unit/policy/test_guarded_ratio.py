import derivations
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHANNELS, live_dit, make_condition, make_group, measured_vae, normal

from policy.dit import velocity
from policy.folder import save_policy
from policy.kernels import KernelConfig, standard_kl, transition
from policy.objectives import clipped_loss, guarded_log_ratio
from policy.rl import GrpoConfig, GrpoProgram, Start
from policy.sampling import denoise
from policy.schedule import ScheduleConfig

KERNELS = {
    name: KernelConfig(name=name, eta=eta, density="gaussian")
    for name, eta in {"flow_sde": 0.7, "dance": 0.3, "cps": 0.8}.items()
}
SIGMAS = ScheduleConfig(steps=5, shift=3.0).sigmas()
STEPS = {"σ = 1": 0, "middle": 2, "last stochastic": 3}
BATCH = 5
ADVANTAGES = [1.0, -1.0, 2.5, -0.3, 0.0]
CLIP = 5e-4


def moves(kernel, step, size, seed=0, dtype=torch.float64):
    """One step under an old policy and a new one ``size`` away from it, and the old one's noise."""
    x, v, apart, epsilon = (normal(BATCH, 2, 4, 4, 4, seed=4 * seed + k, dtype=torch.float64) for k in range(4))
    levels = (SIGMAS[step], SIGMAS[step + 1], SIGMAS[1])
    velocities = [u.to(dtype) for u in (v, v + size * apart)]
    old, new = (transition(kernel, x.to(dtype), u, *levels) for u in velocities)
    return old, new, epsilon.to(dtype), (x.to(dtype), *velocities)


def ratios_of(old, new, following):
    plain = new.log_prob(following) - old.log_prob(following)
    return plain, guarded_log_ratio(plain, standard_kl(new.mean, old.mean, new.scale), new.scale)


def on_paper(kernel, step, x, v):
    star = SIGMAS[1] if step == 0 else SIGMAS[step]
    return derivations.kernel_step(kernel.name, x, v, SIGMAS[step], SIGMAS[step + 1], star, kernel.eta)


def paper_losses(kernel, step, states, following, velocities, clip_range, advantages=ADVANTAGES):
    """(ratio, loss) per sample of a step whose means come from (old velocity, new velocity)."""
    (old, _), (new, scale) = (on_paper(kernel, step, states, v) for v in velocities)
    rows = []
    for a, x, m, n in zip(advantages, following, old, new, strict=True):
        log_ratio = derivations.log_prob("normal", x, n, scale) - derivations.log_prob("normal", x, m, scale)
        rows.append(derivations.guarded(a, log_ratio, n, m, scale, SIGMAS[step + 1] - SIGMAS[step], clip_range))
    return list(zip(*rows, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_guarded_loss_equals_the_papers_formula(kernel, step, dtype, tolerance):
    old, new, epsilon, inputs = moves(kernel, step, 0.3, dtype=dtype)
    following = old.mean + old.scale * epsilon
    _, log_ratios = ratios_of(old, new, following)
    result = clipped_loss(log_ratios, torch.tensor(ADVANTAGES, dtype=dtype), CLIP)
    losses = result.losses_B / (SIGMAS[step] - SIGMAS[step + 1])
    states, *velocities = (part.double().numpy() for part in inputs)
    ratios, expected = paper_losses(kernel, step, states, following.double().numpy(), velocities, CLIP)
    assert result.ratios_B.tolist() == pytest.approx(ratios, abs=tolerance, rel=tolerance)
    assert losses.tolist() == pytest.approx(expected, abs=tolerance, rel=tolerance)
    assert 0 < int(result.clipped_B.sum()) < BATCH


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@given(size=st.floats(1e-4, 3.0), seed=st.integers(0, 1000))
def test_the_guarded_log_ratio_is_the_linear_term_alone(kernel, step, size, seed):
    old, new, epsilon, (x, *velocities) = moves(kernel, step, size, seed)
    (before, scale), (after, _) = (on_paper(kernel, step, x.numpy(), v.numpy()) for v in velocities)
    linear = (epsilon.numpy() * (after - before)).mean((1, 2, 3, 4))
    _, guarded = ratios_of(old, new, old.mean + old.scale * epsilon)
    assert guarded.tolist() == pytest.approx(linear.tolist(), abs=1e-9)
    # Opposite noise gives the opposite: no part of it is even in the noise, as the drift of the plain ratio is.
    plain, _ = ratios_of(old, new, old.mean + old.scale * epsilon)
    opposite, guarded_opposite = ratios_of(old, new, old.mean - old.scale * epsilon)
    assert (guarded + guarded_opposite).tolist() == pytest.approx([0.0] * BATCH, abs=1e-9)
    drift = -((after - before) ** 2).mean((1, 2, 3, 4)) / scale**2
    assert (plain + opposite).tolist() == pytest.approx(drift.tolist(), abs=1e-9, rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_drift_takes_part_in_the_gradient(kernel):
    old, _, epsilon, (x, v, _) = moves(kernel, 2, 0.0)
    levels, following = (SIGMAS[2], SIGMAS[3], SIGMAS[1]), old.mean + old.scale * epsilon
    apart = v + 0.5
    apart.requires_grad_()
    new = transition(kernel, x, apart, *levels)
    new.mean.retain_grad()
    _, guarded = ratios_of(old, new, following)
    guarded.sum().backward()
    # Of mean ε·Δμ, which is linear in the mean, however far that is.
    assert new.mean.grad.numpy() == pytest.approx(epsilon.numpy() / x[0].numel(), abs=1e-9)


@given(st.permutations(range(BATCH)), st.integers(0, 1000))
def test_members_in_another_order_get_the_same_guarded_ratios_in_that_order(order, seed):
    old, new, epsilon, _ = moves(KERNELS["flow_sde"], 2, 0.5, seed)
    log_probs = [move.log_prob(old.mean + old.scale * epsilon) for move in (old, new)]
    drift = standard_kl(new.mean, old.mean, new.scale)
    here, there = (
        guarded_log_ratio((log_probs[1] - log_probs[0])[k], drift[k], new.scale) for k in (slice(None), order)
    )
    assert torch.equal(there, here[order])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, measured_vae(), live_dit())
    return folder


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_learners_guarded_loss_is_the_papers_and_its_gradient_that_of_the_linear_term(policy, kernel, step):
    program = GrpoProgram(Start(policy), GrpoConfig(guard=True, clip_range=0.5), kernel, SIGMAS)
    module, parameters, condition = program.module, list(program.module.parameters()), make_condition(1)
    shape, levels = (BATCH, 2, CHANNELS, 4, 4), (SIGMAS[step], SIGMAS[step + 1], SIGMAS[1])

    def noise(step):
        return normal(*shape, seed=1000 + step)

    window, members = range(0, step + 1), condition.expand(BATCH)
    result = denoise(module, members, normal(*shape), SIGMAS, window, kernel, noise)
    group = make_group(condition, result, window)
    states, following = group.states(step), group.states(step + 1)

    def output():
        return velocity(module, states, torch.full((BATCH,), SIGMAS[step]), members.inputs_BNCHW, members.text_BTD)

    with torch.no_grad():
        old = output()
        for parameter in parameters:
            parameter.mul_(1.05)
    new = output()
    loss = program.loss(module, program.micro_batches(group, np.array(ADVANTAGES))[step])

    before, after, *velocities = (part.detach().double().numpy() for part in (states, following, old, new))
    ratios, expected = paper_losses(kernel, step, before, after, velocities, 0.5)
    assert loss.stats["ratio"] == pytest.approx(sum(ratios), rel=1e-6)
    assert float(loss.total.detach()) == pytest.approx(sum(expected), abs=5e-6)

    start, end = (transition(kernel, states, v, *levels) for v in (old, new))
    linear = ((following - start.mean) / start.scale * end.mean).flatten(1).mean(1)
    weights = torch.tensor(np.multiply(ADVANTAGES, ratios)).float() / (SIGMAS[step] - SIGMAS[step + 1])
    ours, theirs = (
        torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
        for total in (loss.total, -(weights * linear).sum())
    )
    apart = torch.nn.utils.get_total_norm([a - b for a, b in zip(ours, theirs, strict=True)])
    assert float(apart) <= 1e-4 * float(torch.nn.utils.get_total_norm(theirs))
