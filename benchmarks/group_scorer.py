"""What scoring a group at once saves, and how near it comes to its bare kernels.

    python -m benchmarks.group_scorer [--repeats 5] [--threads 2]

- ``metrics / group``: a layer-decomposition group of eight scored with the preset ``paper`` at 64² and 512², against
  calling torchmetrics' SSIM and PSNR, the perceptual network and a boundary blur for every image pair on its own.
- ``one by one / group``: the same with each preset, against our own scorers on batches of one, which blend and measure
  the truth again each time. The scores must agree to 1e-6 (SSIM of torchmetrics: 1e-5, it rounds differently).
- ``group of 8 at 1024²``: the same task without the perceptual network, from arrays to scores, and its share of bare
  kernels: nothing but SSIM of ready blends and the blur of ready bands.

Medians; the two sides of a ratio take turns, after one round that does not count. To be run on an otherwise idle
machine. Exits with 1 where scores differ, a group gains less than 2 times, or the large group takes more than 6 s and
more than 1.2 times its kernels, or the process more than 4 GB.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from data.rgba import over
from data.tasks import get_task
from policy.group import GroupPixels
from policy.perceptual import PerceptualDistance
from rewards.base import RewardBatch, run_scorer
from rewards.combine import RewardConfig, TermConfig
from rewards.groups import build_scorers, reward_batch, score_group
from rewards.similarity import blur, gaussian, ssim
from rewards.terms import PSNR_CEILING_DB, SOFT_BAND, boundary_radius, on_black_and_white, soft_band

TASK, MEMBERS = "layer_decomposition", 8
ROUNDING = 1e-5
GAIN, SECONDS, SHARE, MEMORY_GB = 2.0, 6.0, 1.2, 4.0
"""Targets: gain of a group, time and share of kernels of the large one, memory of the process."""


def example(size: int) -> GroupPixels:
    """Eight candidates that differ from the truth by noise and soft faults of growing strength."""
    generator = torch.Generator().manual_seed(size)

    def layers(count: int) -> torch.Tensor:
        coarse = torch.rand(count * 2, 4, 9, 9, generator=generator)
        image = F.interpolate(coarse, (size, size), mode="bicubic").reshape(count, 2, 4, size, size)
        image[:, 0, 3] = 1
        image[:, 1, 3] = 4 * image[:, 1, 3] - 1.5
        return image.clamp_(0, 1)

    truth = layers(1)[0]
    strength = torch.linspace(0.05, 0.4, MEMBERS)[:, None, None, None, None]
    noise = 0.1 * torch.rand(MEMBERS, 2, 4, size, size, generator=generator)
    members = (truth.lerp(layers(MEMBERS), strength) + strength * noise).clamp_(0, 1)
    return GroupPixels("bench", TASK, "Split this image.", members.numpy(), truth.numpy(), (over(truth).numpy(),))


def one_by_one(config: RewardConfig, scorers: dict, batch: RewardBatch) -> np.ndarray:
    """Every term for every member on its own, (T, G)."""
    rows = []
    for term in config.terms:
        values = []
        for layers_LCHW in batch.layers_GLCHW:
            alone = RewardBatch(
                task=batch.task,
                prompt=batch.prompt,
                roles=batch.roles,
                layers_GLCHW=layers_LCHW[None],
                targets_LCHW=batch.targets_LCHW,
                inputs=batch.inputs,
                input_roles=batch.input_roles,
            )
            values.append(run_scorer(term.name, scorers[term.name], alone).values_G[0])
        rows.append(values)
    return np.array(rows)


def library_metrics(batch: RewardBatch) -> np.ndarray:
    """The preset ``paper`` by libraries' metrics, one image pair after the other, (T, G)."""
    task, (image,) = get_task(TASK), batch.inputs
    assert batch.targets_LCHW is not None
    distance = PerceptualDistance()
    radius = boundary_radius(*image.shape[-2:])
    line = torch.tensor(gaussian(radius, radius / 3))

    def grounds(layer_4HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        black = layer_4HW[:3] * layer_4HW[3:]
        return black[None], (black + 1 - layer_4HW[3:])[None]

    def fidelity(layer_4HW: torch.Tensor, truth_4HW: torch.Tensor) -> float:
        found = []
        for x, y in zip(grounds(layer_4HW), grounds(truth_4HW), strict=True):
            _, similarity = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
            ratio_db = peak_signal_noise_ratio(x, y, data_range=1.0)
            found += [float(similarity.mean()), float((ratio_db / PSNR_CEILING_DB).clamp(0, 1))]
        return float(np.mean(found))

    def band(alpha_HW: torch.Tensor) -> torch.Tensor:
        soft = ((alpha_HW >= SOFT_BAND[0]) & (alpha_HW <= SOFT_BAND[1])).float()[None, None]
        across = F.conv2d(soft, line.view(1, 1, 1, -1), padding=(0, radius))
        return F.conv2d(across, line.view(1, 1, -1, 1), padding=(radius, 0))[0, 0]

    columns = []
    for layers_LCHW in batch.layers_GLCHW:
        pairs = list(zip(layers_LCHW, batch.targets_LCHW, strict=True))
        backs = [zip(grounds(pairs[k][0]), grounds(pairs[k][1]), strict=True) for k in task.backgrounds]
        edges = []
        for layer, truth in (pairs[k] for k in task.foregrounds):
            mask = (band(layer[3]) + band(truth[3])).clamp(0, 1)
            edges.append(float(1 - (mask * (layer[3] - truth[3]).abs()).sum() / mask.sum()))
        columns.append(
            [
                np.mean([fidelity(layer, truth) for layer, truth in pairs]),
                fidelity(over(layers_LCHW[None])[0], image),
                np.mean([1 - float(distance(x[None], y)) for pair in backs for x, y in pair]),
                np.mean(edges),
            ]
        )
    return np.array(columns).T


def kernels(batch: RewardBatch) -> Callable[[], None]:
    """SSIM and blur of the terms ``layer``, ``composition`` and ``boundary``, on blends that are ready."""
    assert batch.targets_LCHW is not None
    pairs = [
        (on_black_and_white(batch.targets_LCHW), on_black_and_white(batch.layers_GLCHW)),
        (on_black_and_white(batch.inputs[0]), on_black_and_white(over(batch.layers_GLCHW))),
    ]
    front = list(get_task(TASK).foregrounds)
    alphas = torch.cat([batch.targets_LCHW[None, front, 3], batch.layers_GLCHW[:, front, 3]])
    radius = boundary_radius(*alphas.shape[-2:])
    bands = soft_band(alphas, radius)

    def run() -> None:
        for truths, predictions in pairs:
            ssim(predictions, truths)
        blur(bands, gaussian(radius, radius / 3), mirror=False)

    return run


def alternate(repeats: int, *sides: Callable[[], object]) -> list[float]:
    """Median seconds of each side; they take turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats + 1):
        for measured, side in zip(seconds, sides, strict=True):
            began = time.perf_counter()
            side()
            measured.append(time.perf_counter() - began)
    return [statistics.median(measured[1:]) for measured in seconds]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    missed, record = [], {}

    for preset in ("paper", "paper_code"):
        config = RewardConfig(preset=preset)
        scorers = build_scorers(config)
        for size in (64, 512):
            pixels = example(size)
            batch = reward_batch(pixels)
            apart = np.abs(score_group(config, scorers, pixels).scores_TG - one_by_one(config, scorers, batch)).max()
            single, group = alternate(
                options.repeats if size < 512 else max(1, options.repeats // 2),
                partial(one_by_one, config, scorers, batch),
                partial(score_group, config, scorers, pixels),
            )
            if preset == "paper":
                metrics_TG = library_metrics(batch)
                off = np.abs(score_group(config, scorers, pixels).scores_TG - metrics_TG).max()
                library, group_again = alternate(
                    1, partial(library_metrics, batch), partial(score_group, config, scorers, pixels)
                )
                record[f"metrics {size}"] = {"metrics": library, "group": group_again, "apart": float(off)}
                print(
                    f"{preset} at {size}², metrics / group: {library / group_again:.2f}  ({library:.3f} s / "
                    f"{group_again:.3f} s), scores differ by at most {off:.1e}"
                )
                if not off <= ROUNDING:
                    missed.append(f"scores at {size}² differ from the libraries' by {off:.1e}")
                if library < GAIN * group_again:
                    missed.append(f"a group at {size}² gains {library / group_again:.2f} over single metrics")
            record[f"{preset} {size}"] = {"one by one": single, "group": group, "apart": float(apart)}
            print(
                f"{preset} at {size}², one by one / group: {single / group:.2f}  ({single:.3f} s / {group:.3f} s), "
                f"scores differ by at most {apart:.1e}"
            )
            if not apart <= 1e-6:
                missed.append(f"scores of {preset} at {size}² differ by {apart:.1e}")
            if single < GAIN * group:
                missed.append(f"{preset} at {size}² gains {single / group:.2f} instead of {GAIN:g}")

    config = RewardConfig(terms=tuple(TermConfig(name=name) for name in ("layer", "composition", "boundary")))
    scorers, pixels = build_scorers(config), example(1024)
    group, bare = alternate(
        max(1, options.repeats // 2), partial(score_group, config, scorers, pixels), kernels(reward_batch(pixels))
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    record["1024"] = {"group": group, "kernels": bare, "memory_gb": memory}
    print(
        f"group of {MEMBERS} at 1024²: {group:.2f} s, its kernels {bare:.2f} s, ratio {group / bare:.2f}; "
        f"peak memory of the process {memory:.1f} GB"
    )
    if group > SECONDS and group > SHARE * bare:
        missed.append(f"the large group takes {group:.2f} s, more than {SECONDS:g} s and {SHARE:g} times its kernels")
    if memory > MEMORY_GB:
        missed.append(f"the process took {memory:.1f} GB, more than {MEMORY_GB:g} GB")
    print(json.dumps(record))
    for miss in missed:
        print(f"missed: {miss}")
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
