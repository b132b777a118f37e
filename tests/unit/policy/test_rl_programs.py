from copy import deepcopy
from dataclasses import replace

import derivations
import numpy as np
import pytest
import torch
from rl_groups import (
    ADVANTAGES,
    FLOW_SDE,
    GAUSSIAN,
    KEY,
    LAYERS,
    MEMBERS,
    OBJECTIVES,
    SIGMAS,
    SIZE,
    WINDOW,
    gradient,
    grpo,
    losses,
    move,
    nft,
    norm,
    rolled_out,
    speed,
    step_down,
    weights,
)
from tiny_models import measured_vae

from policy.dit import from_tokens
from policy.folder import load_transformer, load_vae
from policy.group import Recording
from policy.rl import CreditConfig, GrpoConfig, NftConfig, training_times
from policy.weights import digest


@pytest.mark.parametrize("make", [grpo, nft])
def test_the_policy_is_in_evaluation_mode_and_only_what_the_start_says_is_trainable(start, make):
    program = make(start, kl=0.1)
    assert not program.module.training
    names = {name for name, p in program.module.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in program.module.named_parameters() if start.lora is None or ".policy." in n}
    assert names


@pytest.mark.parametrize("kl", [0.0, 0.1], ids=["without a reference", "with a reference"])
@pytest.mark.parametrize("make", [grpo, nft])
def test_an_exported_policy_loads_and_computes_what_the_trained_one_does(start, make, kl, tmp_path):
    program = make(start, kl=kl)
    before = rolled_out(program.module, window=range(0))
    move(program.module)
    program.export(tmp_path, weights(program, start))
    loaded = load_transformer(tmp_path)
    after, again = (rolled_out(module, window=range(0)) for module in (program.module, loaded))
    assert np.array_equal(again.clean_GMCHW, after.clean_GMCHW)
    assert not np.array_equal(again.clean_GMCHW, before.clean_GMCHW)
    assert digest(load_vae(tmp_path).state_dict()) == digest(measured_vae().state_dict())


def test_each_objective_says_what_rollouts_must_carry():
    assert GrpoConfig(credit=CreditConfig()).recording == Recording(window=True, means=True, times=0)
    assert GrpoConfig().recording == Recording(window=True, means=False, times=0)
    assert GrpoConfig(guard=True).recording == Recording(window=True, means=True, times=0)
    assert NftConfig(times=3).recording == Recording(window=False, means=False, times=3)


# GRPO


def step_by_hand(module, group, place, kernel):
    """(mean, noise scale) of a recorded step under a module, in float64."""
    step, states = group.steps[place], group.states(place)
    v = speed(module, group, states, SIGMAS[step]).double().numpy()
    star = SIGMAS[1] if step == 0 else SIGMAS[step]
    return derivations.kernel_step(
        kernel.name, states.double().numpy(), v, SIGMAS[step], SIGMAS[step + 1], star, kernel.eta
    )


def log_probs_by_hand(module, group, place, kernel):
    mean, scale = step_by_hand(module, group, place, kernel)
    following = group.states(place + 1).double().numpy()
    density = "gaussian" if kernel.gaussian else "cps"
    return np.array([derivations.log_prob(density, x, m, scale) for x, m in zip(following, mean, strict=True)])


def kl_by_hand(module, other, group, place, kernel):
    (mean, scale), (other_mean, _) = (step_by_hand(m, group, place, kernel) for m in (module, other))
    return ((mean - other_mean) ** 2).reshape(MEMBERS, -1).mean(1) / (2 * scale**2)


@pytest.mark.parametrize("kernel", GAUSSIAN.values(), ids=GAUSSIAN)
def test_the_guarded_first_ratio_is_exactly_one_and_its_loss_is_divided_by_the_step(plain, kernel):
    program = grpo(plain, kernel, guard=True, clip_range=1e-6)
    found = losses(program, rolled_out(program.module, kernel))
    assert len(found) == len(WINDOW)
    for place, loss in enumerate(found):
        assert loss.count == 2
        assert loss.stats["ratio"] == 2.0
        assert loss.stats["max_ratio"] == 1.0
        assert loss.stats["max_ratio_error"] == 0.0
        assert loss.stats["clipped"] == loss.stats["approx_kl"] == 0.0
        assert float(loss.total.detach()) == pytest.approx(-1.0 / (SIGMAS[place] - SIGMAS[place + 1]), rel=1e-6)


