"""How much of a GRPO gradient is signal, by the settings it is sampled with.

    python -m benchmarks.gradient_signal runs/demo --case "" --case "grpo.noise=mirrored" [--steps 12]

Each case draws ``--steps`` independent gradients g of the finished SFT policy, each from a whole step's groups, as the
learner would, every element over its root mean square over the steps, as Adam scales it. With S = mean over i != j of
<g_i, g_j> (unbiased for the squared length of the expected gradient) and N = mean |g_i|^2 - S, printed are

- ``signal``: S / N of one step, with a jackknife's standard error;
- ``plain``: the same of gradients as they are;
- ``s/step``: seconds of sampling, scoring and training in this process, with as many threads as torch takes.

Scores come from the terms of the config; a term that asks a served judge has no score here.
"""

import argparse
import time
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
from rewards.combine import active_terms, step_advantages
from rewards.credit import Credited
from rewards.groups import build_scorers, join_scores, score_terms


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
    scorers, credit = build_scorers(rewards), grpo.credit
    reach = credit.reach if credit else None
    parameters = [p for p in program.module.parameters() if p.requires_grad]
    found, began = [], time.perf_counter()
    for step in range(steps):
        groups, scores = [], []
        for number in range(grpo.prompts):
            index = int(sampler.draw(step * grpo.prompts + number, 1).indices[0])
            meta, trajectory, pixels = actor.sample(GroupRequest(step + 1, number, index, grpo.group))
            terms = score_terms(rewards, scorers, pixels, cells=credit.cells if credit else None)
            scored = join_scores(rewards, terms, meta.name)
            weights = [rewards.terms[k].weight for k in active_terms(rewards, meta.task)]
            groups.append(trajectory)
            scores.append(Credited(scored.scores_TG, weights, scored.cells_T))
        for p in parameters:
            p.grad = None
        for trajectory, advantages in zip(groups, step_advantages(scores, rewards, reach), strict=True):
            for micro in program.micro_batches(trajectory, advantages):
                with computing(grpo.precision):
                    program.loss(program.module, micro).total.backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).numpy())
        print(f"  step {step + 1}/{steps}, {(time.perf_counter() - began) / (step + 1):.1f} s each", flush=True)
    return np.stack(found), (time.perf_counter() - began) / steps


def ratio(gradients_KD: np.ndarray) -> float:
    """S / N of one step."""
    gram = (gradients_KD @ gradients_KD.T).astype(np.float64)
    return _ratio(gram)


def jackknife(gradients_KD: np.ndarray) -> float:
    """Standard error of :func:`ratio`, from leaving out one step after the other."""
    gram, count = (gradients_KD @ gradients_KD.T).astype(np.float64), len(gradients_KD)
    left_out = np.array([_ratio(np.delete(np.delete(gram, k, 0), k, 1)) for k in range(count)])
    return float(np.sqrt((count - 1) / count * np.sum((left_out - left_out.mean()) ** 2)))


def as_adam_scales(gradients_KD: np.ndarray) -> np.ndarray:
    """Every element over its root mean square over the steps; one that is always 0 stays so."""
    size_D = np.sqrt(np.square(gradients_KD).mean(axis=0))
    return gradients_KD / np.where(size_D > 0, size_D, 1)


def _ratio(gram: np.ndarray) -> float:
    count, trace = len(gram), np.trace(gram)
    shared = (gram.sum() - trace) / (count * (count - 1))
    return float(shared / (trace / count - shared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo run")
    parser.add_argument("--case", action="append", required=True, help="overrides, separated by spaces; may be empty")
    parser.add_argument("--steps", type=int, default=12, help="independent gradients per case")
    parser.add_argument("--dataset", type=Path, help="instead of the demo's")
    arguments = parser.parse_args()
    policy, dataset = arguments.demo / "sft" / "final" / "model", arguments.dataset or arguments.demo / "dataset"
    rows = ["| case | signal | standard error | plain | s/step |", "|---|---|---|---|---|"]
    for case in arguments.case:
        print(case or "(as configured)", flush=True)
        own = ["run_dir=unused", f"dataset={dataset}", f"grpo.start={policy}", *case.split()]
        drawn, seconds = gradients(load_config("demo", own), arguments.steps)
        scaled = as_adam_scales(drawn)
        rows.append(
            f"| `{case}` | {ratio(scaled):.4f} | {jackknife(scaled):.4f} | {ratio(drawn):.4f} | {seconds:.1f} |"
        )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
