"""Encoding a split once: Ray tasks that turn records into latent shards and the statistics of their channels."""

from collections.abc import Sequence
from pathlib import Path

import ray
import torch

from actors.cluster import ClusterConfig
from actors.waiting import wait_all
from data.records import RecordDataset
from policy.folder import load_vae
from policy.latents import write_latent_shard

CHUNK = 64


def _encode_share(model: Path, dataset: Path, indices: Sequence[int], owned: frozenset[str], path: Path, threads: int):
    """Encodes the owned images of some records; returns their number and the channels' sums and sums of squares."""
    torch.set_num_threads(threads)
    vae = load_vae(model).eval()
    data = RecordDataset(dataset, "train")
    images: dict[str, torch.Tensor] = {}
    latents: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if images:
            with torch.no_grad():
                means = vae.encode(torch.stack(list(images.values())) * 2 - 1).latent_dist.mean
            latents.update(zip(images, means.to(torch.float16), strict=True))
            images.clear()

    for index in indices:
        record = data.record(index)
        sample = record.decode()
        pairs = [
            *zip(record.inputs, sample.inputs, strict=True),
            *zip(record.targets, sample.targets_LCHW, strict=True),
        ]
        for stored, image in pairs:
            if stored.digest in owned and stored.digest not in latents:
                images[stored.digest] = image
        if len(images) >= CHUNK:
            flush()
    flush()
    write_latent_shard(path, latents)
    stacked = torch.stack(list(latents.values())).double()
    return len(latents), stacked.mean((2, 3)).sum(0), (stacked**2).mean((2, 3)).sum(0)


def encode_split(config: ClusterConfig, model: Path, dataset: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes the training split into shards under ``out``; every distinct image once.

    Returns:
        Mean and standard deviation of the raw latents per channel.
    """
    data = RecordDataset(dataset, "train")
    workers = config.rollout.actors
    owner: dict[str, int] = {}
    shares: list[list[int]] = [[] for _ in range(workers)]
    for index in range(len(data)):
        record = data.cheap(index)
        digests = [image.digest for image in (*record.inputs, *record.targets)]
        worker = index * workers // len(data)
        for digest in digests:
            owner.setdefault(digest, worker)
        for number in {owner[digest] for digest in digests}:
            shares[number].append(index)
    task = ray.remote(num_cpus=config.rollout.cpus, num_gpus=config.rollout.gpus, max_retries=0)(_encode_share)
    refs = [
        task.remote(
            model,
            dataset,
            shares[k],
            frozenset(digest for digest, number in owner.items() if number == k),
            out / f"latents-{k:05d}.safetensors",
            config.rollout.threads,
        )
        for k in range(workers)
        if shares[k]
    ]
    parts = wait_all(refs, "training images to be encoded", config.deadline_s)
    count = sum(part[0] for part in parts)
    mean = sum(part[1] for part in parts) / count
    std = (sum(part[2] for part in parts) / count - mean**2).sqrt()
    return mean, std
