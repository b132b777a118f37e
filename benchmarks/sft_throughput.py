"""What SFT's machinery costs, as ratios of samples per second in the same run.

    python -m benchmarks.sft_throughput runs/demo [--steps 12] [--config demo]

- ``learner / bare loop``: the configured learner ranks (Ray, DeepSpeed) against one process with as many threads that
  runs a loop of plain torch on the same batches. Target: at least 0.95.
- ``cached / uncached``: the bare loop on cached latents against the same loop that decodes and encodes every image.
- ``latents read / trained``, ``records read / trained``: reading the cached latents of these batches, or their records
  from the parquet shards (undecoded, in the order of training), against what the bare loop trains. Target: at least 10.
- ``records decoded / trained``: the same with every PNG decoded and checked against its digest.

The folder is a run with a finished VAE stage. Medians over the steps after the first, one measurement after the other,
to be run on an otherwise idle machine. Exits with 1 where a target is missed.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from actors.cluster import connected
from actors.learner import Item, LearnerGroup
from data.records import RecordDataset
from data.sampler import TaskSampler
from data.seeding import seed_for
from pipeline.config import RunConfig, load_config
from pipeline.train import step_items
from policy.folder import load_vae
from policy.latents import LatentCache
from policy.programs import SftProgram, make_sft_program
from policy.vae import LatentCodec

TARGETS = {
    "learner / bare loop": 0.95,
    "cached / uncached": 0.0,
    "latents read / trained": 10.0,
    "records read / trained": 10.0,
    "records decoded / trained": 0.0,
}
"""Least ratios; 0 is none."""
Steps = Sequence[Sequence[Item]]


class Uncached(SftProgram):
    """SFT that encodes every image whenever it meets it."""

    def _latents(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample, codec = self._data.record(index).decode(), LatentCodec(self._vae, self._sight)
        height, width = sample.targets_LCHW.shape[-2:]
        return codec.encode_stack(sample.inputs, height, width), codec.encode(sample.targets_LCHW)


def timed(step: Callable[[Sequence[Item]], object], steps: Steps) -> float:
    """Samples per second of the median step after the first."""
    seconds = []
    for items in steps:
        began = time.perf_counter()
        step(items)
        seconds.append(time.perf_counter() - began)
    return sum(item.count for item in steps[0]) / statistics.median(seconds[1:])


def learner_rate(config: RunConfig, make: Callable[[], SftProgram], steps: Steps) -> float:
    """The pipeline's own ranks."""
    with connected(config.cluster):
        learner = LearnerGroup(config.cluster)
        try:
            learner.setup(make, config.sft.optimiser, config.sft.engine, len(steps))
            numbers = iter(range(len(steps)))
            return timed(lambda items: learner.train(next(numbers), items), steps)
        finally:
            learner.close()


def bare_rate(config: RunConfig, program: SftProgram, steps: Steps) -> float:
    """Plain torch in this process."""
    settings = config.sft.optimiser
    trained = [p for p in program.module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )

    def step(items: Sequence[Item]) -> None:
        optimiser.zero_grad()
        for item in items:
            (program.loss(program.module, item.payload).total / sum(each.count for each in items)).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimiser.step()

    return timed(step, steps)


def reading_rates(config: RunConfig, vae_stage: Path, steps: Steps) -> dict[str, float]:
    """Samples per second of nothing but reading, from caches that have seen none of it."""
    vae = load_vae(vae_stage / "model")
    cache = LatentCache(vae_stage / "latents", vae.config.latents_mean, vae.config.latents_std)
    raw, decoded = (RecordDataset(config.dataset_folder, "train") for _ in range(2))

    def over(read: Callable[[int], object]) -> float:
        return timed(lambda items: [read(int(i)) for item in items for i in item.payload.draw.indices], steps)

    return {
        "latents read": over(lambda index: cache.stack(raw.digests(index))),
        "records read": over(raw.record),
        "records decoded": over(lambda index: decoded.record(index).decode()),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with a finished VAE stage")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--config", default="demo", help="whose sft settings to take")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first one is not counted")
    run = options.run.resolve()
    with tempfile.TemporaryDirectory(prefix="omnialpha-bench-") as home:
        config = load_config(options.config, [f"run_dir={home}/run", f"dataset={run / 'dataset'}"])
        sft, vae_stage, dataset = config.sft, run / "vae" / "final", config.dataset_folder
        make = functools.partial(
            make_sft_program, sft.network, sft.start, sft.lora, sft.objective, vae_stage, dataset, config.seed
        )
        data = RecordDataset(dataset, "train")
        sampler = TaskSampler(data.task_positions, sft.tasks, seed_for(config.seed, "stream", "sft"), data.sizes)
        steps = [step_items(sampler, sft, number * sft.micro_batches) for number in range(options.steps)]
        rates = reading_rates(config, vae_stage, steps)
        rates["learner"] = learner_rate(config, make, steps)
        torch.set_num_threads(config.cluster.learner.actors * config.cluster.learner.threads)
        rates["bare loop"] = rates["cached"] = rates["trained"] = bare_rate(config, make(), steps)
        uncached = make()
        uncached.__class__ = Uncached
        rates["uncached"] = bare_rate(config, uncached, steps)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    print(json.dumps(rates))
    sys.exit(report(rates))


def report(rates: dict[str, float]) -> int:
    """Prints the ratios; 1 where a target is missed."""
    missed = 0
    for pair, target in TARGETS.items():
        a, b = pair.split(" / ")
        ratio = rates[a] / rates[b]
        print(f"{pair}: {ratio:.2f}  ({rates[a]:.1f} / {rates[b]:.1f} samples/s), target {target or 'none'}")
        missed |= ratio < target
    return missed


if __name__ == "__main__":
    main()
