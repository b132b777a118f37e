"""How much of a GRPO gradient is signal, by the settings it is sampled with.

    python -m benchmarks.gradient_signal runs/demo --case "" --case "grpo.noise=mirrored" [--steps 12]

Each case draws ``--steps`` independent gradients g of the finished SFT policy, each from a whole step's groups, as the
learner would. With signal S = mean over i != j of <g_i, g_j> (unbiased for the squared length of the expected
gradient) and N = mean |g_i|^2 - S, printed are

- ``signal``: S / N, of one step; S and N fall into the same units only within a case, their ratio does not care;
- ``per second``: S / N per second of sampling, scoring and training in this process, against the first case;
- ``towards first``: the cosine between the expected gradients of this case and of the first one, unbiased too.

Standard errors are a jackknife over steps. Scores come from the config's terms; those that are served are refused.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from actors.rollout import RolloutActor, RolloutSetup
from data.records import RecordDataset
from data.sampler import TaskSampler
from data.seeding import seed_for
from pipeline.config import RunConfig, load_config
from policy.group import GroupRequest
from policy.precision import computing
from policy.rl import GrpoProgram, Start
from policy.weights import pack
from rewards.base import build, reward_batch, run_scorer
from rewards.combine import active_terms, batch_advantages


def gradients(config: RunConfig, steps: int) -> tuple[np.ndarray, float]:
    """(K, D) float32 gradients of K independent steps at the stage's start, and the seconds of one step."""
    grpo, rewards = config.grpo, config.rewards
    assert grpo.start is not None
    threads = torch.get_num_threads()
    setup = RolloutSetup(
        Start(grpo.start), config.dataset_folder, config.seed, grpo.sampling, grpo.kernel, grpo.noise,
        grpo.recording, grpo.precision,
    )  # fmt: skip
    actor = RolloutActor(setup, threads)
    program = GrpoProgram(Start(grpo.start), grpo.objective, grpo.kernel, grpo.sampling.schedule.sigmas())
    actor.load(0, *pack(program.module.state_dict()))
    data = RecordDataset(config.dataset_folder, "train")
    sampler = TaskSampler(data.task_positions, grpo.tasks, seed_for(config.seed, "stream", "grpo"))
    scorers = [build(term.source, term.params) for term in rewards.terms]
    parameters = [p for p in program.module.parameters() if p.requires_grad]
    found, began = [], time.perf_counter()
    for step in range(steps):
        groups, scores = [], []
        for number in range(grpo.prompts):
            index = int(sampler.draw(step * grpo.prompts + number, 1).indices[0])
            meta, trajectory, pixels = actor.sample(GroupRequest(step + 1, number, index, grpo.group))
            shown = reward_batch(pixels)
            active = active_terms(rewards, meta.task)
            terms = [run_scorer(rewards.terms[k].name, scorers[k], shown).values_G for k in active]
            groups.append(trajectory)
            scores.append((np.stack(terms).astype(np.float64), [rewards.terms[k].weight for k in active]))
        for p in parameters:
            p.grad = None
        for trajectory, advantages in zip(groups, batch_advantages(scores, rewards), strict=True):
            for micro in program.micro_batches(trajectory, advantages):
                with computing(grpo.precision):
                    program.loss(program.module, micro).total.backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).numpy())
        print(f"  step {step + 1}/{steps}, {(time.perf_counter() - began) / (step + 1):.1f} s each", flush=True)
    return np.stack(found), (time.perf_counter() - began) / steps


def signal(gradients_KD: np.ndarray) -> tuple[float, float]:
    """(S, N) of independent gradients."""
    gram = (gradients_KD @ gradients_KD.T).astype(np.float64)
    count = len(gram)
    shared = float((gram.sum() - np.trace(gram)) / (count * (count - 1)))
    return shared, float(np.trace(gram) / count) - shared


def agreement(one_KD: np.ndarray, other_KD: np.ndarray) -> float:
    """Cosine between the expected gradients of two cases, from products of different steps alone."""
    gram = (one_KD @ other_KD.T).astype(np.float64)
    between = gram.mean() if one_KD is not other_KD else signal(one_KD)[0]
    return float(between / np.sqrt(max(signal(one_KD)[0], 1e-30) * max(signal(other_KD)[0], 1e-30)))


def jackknife(statistic: Callable[[np.ndarray], float], gradients_KD: np.ndarray) -> float:
    """Standard error of a statistic of K independent rows."""
    count = len(gradients_KD)
    left_out = [statistic(np.delete(gradients_KD, k, axis=0)) for k in range(count)]
    return float(np.sqrt((count - 1) / count * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)))


def ratio(gradients_KD: np.ndarray) -> float:
    """Signal over noise of one step."""
    shared, noise = signal(gradients_KD)
    return shared / noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo run")
    parser.add_argument("--case", action="append", required=True, help="overrides, separated by spaces; may be empty")
    parser.add_argument("--steps", type=int, default=12, help="independent gradients per case")
    parser.add_argument("--dataset", type=Path, help="instead of the demo's")
    arguments = parser.parse_args()
    policy, dataset = arguments.demo / "sft" / "final" / "model", arguments.dataset or arguments.demo / "dataset"
    first, cost = np.zeros((0, 0)), 0.0
    rows = [
        "| case | signal | standard error | s/step | per second, first = 1 | towards first |",
        "|---|---|---|---|---|---|",
    ]
    for case in arguments.case:
        print(case or "(as configured)", flush=True)
        own = ["run_dir=unused", f"dataset={dataset}", f"grpo.start={policy}", *case.split()]
        drawn, seconds = gradients(load_config("demo", own), arguments.steps)
        first, cost = (first, cost) if len(first) else (drawn, ratio(drawn) / seconds)
        rows.append(
            f"| `{case}` | {ratio(drawn):.4f} | {jackknife(ratio, drawn):.4f} | {seconds:.1f} "
            f"| {ratio(drawn) / seconds / cost:.2f} | {agreement(drawn, first):.2f} |"
        )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
