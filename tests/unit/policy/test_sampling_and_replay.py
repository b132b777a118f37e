import itertools

import derivations
import numpy as np
import pytest
import torch
from tiny_models import CHANNELS, live_dit, make_condition, make_group, measured_vae, normal
from torch import nn

from policy.dit import to_tokens, velocity
from policy.folder import save_policy
from policy.kernels import KernelConfig, transition
from policy.objectives import clipped_loss
from policy.rl import GrpoConfig, GrpoProgram, Start
from policy.sampling import Condition, denoise, initial_noise, member_noise, step_noise
from policy.schedule import ScheduleConfig

KERNELS = {"flow_sde": 0.7, "dance": 0.3, "cps": 0.8}
SIGMAS = ScheduleConfig(steps=5, shift=3.0).sigmas()
BATCH, LAYERS, SIZE = 3, 2, 4
SHAPE = (BATCH, LAYERS, CHANNELS, SIZE, SIZE)
WINDOWS = {
    "first steps (σ = 1)": range(0, 2),
    "middle": range(1, 3),
    "last stochastic": range(3, 4),
    "all": range(0, 4),
}


@pytest.fixture(scope="module")
def model():
    return live_dit().requires_grad_(False)


def noise(step):
    return normal(*SHAPE, seed=1000 + step)


def sample(model, window, name="flow_sde", storage=torch.float32, sigmas=SIGMAS):
    kernel = KernelConfig(name=name, eta=KERNELS[name])
    return denoise(model, make_condition(BATCH), normal(*SHAPE, seed=7), sigmas, window, kernel, noise, storage)


def replayed(model, result, window, name):
    """Log-probs of the stored window as a learner computes them: from the states alone."""
    kernel, condition, columns = KernelConfig(name=name, eta=KERNELS[name]), make_condition(BATCH), []
    for place, step in enumerate(window):
        state, following = (result.window_BWMCHW[:, place + k].float() for k in (0, 1))
        times = torch.full((BATCH,), SIGMAS[step])
        v = velocity(model, state, times, condition.inputs_BNCHW, condition.text_BTD)
        move = transition(kernel, state, v, SIGMAS[step], SIGMAS[step + 1], SIGMAS[1])
        columns.append(move.log_prob(following))
    return torch.stack(columns, 1)


def euler_by_hand(model, latents, steps, sigmas=SIGMAS):
    condition = make_condition(BATCH)
    for step in steps:
        times = torch.full((BATCH,), sigmas[step])
        v = velocity(model, latents, times, condition.inputs_BNCHW, condition.text_BTD)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * v
    return latents


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_replay_gives_the_delivered_log_probs_to_the_bit(model, name, window, storage):
    result = sample(model, window, name, storage)
    assert result.window_BWMCHW.dtype == storage
    assert result.window_BWMCHW.shape == (BATCH, len(window) + 1, LAYERS, CHANNELS, SIZE, SIZE)
    assert result.log_probs_BW.dtype == torch.float32
    again = replayed(model, result, window, name)
    assert torch.equal(again, result.log_probs_BW)
    loss = clipped_loss((again - result.log_probs_BW)[:, 0], torch.ones(BATCH), 1e-6)
    assert loss.ratios_B.tolist() == [1.0] * BATCH


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("name", KERNELS)
def test_the_window_holds_the_states_the_kernel_moved_between(model, name, window):
    result, condition = sample(model, window, name), make_condition(BATCH)
    for place, step in enumerate(window):
        state = result.window_BWMCHW[:, place]
        v = velocity(model, state, torch.full((BATCH,), SIGMAS[step]), condition.inputs_BNCHW, condition.text_BTD)
        star = SIGMAS[1] if step == 0 else SIGMAS[step]
        mean, scale = derivations.kernel_step(
            name, state.double().numpy(), v.double().numpy(), SIGMAS[step], SIGMAS[step + 1], star, KERNELS[name]
        )
        following = mean + scale * noise(step).double().numpy()
        tolerance = 1e-6 * np.abs(following).max()
        assert np.abs(result.window_BWMCHW[:, place + 1].double().numpy() - following).max() <= tolerance
        expected = [derivations.log_prob(name, x, m, scale) for x, m in zip(following, mean, strict=True)]
        assert result.log_probs_BW[:, place].tolist() == pytest.approx(expected, abs=2e-6, rel=2e-6)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_outside_the_window_sampling_is_a_plain_euler_loop(model, window):
    result = sample(model, window)
    before = euler_by_hand(model, normal(*SHAPE, seed=7), range(0, window[0]))
    assert torch.equal(result.window_BWMCHW[:, 0], before)
    after = euler_by_hand(model, result.window_BWMCHW[:, -1], range(window[-1] + 1, len(SIGMAS) - 1))
    assert torch.equal(result.latents_BMCHW, after)


