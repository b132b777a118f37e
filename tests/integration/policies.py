"""A small random policy on real data, rolled-out groups, and a training loop in plain torch to compare with."""

from pathlib import Path

import numpy as np
import torch

from actors.rollout import RolloutActor, RolloutSetup
from data.records import RecordDataset
from policy.dit import DitConfig, build_dit
from policy.folder import save_policy
from policy.group import GroupRequest, GroupTrajectory
from policy.kernels import KernelConfig
from policy.programs import GrpoConfig, GrpoProgram
from policy.schedule import SamplingConfig, ScheduleConfig, WindowConfig
from policy.text import TEXT_DIM
from policy.vae import VaeConfig, build_vae, set_latent_statistics
from policy.weights import pack

KERNEL = KernelConfig(name="flow_sde", eta=0.7)
SAMPLING = SamplingConfig(schedule=ScheduleConfig(steps=5), window=WindowConfig(size=2, movement="random"))
OBJECTIVE = GrpoConfig(clip_range=1e-3)


def write_policy(folder: Path) -> Path:
    """A random policy whose velocity is not zero, so that every part of it matters."""
    vae = build_vae(VaeConfig(channels=(8, 16), latent_channels=4, norm_groups=4), seed=1)
    set_latent_statistics(vae, torch.zeros(4), torch.ones(4))
    transformer = build_dit(DitConfig(layers=2, heads=2, head_dim=12, rope_axes=(4, 4, 4)), 4, TEXT_DIM, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_policy(folder, vae, transformer)
    return folder


def rolled_out(policy: Path, dataset: Path, groups: int, members: int = 3) -> list[tuple[GroupTrajectory, np.ndarray]]:
    """Real groups of several tasks with made-up advantages."""
    actor = RolloutActor(RolloutSetup(policy, dataset, 7, SAMPLING, KERNEL), threads=1)
    actor.load(0, *pack(GrpoProgram(policy, OBJECTIVE, KERNEL, SAMPLING.schedule.sigmas()).module.state_dict()))
    data = RecordDataset(dataset, "train")
    tasks = ["automatic_matting", "layer_decomposition", "object_removal"]
    draw = np.random.default_rng(5)
    out = []
    for number in range(groups):
        index = int(data.positions(tasks[number % len(tasks)])[number])
        _, trajectory, _ = actor.sample(GroupRequest(step=1, group=number, index=index, members=members))
        out.append((trajectory, draw.standard_normal(members)))
    return out


def plain_torch_weights(
    policy: Path, steps: list[list[tuple[GroupTrajectory, np.ndarray]]], lr: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(before, after) of a loop that knows neither Ray nor DeepSpeed: one optimiser step per entry of ``steps``."""
    program = GrpoProgram(policy, OBJECTIVE, KERNEL, SAMPLING.schedule.sigmas())
    module = program.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    for groups in steps:
        optimiser.zero_grad()
        losses = [program.loss(module, micro) for group in groups for micro in program.micro_batches(*group)]
        (sum(loss.total for loss in losses) / sum(loss.count for loss in losses)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
    return before, dict(module.state_dict())


def relative_change(before: dict, a: dict, b: dict) -> float:
    """‖Δa − Δb‖ / ‖Δb‖ over all weights."""
    apart = sum(float(((a[name] - b[name]).double() ** 2).sum()) for name in before) ** 0.5
    moved = sum(float(((b[name] - before[name]).double() ** 2).sum()) for name in before) ** 0.5
    return apart / moved
