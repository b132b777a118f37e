"""The GRPO stage without Ray, DeepSpeed, actors or stages, read from top to bottom: what the real one must equal."""

import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch

from data.records import RecordDataset
from data.sampler import TaskSampler
from data.seeding import seed_for
from data.tasks import get_task
from pipeline.config import RunConfig
from policy.dit import velocity
from policy.folder import load_vae, starting_policy
from policy.kernels import transition
from policy.sampling import Condition, denoise, member_noise
from policy.sight import sight_for
from policy.text import TextEncoder
from policy.vae import LatentCodec
from rewards.base import RewardBatch, build, run_scorer
from rewards.combine import active_terms, group_advantages
from rewards.credit import Credited, local_advantages


@dataclass
class Outcome:
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: list[torch.Tensor] = field(default_factory=list)
    """Clean latents of every group, in order."""
    norms: list[float] = field(default_factory=list)
    """Gradient norm of every optimiser step."""
    seconds: list[float] = field(default_factory=list)
    """Duration of every step of the loop."""


def reference_loop(config: RunConfig) -> Outcome:
    stage, rewards, seed = config.grpo, config.rewards, config.seed
    assert stage.start is not None
    model = starting_policy(stage.start, stage.lora, seed_for(seed, "adapter")).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=stage.optimiser.lr, weight_decay=0.0)
    codec, text = LatentCodec(load_vae(stage.start), sight_for(model)), TextEncoder()
    sigmas = stage.sampling.schedule.sigmas()
    data = RecordDataset(config.dataset_folder, "train")
    sampler = TaskSampler(data.task_positions, stage.tasks, seed_for(seed, "stream", "grpo"))
    scorers = [build(term.source, term.params) for term in rewards.terms]
    out = Outcome({name: p.detach().clone() for name, p in trained.items()})
    averaged, updates = {name: p.detach().clone() for name, p in trained.items()}, 0
    policies = deque([deepcopy(model)], maxlen=stage.max_staleness + 1)
    for step in range(stage.steps):
        batch, began = [], time.perf_counter()
        for number in range(stage.prompts):
            record = data.record(int(sampler.draw(step * stage.prompts + number, 1).indices[0]))
            sample, task = record.decode(), get_task(record.task)
            inputs = codec.encode_stack(sample.inputs, *sample.targets_LCHW.shape[-2:])
            condition = Condition(inputs[None], text.encode(record.prompt)[None]).expand(stage.group)
            shape = (len(task.targets), codec.channels, *inputs.shape[2:])
            key = (seed, step + 1, number)
            noise = {
                name: torch.stack([member_noise(shape, *key, g, name) for g in range(stage.group)])
                for name in ["initial", *(f"step {k}" for k in range(len(sigmas)))]
            }
            if stage.noise == "shared":
                noise["initial"] = noise["initial"][:1].repeat(stage.group, 1, 1, 1, 1)
            if stage.noise == "mirrored":
                for name, every in noise.items():
                    every[1::2] = every[::2] if name == "initial" else -every[::2]
            window = stage.sampling.window_steps(seed, step, number)

            def drawn(k: int, noise: dict[str, torch.Tensor] = noise) -> torch.Tensor:
                return noise[f"step {k}"]

            made = denoise(policies[0], condition, noise["initial"], sigmas, window, stage.kernel, drawn)
            layers = torch.stack([codec.decode(member) for member in made.latents_BMCHW])
            shown = RewardBatch(
                record.task, record.prompt, task.targets, layers, sample.targets_LCHW, tuple(sample.inputs), task.inputs
            )
            active = active_terms(rewards, record.task)
            credit, weights = stage.objective.credit, [rewards.terms[k].weight for k in active]
            scores = [
                run_scorer(rewards.terms[k].name, scorers[k], shown, credit.cells if credit else None) for k in active
            ]
            scores_TG = np.stack([term.values_G for term in scores])
            found = group_advantages(scores_TG, weights, rewards.std_floor, rewards.clamp)
            if credit:
                group = Credited(scores_TG, weights, [term.cells_GLhw for term in scores])
                [found] = local_advantages([group], credit.reach, "terms", rewards.std_floor, rewards.clamp)
            advantages = torch.tensor(found, dtype=torch.float32)
            out.groups.append(made.latents_BMCHW)
            if advantages.abs().max() > 1e-6:
                batch.append((condition, window, made, advantages))
        for epoch in range(stage.epochs):
            order = np.arange(len(batch))
            if stage.epochs * stage.minibatches > 1:
                order = np.random.default_rng(seed_for(seed, "epoch", step, epoch)).permutation(len(batch))
            for part in np.array_split(order, min(stage.minibatches, len(batch))):
                optimiser.zero_grad()
                losses = []
                for condition, window, made, advantages in (batch[k] for k in part):
                    for place, k in enumerate(window):
                        x, following = made.window_BWMCHW[:, place], made.window_BWMCHW[:, place + 1]
                        times = torch.full((stage.group,), sigmas[k])
                        v = velocity(model, x, times, condition.inputs_BNCHW, condition.text_BTD)
                        move = transition(stage.kernel, x, v, sigmas[k], sigmas[k + 1], sigmas[1])
                        ratio = (move.log_prob(following) - made.log_probs_BW[:, place]).exp()
                        if advantages.ndim > 1:
                            apart = (following - made.means_BWMCHW[:, place]) ** 2 - (following - move.mean) ** 2
                            ratio = (apart.mean(2) / (2 * move.scale**2)).exp()
                            fine = ratio.shape[-1] // advantages.shape[-1]
                            advantages = advantages.repeat_interleave(fine, 2).repeat_interleave(fine, 3)
                        clipped = ratio.clamp(1 - stage.objective.clip_range, 1 + stage.objective.clip_range)
                        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
                        losses.append(loss.reshape(len(loss), -1).mean(1))
                torch.cat(losses).mean().backward()
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), stage.optimiser.clip_norm)
                out.norms.append(float(norm))
                optimiser.step()
                updates += 1
                decay = min(stage.ema, (1 + updates) / (10 + updates))
                averaged = {
                    name: decay * value + (1 - decay) * trained[name].detach() for name, value in averaged.items()
                }
        policies.append(deepcopy(model))
        out.seconds.append(time.perf_counter() - began)
    out.after = {name: p.detach().clone() for name, p in (averaged if stage.ema else trained).items()}
    return out