def test_without_a_window_the_whole_run_is_a_plain_euler_loop_and_records_nothing(model):
    result = denoise(model, make_condition(BATCH), normal(*SHAPE, seed=7), SIGMAS)
    assert torch.equal(result.latents_BMCHW, euler_by_hand(model, normal(*SHAPE, seed=7), range(len(SIGMAS) - 1)))
    assert result.window_BWMCHW.numel() == 0
    assert result.log_probs_BW.shape == (BATCH, 0)
    assert result.means_BWMCHW.shape == (BATCH, 0)


class Linear(nn.Module):
    """A velocity known on paper: v = x/2 − σ at every place."""

    def forward(self, hidden_states, timestep, **_):
        return (hidden_states / 2 - timestep.view(-1, 1, 1),)


def test_the_ode_of_a_velocity_known_on_paper_comes_out_as_on_paper():
    result = denoise(Linear(), make_condition(BATCH), normal(*SHAPE, seed=7).double(), SIGMAS)
    x = normal(*SHAPE, seed=7).double().numpy()
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        x = derivations.euler(x, x / 2 - sigma, sigma, sigma_next)
    assert result.latents_BMCHW.dtype == torch.float64
    assert result.latents_BMCHW.numpy() == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_recorded_means_give_the_recorded_log_probs(model, name, storage):
    window = WINDOWS["all"]
    result = sample(model, window, name, storage)
    assert result.means_BWMCHW.dtype == torch.float32
    assert result.means_BWMCHW.shape == (BATCH, len(window), *SHAPE[1:])
    for place, step in enumerate(window):
        star = SIGMAS[1] if step == 0 else SIGMAS[step]
        _, scale = derivations.kernel_step(name, 0.0, 0.0, SIGMAS[step], SIGMAS[step + 1], star, KERNELS[name])
        mean, following = result.means_BWMCHW[:, place], result.window_BWMCHW[:, place + 1]
        rows = zip(following.double().numpy(), mean.double().numpy(), strict=True)
        expected = [derivations.log_prob(name, row, row_mean, scale) for row, row_mean in rows]
        assert result.log_probs_BW[:, place].tolist() == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_replay_gives_the_recorded_means_to_the_bit(model, name, storage):
    window, condition = WINDOWS["all"], make_condition(BATCH)
    result = sample(model, window, name, storage)
    for place, step in enumerate(window):
        state, times = result.window_BWMCHW[:, place].float(), torch.full((BATCH,), SIGMAS[step])
        v = velocity(model, state, times, condition.inputs_BNCHW, condition.text_BTD)
        kernel = KernelConfig(name=name, eta=KERNELS[name])
        move = transition(kernel, state, v, SIGMAS[step], SIGMAS[step + 1], SIGMAS[1])
        assert torch.equal(move.mean, result.means_BWMCHW[:, place])


