"""A small random policy on real data, rolled-out groups, and a training loop in plain torch to compare with."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from actors.rollout import RolloutActor, RolloutSetup
from data.records import RecordDataset
from data.sampler import Draw, TaskSampler
from policy.adapters import LoraConfig
from policy.dit import DitConfig, build_dit
from policy.folder import load_vae, save_policy, save_vae
from policy.group import GroupRequest, GroupTrajectory, Recording
from policy.kernels import KernelConfig
from policy.latents import encode_records, split_work
from policy.precision import Precision
from policy.programs import Batch, SftProgram
from policy.rl import GrpoConfig, GrpoProgram, NftConfig, NftProgram, Start
from policy.schedule import SamplingConfig, ScheduleConfig, WindowConfig
from policy.text import TEXT_DIM
from policy.vae import VaeConfig, build_vae, set_latent_statistics
from policy.vae_program import VaeLossConfig, VaeProgram
from policy.weights import pack

KERNEL = KernelConfig(name="flow_sde", eta=0.7)
SAMPLING = SamplingConfig(schedule=ScheduleConfig(steps=5), window=WindowConfig(size=2, movement="random"))
OBJECTIVE = GrpoConfig(clip_range=1e-3)


VAE = VaeConfig(channels=(8, 16), latent_channels=4, norm_groups=4)


def write_policy(folder: Path, vae: AutoencoderKL | None = None) -> Path:
    """A random policy whose velocity is not zero, so that every part of it matters; its VAE is random or given."""
    if vae is None:
        vae = build_vae(VAE, seed=1)
        set_latent_statistics(vae, torch.zeros(4), torch.ones(4))
    transformer = build_dit(DitConfig(layers=2, heads=2, head_dim=12, rope_axes=(4, 4, 4)), 4, TEXT_DIM, seed=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_policy(folder, vae, transformer)
    return folder


def trained_vae(dataset: Path, steps: int = 200) -> AutoencoderKL:
    """A VAE that has seen enough of the training split to decode alpha: a random one decodes everything opaque."""
    vae = build_vae(VAE, seed=1)
    program, draw = VaeProgram(vae, VaeLossConfig(), dataset, seed=0), np.random.default_rng(0)
    data = RecordDataset(dataset, "train")
    optimiser = torch.optim.Adam(program.module.parameters(), lr=5e-3)
    for position in range(steps):
        indices = draw.integers(0, len(data), 4)
        loss = program.loss(program.module, Batch(position, Draw(data.cheap(int(indices[0])).task, indices)))
        optimiser.zero_grad()
        (loss.total / loss.count).backward()
        optimiser.step()
    with torch.no_grad():
        samples = [data.record(k).decode() for k in range(len(data))]
        images = [image for sample in samples for image in (*sample.inputs, *sample.targets_LCHW)]
        latents = vae.encode(torch.stack(images) * 2 - 1).latent_dist.mean
    set_latent_statistics(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return vae


def rolled_out(
    policy: Path, dataset: Path, groups: int, members: int = 3, precision: Precision = "float32"
) -> list[tuple[GroupTrajectory, np.ndarray]]:
    """Real groups of several tasks with made-up advantages."""
    setup = RolloutSetup(
        Start(policy), dataset, 7, SAMPLING, KERNEL, recording=Recording(means=True), precision=precision
    )
    actor = RolloutActor(setup, threads=1)
    actor.load(0, *pack(GrpoProgram(Start(policy), OBJECTIVE, KERNEL, SAMPLING.schedule.sigmas()).module.state_dict()))
    data = RecordDataset(dataset, "train")
    tasks = ["automatic_matting", "layer_decomposition", "object_removal"]
    draw = np.random.default_rng(5)
    out = []
    for number in range(groups):
        index = int(data.positions(tasks[number % len(tasks)])[number])
        _, trajectory, _ = actor.sample(GroupRequest(step=1, group=number, index=index, members=members))
        out.append((trajectory, draw.standard_normal(members)))
    return out


def factory(policy: Path, objective: GrpoConfig | NftConfig = OBJECTIVE, lora: LoraConfig | None = None):
    """Makes either objective's program on the small policy, in whatever process it is called."""
    start, sigmas = Start(policy, lora), SAMPLING.schedule.sigmas()
    if isinstance(objective, NftConfig):
        return functools.partial(NftProgram, start, objective, sigmas)
    return functools.partial(GrpoProgram, start, objective, KERNEL, sigmas)


def plain_torch_weights(
    policy: Path,
    steps: list[list[tuple[GroupTrajectory, np.ndarray]]],
    lr: float,
    objective: GrpoConfig | NftConfig = OBJECTIVE,
    lora: LoraConfig | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(before, after) of a loop that knows neither Ray nor DeepSpeed: one optimiser step per entry of ``steps``."""
    program = factory(policy, objective, lora)()
    module = program.module
    held = {name for name, parameter in module.named_parameters() if parameter.requires_grad}

    def weights() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in module.state_dict().items() if name in held}

    before = weights()
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for groups in steps:
        program.begin_batch(weights)
        optimiser.zero_grad()
        losses = [program.loss(module, micro) for group in groups for micro in program.micro_batches(*group)]
        total = torch.stack([loss.total for loss in losses]).sum()
        (total / sum(loss.count for loss in losses)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
    return before, weights()


def write_sft_start(folder: Path, policy: Path, dataset: Path) -> Path:
    """What the VAE stage leaves behind for SFT: the policy's VAE and the latents of the training split."""
    (folder / "latents").mkdir(parents=True)
    save_vae(folder / "model", load_vae(policy))
    data = RecordDataset(dataset, "train")
    ((indices, owned),) = split_work(data, 1)
    encode_records(folder / "model", data, indices, owned, folder / "latents" / "latents-00000.safetensors")
    return folder


def sft_batches(dataset: Path, steps: int, micro_batches: int, size: int = 2) -> list[list[Batch]]:
    """Micro-batches of ``size`` records for each optimiser step, of all tasks in turn."""
    data = RecordDataset(dataset, "train")
    sampler = TaskSampler(data.task_positions, dict.fromkeys(data.tasks, 1.0), seed=3)
    places = np.arange(steps * micro_batches).reshape(steps, micro_batches)
    return [[Batch(int(place), sampler.draw(int(place), size)) for place in step] for step in places]


def plain_sft_weights(
    make: Callable[[], SftProgram], steps: list[list[Batch]], lr: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As :func:`plain_torch_weights`, for SFT."""
    program = make()
    trained = {name: p for name, p in program.module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    for batches in steps:
        optimiser.zero_grad()
        losses = [program.loss(program.module, micro) for batch in batches for micro in program.micro_batches(batch)]
        total = torch.stack([loss.total for loss in losses]).sum()
        (total / sum(loss.count for loss in losses)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
    return before, {name: p.detach().clone() for name, p in trained.items()}


def relative_change(before: dict, a: dict, b: dict) -> float:
    """‖Δa − Δb‖ / ‖Δb‖ over all weights."""
    apart = sum(float(((a[name] - b[name]).double() ** 2).sum()) for name in before) ** 0.5
    moved = sum(float(((b[name] - before[name]).double() ** 2).sum()) for name in before) ** 0.5
    return apart / moved