@pytest.mark.parametrize(("kernel", "guard"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_loss_of_a_policy_that_has_moved_is_the_clipped_formula(plain, kernel, guard):
    program = grpo(plain, kernel, guard=guard, clip_range=0.01)
    old = deepcopy(program.module)
    group = rolled_out(old, kernel)
    move(program.module)
    for place, loss in enumerate(losses(program, group, np.array([1.5, -2.0, -0.5]))):
        log_ratios = np.subtract(*(log_probs_by_hand(m, group, place, kernel) for m in (program.module, old)))
        k3, divisor = float((np.exp(log_ratios) - 1 - log_ratios).sum()), 1.0
        if guard:
            _, scale = step_by_hand(old, group, place, kernel)
            log_ratios = (log_ratios + kl_by_hand(program.module, old, group, place, kernel)) * scale
            divisor = SIGMAS[place] - SIGMAS[place + 1]
        parts = [derivations.clipped(a, r, 0.01) for a, r in zip([1.5, -2.0, -0.5], log_ratios, strict=True)]
        assert float(np.abs(log_ratios).max()) > 1e-3
        assert float(loss.total.detach()) == pytest.approx(sum(part for part, _ in parts) / divisor, rel=5e-5)
        assert loss.stats["clipped"] == sum(gone for _, gone in parts)
        assert loss.stats["ratio"] == pytest.approx(np.exp(log_ratios).sum(), rel=5e-5)
        assert loss.stats["max_ratio_error"] == pytest.approx(np.abs(np.exp(log_ratios) - 1).max(), abs=3e-5)
        assert loss.stats["approx_kl"] == pytest.approx(k3, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guard"])
def test_a_member_without_a_score_changes_neither_the_loss_nor_the_gradient(plain, guard):
    program = grpo(plain, guard=guard, clip_range=0.5)
    group = rolled_out(program.module)
    move(program.module)
    without, neutral = (np.array([1.2, middle, -0.7]) for middle in (np.nan, 0.0))
    missing, zero = losses(program, group, without), losses(program, group, neutral)
    assert [(m.count, z.count) for m, z in zip(missing, zero, strict=True)] == [(2, 3)] * 3
    for place in range(3):
        assert missing[place].total.item() == pytest.approx(zero[place].total.item(), rel=5e-6)
        ours, theirs = (gradient(program, group, a, place) for a in (without, neutral))
        assert norm(theirs) > 0
        assert norm({name: ours[name] - theirs[name] for name in ours}) <= 1e-5 * norm(theirs)


def test_the_kl_to_the_start_is_zero_at_the_start_and_leaves_the_loss_alone(start):
    with_kl, without = grpo(start, kl=0.5), grpo(start)
    group = rolled_out(with_kl.module)
    for ours, theirs in zip(losses(with_kl, group), losses(without, group), strict=True):
        assert ours.stats["kl"] == 0.0
        assert ours.total.item() == theirs.total.item()
        assert "kl" not in theirs.stats


@pytest.mark.parametrize("name", ["flow_sde, guard", "published cps, plain"])
def test_the_kl_to_the_start_is_that_of_the_gaussians_and_adds_to_the_loss(start, name):
    kernel, guard = OBJECTIVES[name]
    with_kl, without = (grpo(start, kernel, guard=guard, clip_range=0.5, kl=kl) for kl in (20.0, 0.0))
    first = deepcopy(without.module)
    group = rolled_out(first, kernel)
    for program in (with_kl, without):
        move(program.module)
    for place, (ours, theirs) in enumerate(zip(losses(with_kl, group), losses(without, group), strict=True)):
        expected = kl_by_hand(without.module, first, group, place, kernel)[[0, 2]].sum()  # member 1 has no score
        assert expected > 0
        assert ours.stats["kl"] == pytest.approx(expected, rel=1e-4)
        assert ours.total.item() - theirs.total.item() == pytest.approx(20 * expected, rel=1e-3)


def test_the_kl_stays_that_to_the_start_when_rollouts_come_from_a_later_policy(start):
    program = grpo(start, kl=0.5)
    first = deepcopy(program.module)
    move(program.module)
    group = rolled_out(program.module)
    program.begin_batch(lambda: weights(program, start))
    (loss, *_) = losses(program, group)
    assert loss.stats["max_ratio_error"] == 0.0
    expected = kl_by_hand(program.module, first, group, 0, FLOW_SDE)[[0, 2]].sum()
    assert loss.stats["kl"] == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_the_kl_pulls_back_to_the_start_and_reaches_only_what_is_trained(start):
    program = grpo(start, kl=0.5)
    group = rolled_out(program.module)
    move(program.module)
    nothing_else = np.zeros(MEMBERS)
    found = gradient(program, group, nothing_else)
    assert norm(found) > 0
    moved = {name for name, value in found.items() if value.any()}
    assert moved <= {name for name, p in program.module.named_parameters() if p.requires_grad}
    (before, *_) = losses(program, group, nothing_else)
    step_down(program, group, nothing_else, 0, length=1e-3)
    (after, *_) = losses(program, group, nothing_else)
    assert 0 < after.stats["kl"] < before.stats["kl"]


@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guard"])
def test_recomputing_with_unchanged_weights_gives_back_the_same_group(start, guard):
    program = grpo(start, guard=guard)
    group = rolled_out(program.module)
    again, error = program.recompute(program.module, group)
    assert error == 0.0
    assert np.array_equal(again.log_probs_GW, group.log_probs_GW)
    assert np.array_equal(again.means_GWMCHW, group.means_GWMCHW) if guard else again.means_GWMCHW is None
    assert np.array_equal(again.window_GWMCHW, group.window_GWMCHW)
    assert (again.key, again.steps) == (group.key, group.steps)


@pytest.mark.parametrize("kl", [0.0, 0.5], ids=["without a reference", "with a reference"])
@pytest.mark.parametrize("guard", [False, True], ids=["plain", "guard"])
def test_recomputing_after_a_change_tells_it_and_makes_the_next_ratio_exactly_one(start, guard, kl):
    program = grpo(start, guard=guard, kl=kl)
    group = rolled_out(program.module)
    delivered = group.log_probs_GW.copy()
    move(program.module)
    again, error = program.recompute(program.module, group)
    by_hand = np.stack([log_probs_by_hand(program.module, group, place, FLOW_SDE) for place in range(3)], 1)
    assert error == pytest.approx(np.abs(np.exp(by_hand - delivered) - 1).max(), rel=1e-3)
    assert error > 1e-3
    assert np.array_equal(group.log_probs_GW, delivered)
    assert max(loss.stats["max_ratio_error"] for loss in losses(program, group)) > 0
    for loss in losses(program, again):
        assert loss.stats["max_ratio_error"] == 0.0
        assert loss.total.requires_grad


# DiffusionNFT


def met(program, micro):
    """(loss, noisy latents that the policy met)."""
    seen = []
    hook = program.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    loss = program.loss(program.module, micro)
    hook.remove()
    return loss, from_tokens(seen[-1][:, : LAYERS * (SIZE // 2) ** 2], LAYERS, SIZE, SIZE)


def noise_of(program, group, place=0):
    """The noise of a group: what is left of the noisy latents when the clean ones are zero."""
    blank = replace(group, clean_GMCHW=np.zeros_like(group.clean_GMCHW))
    _, noisy = met(program, program.micro_batches(blank, np.zeros(len(blank.clean_GMCHW)))[place])
    return noisy / SIGMAS[group.steps[place]]


def nft_by_hand(v, old, noisy, clean, time, advantage, beta, top):
    """Two implicit policies mirrored at the old one, each one's error over its own mean size."""

    def part(guess):
        error = noisy - time * guess - clean
        return np.mean(error**2) / np.mean(np.abs(error))

    right = min(max((advantage / top + 1) / 2, 0.0), 1.0)
    return (right * part(old + beta * (v - old)) + (1 - right) * part(old - beta * (v - old))) * top / beta


def test_the_policy_meets_the_clean_latents_mixed_with_noise_at_a_level_of_the_schedule(plain):
    program = nft(plain)
    group = rolled_out(program.module, window=range(0))
    micros = program.micro_batches(group, ADVANTAGES)
    assert len(micros) == len(group.steps) == 2
    for place, micro in enumerate(micros):
        time = SIGMAS[group.steps[place]]
        _, noisy = met(program, micro)
        expected = (1 - time) * torch.tensor(group.clean_GMCHW) + time * noise_of(program, group, place)
        assert torch.allclose(noisy, expected, atol=1e-5)


def test_noise_follows_from_the_key_and_the_member_alone(plain):
    program, other = nft(plain), nft(plain, beta=0.3)
    group = rolled_out(program.module, window=range(0))
    torch.manual_seed(1)
    noise = noise_of(program, group)
    torch.manual_seed(2)
    move(other.module)
    assert torch.equal(noise_of(other, group), noise)
    fewer = replace(group, clean_GMCHW=group.clean_GMCHW[:2])
    assert torch.equal(noise_of(program, fewer), noise[:2])
    draws = [*noise, *noise_of(program, group, place=1)]
    for key in [(8, 1, 4), (7, 2, 4), (7, 1, 5), (1, 7, 4)]:
        draws += list(noise_of(program, replace(group, key=key)))
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)
    values = torch.stack(draws)
    assert float(values.mean()) == pytest.approx(0, abs=0.1)
    assert float(values.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_the_loss_at_the_old_policy_does_not_depend_on_the_advantage(start, beta):
    program = nft(start, beta=beta, advantage_max=2.0)
    group = rolled_out(program.module, window=range(0))
    for micro in program.micro_batches(group, ADVANTAGES):
        time = SIGMAS[group.steps[micro[2]]]
        loss, noisy = met(program, micro)
        v = speed(program.module, group, noisy, time).double().numpy()
        errors = noisy.double().numpy() - time * v - group.clean_GMCHW
        sizes = [np.mean(error**2) / np.mean(np.abs(error)) for error in errors]
        assert loss.total.item() == pytest.approx(2.0 / beta * (sizes[0] + sizes[2]), rel=5e-5)
        assert loss.stats["drift"] == 0.0
        assert loss.count == 2


def test_the_loss_of_a_policy_that_has_moved_is_that_of_the_two_mirrored_policies(start):
    program = nft(start, beta=0.4, advantage_max=2.0)
    group = rolled_out(program.module, window=range(0))
    old, advantages = deepcopy(program.module), np.array([1.0, -1.5, 7.0])
    move(program.module)
    for micro in program.micro_batches(group, advantages):
        time = SIGMAS[group.steps[micro[2]]]
        loss, noisy = met(program, micro)
        v, before = (speed(m, group, noisy, time).double().numpy() for m in (program.module, old))
        expected = [
            nft_by_hand(*arrays, time, a, 0.4, 2.0)
            for *arrays, a in zip(v, before, noisy.double().numpy(), group.clean_GMCHW, advantages, strict=True)
        ]
        assert loss.total.item() == pytest.approx(sum(expected), rel=5e-5)
        assert loss.stats["drift"] == pytest.approx(((v - before) ** 2).mean((1, 2, 3, 4)).sum(), rel=1e-4)
        assert loss.stats["drift"] > 0
        assert loss.count == 3


@pytest.mark.parametrize("kl", [0.0, 0.5], ids=["without a reference", "with a reference"])
def test_a_member_without_a_score_reaches_neither_the_count_nor_the_gradient(start, kl):
    program = nft(start, kl=kl)
    group = rolled_out(program.module, window=range(0))
    lost = replace(group, clean_GMCHW=group.clean_GMCHW.copy())
    lost.clean_GMCHW[1] += 3.0
    for place in range(2):
        ours = gradient(program, group, ADVANTAGES, place)
        assert norm(ours) > 0
        assert all(bool(value.isfinite().all()) for value in ours.values())
        changed = gradient(program, lost, ADVANTAGES, place)
        assert norm({name: ours[name] - changed[name] for name in ours}) <= 1e-5 * norm(ours)
    for ours, theirs in zip(losses(program, group), losses(program, lost), strict=True):
        assert ours.count == 2
        assert ours.total.item() == pytest.approx(theirs.total.item(), rel=1e-5)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_a_better_sample_draws_the_prediction_to_itself_and_a_worse_one_drives_it_away(start, advantage):
    program = nft(start)
    group = rolled_out(program.module, window=range(0))
    advantages = np.array([advantage, np.nan, np.nan])
    micro = program.micro_batches(group, advantages)[0]
    time, (_, noisy) = SIGMAS[group.steps[0]], met(program, micro)

    def distance():
        clean = noisy - time * speed(program.module, group, noisy, time)
        return float(((clean - torch.tensor(group.clean_GMCHW))[0].double() ** 2).mean())

    before = distance()
    step_down(program, group, advantages, 0, length=1e-2)
    assert (before - distance()) * advantage > 1e-4 * before


def test_a_new_batch_measures_drift_against_the_weights_it_began_with(start):
    program = nft(start)
    group = rolled_out(program.module, window=range(0))
    move(program.module)
    assert all(loss.stats["drift"] > 0 for loss in losses(program, group))
    program.begin_batch(lambda: weights(program, start))
    assert [loss.stats["drift"] for loss in losses(program, group)] == [0.0, 0.0]
    middle = deepcopy(program.module)
    move(program.module, seed=12)
    for micro in program.micro_batches(group, np.zeros(MEMBERS)):
        loss, noisy = met(program, micro)
        new, old = (speed(m, group, noisy, SIGMAS[group.steps[micro[2]]]) for m in (program.module, middle))
        assert loss.stats["drift"] == pytest.approx(float(((new - old) ** 2).mean((1, 2, 3, 4)).sum()), rel=1e-4)


def test_the_kl_of_the_forward_process_is_the_squared_distance_from_the_start_in_velocity(start):
    with_kl, without = (nft(start, kl=kl) for kl in (0.5, 0.0))
    first = deepcopy(without.module)
    group = rolled_out(first, window=range(0))
    assert [loss.stats["kl"] for loss in losses(with_kl, group)] == [0.0, 0.0]
    for program in (with_kl, without):
        move(program.module)
        program.begin_batch(lambda program=program: weights(program, start))
    pairs = zip(*(program.micro_batches(group, ADVANTAGES) for program in (with_kl, without)), strict=True)
    for micro, plain_micro in pairs:
        ours, noisy = met(with_kl, micro)
        theirs = without.loss(without.module, plain_micro)
        new, old = (speed(m, group, noisy, SIGMAS[group.steps[micro[2]]]) for m in (without.module, first))
        expected = float(((new - old) ** 2).mean((1, 2, 3, 4))[[0, 2]].sum())
        assert expected > 0
        assert ours.stats["kl"] == pytest.approx(expected, rel=1e-4)
        assert ours.total.item() - theirs.total.item() == pytest.approx(0.5 * expected, rel=1e-2)
        assert ours.stats["drift"] == 0.0


def test_training_levels_are_distinct_steps_in_order_and_follow_from_the_key_alone():
    picked = {key: training_times(key, 3, 10) for key in [(s, 1, g) for s in range(3) for g in range(10)]}
    assert all(len(set(steps)) == 3 and list(steps) == sorted(steps) for steps in picked.values())
    assert {step for steps in picked.values() for step in steps} == set(range(10))
    np.random.seed(1)
    assert all(training_times(key, 3, 10) == steps for key, steps in picked.items())
    assert training_times(KEY, 5, 5) == (0, 1, 2, 3, 4)