def test_the_model_meets_the_very_states_that_are_stored(model):
    met = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: met.append(kwargs["hidden_states"]), with_kwargs=True
    )
    window = range(1, 4)
    result = sample(model, window, storage=torch.bfloat16)
    hook.remove()
    tokens = LAYERS * (SIZE // 2) ** 2
    for place, step in enumerate(window):
        assert torch.equal(met[step][:, :tokens], to_tokens(result.window_BWMCHW[:, place].float()))


def test_low_precision_storage_changes_the_states_by_its_rounding_and_no_more(model):
    coarse, fine = (sample(model, range(1, 3), storage=dtype) for dtype in (torch.bfloat16, torch.float32))
    error = (coarse.window_BWMCHW[:, 0].float() - fine.window_BWMCHW[:, 0]).abs()
    assert float(error.max()) > 0
    assert bool((error <= fine.window_BWMCHW[:, 0].abs() * 2**-8).all())


def test_noise_is_asked_for_once_per_window_step_and_only_there(model):
    asked = []

    def counted(step):
        asked.append(step)
        return noise(step)

    denoise(model, make_condition(BATCH), normal(*SHAPE), SIGMAS, range(1, 4), KernelConfig(), counted)
    assert asked == [1, 2, 3]


def test_sampling_builds_no_autograd_graph():
    result = sample(live_dit(), range(0, 2))
    assert not result.latents_BMCHW.requires_grad
    assert not result.log_probs_BW.requires_grad
    assert not result.means_BWMCHW.requires_grad


def test_a_window_on_the_last_step_is_refused(model):
    with pytest.raises(ValueError, match="last step of a schedule is an ODE step"):
        sample(model, range(4, 5))


def test_a_condition_is_repeated_for_every_member_of_a_group():
    single = make_condition(1)
    masked = Condition(single.inputs_BNCHW, single.text_BTD, torch.tensor([[True] * 4 + [False]]))
    for condition in (single.expand(3), masked.expand(3)):
        assert condition.inputs_BNCHW.shape[0] == condition.text_BTD.shape[0] == 3
        assert torch.equal(condition.inputs_BNCHW[2], single.inputs_BNCHW[0])
        assert torch.equal(condition.text_BTD[1], single.text_BTD[0])
    assert single.expand(3).text_mask_BT is None
    assert masked.expand(3).text_mask_BT.shape == (3, 5)


@pytest.mark.parametrize("name", KERNELS)
def test_the_learners_first_ratio_is_exactly_one_and_a_member_without_a_score_is_left_out(tmp_path, name):
    save_policy(tmp_path, measured_vae(), live_dit())
    kernel, window = KernelConfig(name=name, eta=KERNELS[name]), range(0, 3)
    program = GrpoProgram(Start(tmp_path), GrpoConfig(clip_range=1e-4), kernel, SIGMAS)
    assert not program.module.training  # the sampler is in evaluation mode too
    single = make_condition(1)
    result = denoise(program.module, single.expand(BATCH), normal(*SHAPE, seed=7), SIGMAS, window, kernel, noise)
    group = make_group(single, result, window)
    advantages = np.array([1.5, np.nan, -0.5])
    micros = program.micro_batches(group, advantages)
    assert len(micros) == 3
    for micro in micros:
        loss = program.loss(program.module, micro)
        assert loss.count == 2
        assert loss.stats["ratio"] == 2.0
        assert loss.stats["max_ratio"] == 1.0
        assert loss.stats["max_ratio_error"] == 0.0
        assert loss.stats["approx_kl"] == 0.0
        assert loss.stats["clipped"] == 0.0
        assert float(loss.total.detach()) == -1.0
        loss.total.backward()
    assert float(torch.nn.utils.get_total_norm([p.grad for p in program.module.parameters() if p.grad is not None])) > 0


def test_the_policy_gradient_raises_the_log_prob_of_the_better_member(tmp_path):
    save_policy(tmp_path, measured_vae(), live_dit())
    kernel, window = KernelConfig(), range(1, 2)
    program = GrpoProgram(Start(tmp_path), GrpoConfig(clip_range=0.2), kernel, SIGMAS)
    single = make_condition(1)
    result = denoise(program.module, single.expand(BATCH), normal(*SHAPE), SIGMAS, window, kernel, noise)
    group = make_group(single, result, window)
    optimiser = torch.optim.SGD(program.module.parameters(), lr=1e-4)
    (micro,) = program.micro_batches(group, np.array([1.0, 0.0, -1.0]))
    program.loss(program.module, micro).total.backward()
    optimiser.step()
    with torch.no_grad():
        state, following = group.states(0), group.states(1)
        condition = group.condition()
        v = velocity(program.module, state, torch.full((BATCH,), SIGMAS[1]), condition.inputs_BNCHW, condition.text_BTD)
        move = transition(kernel, state, v, SIGMAS[1], SIGMAS[2], SIGMAS[1])
        change = move.log_prob(following) - result.log_probs_BW[:, 0]
    assert float(change[0] - change[2]) > 0


def test_member_noise_is_a_function_of_its_arguments_alone():
    torch.manual_seed(1)
    one = member_noise((2, 4, 4, 4), 1, 2, 3, 4, "initial")
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(member_noise((2, 4, 4, 4), 1, 2, 3, 4, "initial"), one)
    assert one.shape == (2, 4, 4, 4)
    assert one.dtype == torch.float32


def test_member_noise_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    member_noise((4,), 0, 0, 0, 0, "initial")
    assert torch.equal(torch.rand(3), expected)


def test_member_noise_differs_with_every_argument():
    base = (1, 2, 3, 4, "initial")
    changed = [(9, 2, 3, 4, "initial"), (1, 9, 3, 4, "initial"), (1, 2, 9, 4, "initial"), (1, 2, 3, 9, "initial"),
               (1, 2, 3, 4, "step 1"), (2, 1, 3, 4, "initial")]  # fmt: skip
    draws = [member_noise((16,), *arguments) for arguments in [base, *changed]]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_member_noise_is_standard_normal():
    draws = torch.cat([member_noise((500,), 0, step, 0, member, "n") for step in range(5) for member in range(4)])
    assert abs(float(draws.mean())) < 0.04
    assert float(draws.std()) == pytest.approx(1, abs=0.03)


KEY = (1, 2, 3)


def test_independent_members_have_the_noise_of_their_own_number():
    drawn = initial_noise((2, 3), KEY, 3, "independent"), step_noise((2, 3), KEY, 3, "independent", 5)
    for member in range(3):
        assert torch.equal(drawn[0][member], member_noise((2, 3), *KEY, member, "initial"))
        assert torch.equal(drawn[1][member], member_noise((2, 3), *KEY, member, "step 5"))


def test_shared_noise_is_shared_at_the_start_and_nowhere_else():
    start, step = initial_noise((50,), KEY, 4, "shared"), step_noise((50,), KEY, 4, "shared", 5)
    assert torch.equal(start, start[:1].expand(4, -1))
    assert len(step.unique(dim=0)) == 4


def test_mirrored_pairs_start_alike_and_take_opposite_steps():
    start, step = initial_noise((50,), KEY, 6, "mirrored"), step_noise((50,), KEY, 6, "mirrored", 5)
    assert torch.equal(start[::2], start[1::2])
    assert torch.equal(step[::2], -step[1::2])
    assert len(start.unique(dim=0)) == 3
    assert len(step.unique(dim=0)) == 6


def test_mirrored_noise_makes_the_gradient_of_a_linear_model_forget_what_both_of_a_pair_share():
    """A reward that is even in the noise, as damage by noise is, gives no gradient to a policy whose mean is linear."""
    model, sigmas = Linear(), SIGMAS
    start = initial_noise(SHAPE[1:], KEY, 4, "mirrored").double()
    result = denoise(
        model, make_condition(4), start, sigmas, range(1, 2), KernelConfig(),
        lambda step: step_noise(SHAPE[1:], KEY, 4, "mirrored", step).double(),
    )  # fmt: skip
    moved = result.window_BWMCHW[:, 1] - result.means_BWMCHW[:, 0]
    even = (moved**2).flatten(1).mean(1)
    advantages = even - even.mean()
    assert float(advantages.abs().max()) > 0
    gradient = torch.einsum("b,bmchw->mchw", advantages, moved)  # of sum A log p in the shared mean, up to its scale
    assert float(gradient.abs().max()) < 1e-6 * float((advantages.abs()[:, None] * moved.abs().flatten(1)).max())
