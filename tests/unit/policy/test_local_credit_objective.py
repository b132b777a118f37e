"""The policy gradient with advantages for cells, against the formula in NumPy float64."""

import numpy as np
import pytest
import torch
from rl_groups import (
    ADVANTAGES,
    FLOW_SDE,
    LAYERS,
    MEMBERS,
    SIGMAS,
    SIZE,
    WINDOW,
    gradient,
    grpo,
    losses,
    move,
    rolled_out,
    speed,
    step_down,
)

from policy.kernels import transition
from policy.rl import CreditConfig, GrpoConfig

CREDIT = CreditConfig(cells=4)


def test_with_local_credit_an_advantage_that_is_the_same_everywhere_has_the_gradient_of_the_whole_sample(plain):
    program, local = grpo(plain), grpo(plain, credit=CREDIT)
    group = rolled_out(program.module)
    everywhere = np.broadcast_to(ADVANTAGES[:, None, None, None], (MEMBERS, LAYERS, 4, 4))
    for place in range(len(WINDOW)):
        whole, cells = gradient(program, group, ADVANTAGES, place), gradient(local, group, everywhere, place)
        for name in whole:
            torch.testing.assert_close(cells[name], whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("layers", "cells"), [(LAYERS, 4), (LAYERS, 2), (1, 4), (1, 2)])
@pytest.mark.parametrize("clip_range", [1e-4, 10.0])
def test_the_loss_of_local_credit_is_that_of_the_formula(plain, layers, cells, clip_range):
    program = grpo(plain, credit=CREDIT, clip_range=clip_range)
    group = rolled_out(program.module)
    move(program.module)
    advantages = np.random.default_rng(0).standard_normal((MEMBERS, layers, cells, cells)).astype(np.float32)
    advantages[1] = np.nan
    for place, found in enumerate(losses(program, group, advantages)):
        step = WINDOW[place]
        latents = torch.tensor(group.window_GWMCHW[:, place])
        moved = transition(
            FLOW_SDE, latents, speed(program.module, group, latents, SIGMAS[step]), *SIGMAS[step : step + 2], SIGMAS[1]
        )
        after = group.window_GWMCHW[:, place + 1].astype(float)
        old, new = group.means_GWMCHW[:, place].astype(float), moved.mean.double().numpy()
        total = 0.0
        for g in (0, 2):
            parts = []
            for layer, y, x in np.ndindex(LAYERS, SIZE, SIZE):
                here = (g, layer, slice(None), y, x)
                apart = np.mean((after[here] - old[here]) ** 2 - (after[here] - new[here]) ** 2) / (2 * moved.scale**2)
                a = float(advantages[g, layer if layers > 1 else 0, y * cells // SIZE, x * cells // SIZE])
                r = np.exp(apart)
                parts.append(max(-a * r, -a * np.clip(r, 1 - clip_range, 1 + clip_range)))
            total += np.mean(parts)
        assert found.count == 2
        assert float(found.total.detach()) == pytest.approx(total, rel=1e-4)


def test_with_local_credit_an_unchanged_policy_has_ratio_one_and_clips_nothing(plain):
    program = grpo(plain, credit=CREDIT, clip_range=1e-6)
    advantages = np.random.default_rng(0).standard_normal((MEMBERS, LAYERS, 4, 4)).astype(np.float32)
    for found in losses(program, rolled_out(program.module), advantages):
        assert found.stats["max_ratio_error"] == 0
        assert found.stats["clipped"] == 0
        assert float(found.total.detach()) == pytest.approx(-advantages.mean((1, 2, 3)).sum(), abs=1e-5)


def test_local_credit_moves_a_policy_where_its_advantages_are_and_not_elsewhere(plain):
    program = grpo(plain, credit=CREDIT, clip_range=10.0)
    group = rolled_out(program.module)
    advantages = np.zeros((MEMBERS, LAYERS, 4, 4), np.float32)
    advantages[0, 0, :2] = 1.0
    before = program.recompute(program.module, group)[0].means_GWMCHW[0, 0]
    step_down(program, group, advantages, 0, 0.02)
    after = program.recompute(program.module, group)[0].means_GWMCHW[0, 0]
    wanted = group.window_GWMCHW[0, 1]
    nearer = (before - wanted) ** 2 - (after - wanted) ** 2
    assert nearer[0, :, :2].mean() > 0
    assert nearer[0, :, :2].mean() > 2 * abs(nearer[1].mean())


def test_local_credit_and_guard_exclude_each_other():
    with pytest.raises(ValueError, match="leave one out"):
        GrpoConfig(guard=True, credit=CREDIT)
