"""Programs of reinforcement learning on a tiny policy, and groups as rollout actors make them."""

import numpy as np
import torch
from tiny_models import CHANNELS, make_condition, normal

from policy.adapters import LoraConfig, trained
from policy.dit import velocity
from policy.group import GroupTrajectory
from policy.kernels import KernelConfig
from policy.rl import GrpoConfig, GrpoProgram, NftConfig, NftProgram, training_times
from policy.sampling import denoise
from policy.schedule import ScheduleConfig

SIGMAS = ScheduleConfig(steps=5, shift=3.0).sigmas()
MEMBERS, LAYERS, SIZE = 3, 2, 4
SHAPE = (LAYERS, CHANNELS, SIZE, SIZE)
WINDOW = range(0, 3)
KEY = (7, 1, 4)
LORA = LoraConfig(rank=3, alpha=6)
FLOW_SDE = KernelConfig(name="flow_sde", eta=0.7)
GAUSSIAN = {
    "flow_sde": FLOW_SDE,
    "dance": KernelConfig(name="dance", eta=0.3),
    "gaussian cps": KernelConfig(name="cps", eta=0.8, density="gaussian"),
}
OBJECTIVES = {
    f"{name}, {word}": (kernel, word == "guard") for name, kernel in GAUSSIAN.items() for word in ("plain", "guard")
}
OBJECTIVES["published cps, plain"] = (KernelConfig(name="cps", eta=0.8), False)
ADVANTAGES = np.array([1.5, np.nan, -0.5])


def move(module, seed=11):
    """Changes all that is trained, an adapter more than whole weights: its update is a product of two small ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                size = 0.1 if ".policy." in name else 0.02
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return module


def grpo(start, kernel=FLOW_SDE, **settings):
    return GrpoProgram(start, GrpoConfig(**settings), kernel, SIGMAS)


def nft(start, **settings):
    return NftProgram(start, NftConfig(**{"times": 2} | settings), SIGMAS)


def weights(program, start):
    """What an engine publishes."""
    return trained(program.module.state_dict(), start.lora is not None)


def rolled_out(module, kernel=FLOW_SDE, window=WINDOW, times=2, key=KEY):
    """A group as a rollout actor makes it: with a window for GRPO, without one for NFT."""
    single = make_condition(1)
    result = denoise(
        module,
        single.expand(MEMBERS),
        normal(MEMBERS, *SHAPE, seed=7),
        SIGMAS,
        window,
        kernel,
        lambda step: normal(MEMBERS, *SHAPE, seed=1000 + step),
    )
    return GroupTrajectory(
        key=key,
        steps=tuple(window) or training_times(key, times, len(SIGMAS) - 1),
        inputs_NCHW=single.inputs_BNCHW[0].numpy(),
        text_TD=single.text_BTD[0].numpy(),
        window_GWMCHW=result.window_BWMCHW.numpy(),
        log_probs_GW=result.log_probs_BW.numpy(),
        clean_GMCHW=result.latents_BMCHW.numpy(),
        means_GWMCHW=result.means_BWMCHW.numpy() if window else None,
    )


def speed(module, group, latents, time):
    condition = group.condition()
    with torch.no_grad():
        return velocity(module, latents, torch.full((len(latents),), time), condition.inputs_BNCHW, condition.text_BTD)


def losses(program, group, advantages=ADVANTAGES):
    return [program.loss(program.module, micro) for micro in program.micro_batches(group, advantages)]


def gradient(program, group, advantages, place=0):
    """Gradient of one micro-batch by name, zeros where none arrives."""
    program.module.zero_grad()
    program.loss(program.module, program.micro_batches(group, advantages)[place]).total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in program.module.named_parameters()}


def norm(tensors):
    return float(torch.nn.utils.get_total_norm(list(tensors.values())))


def step_down(program, group, advantages, place, length):
    """One step of plain gradient descent, ``length`` long."""
    found = gradient(program, group, advantages, place)
    with torch.no_grad():
        for name, parameter in program.module.named_parameters():
            parameter.sub_(found[name] * (length / norm(found)))
