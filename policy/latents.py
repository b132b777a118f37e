"""Latents of a dataset split, encoded once: training reads them instead of pixels.

A cache is a safetensors file per shard and size with the raw (un-normalised) posterior means in float16 and, in its
metadata, the pixel digest of each row. The same image in several records is stored once.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.commit import storage_errors
from common.errors import CheckpointError
from data.records import RecordDataset
from policy.folder import load_vae
from policy.vae import latent_channels, posterior_means

ENCODE_BATCH = 64


def write_latent_shard(path: Path, latents: Mapping[str, torch.Tensor]) -> None:
    """Writes raw latents (C, H, W) keyed by pixel digest; all of one shape."""
    digests = sorted(latents)
    stacked = torch.stack([latents[digest] for digest in digests]).to(torch.float16)
    with storage_errors(path):
        save_file({"latents": stacked}, path, metadata={"digests": json.dumps(digests)})


class LatentCache:
    """Normalised latents by pixel digest, read from disk when they are asked for.

    Raises:
        CheckpointError: no shard in the folder, or a digest nobody encoded.
    """

    def __init__(self, folder: Path, mean_C: Iterable[float], std_C: Iterable[float]) -> None:
        self._folder = folder
        self._mean = torch.tensor(list(mean_C)).view(-1, 1, 1)
        self._std = torch.tensor(list(std_C)).view(-1, 1, 1)
        self._rows: dict[str, tuple[Any, int]] = {}  # the file's tensor, mapped and not read, and the row in it
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            stacked = file.get_slice("latents")
            self._rows.update((d, (stacked, row)) for row, d in enumerate(json.loads(file.metadata()["digests"])))
        if not self._rows:
            raise CheckpointError(f"{folder}: no latents here; run `omnialpha vae` first")

    def __len__(self) -> int:
        return len(self._rows)

    def stack(self, digests: Iterable[str]) -> torch.Tensor:
        """Normalised latents (K, C, H, W) float32 in the order asked for, all of one size."""
        try:
            # Before stacking: under bfloat16 autocast torch refuses to join float16 tensors.
            rows = [stacked[row].float() for stacked, row in (self._rows[digest] for digest in digests)]
        except KeyError as error:
            raise CheckpointError(
                f"{self._folder}: image {error.args[0]} was never encoded; the dataset changed after `omnialpha vae`"
            ) from None
        if not rows:
            return torch.zeros(0, *next(iter(self._rows.values()))[0].get_shape()[1:])
        return (torch.stack(rows) - self._mean) / self._std


@dataclass(frozen=True)
class LatentSums:
    """Channel statistics of a share of the latents, additive over shares."""

    count: int
    sum_C: torch.Tensor
    square_C: torch.Tensor


def split_work(data: RecordDataset, workers: int) -> list[tuple[list[int], frozenset[str]]]:
    """Per worker: the records to read and the pixel digests to encode. Every distinct image has one owner."""
    owner: dict[str, int] = {}
    indices: list[list[int]] = [[] for _ in range(workers)]
    for index in range(len(data)):
        digests = data.digests(index)
        for digest in digests:
            owner.setdefault(digest, index * workers // len(data))
        for worker in sorted({owner[digest] for digest in digests}):
            indices[worker].append(index)
    return [(share, frozenset(d for d, w in owner.items() if w == k)) for k, share in enumerate(indices)]


def encode_records(
    model: Path,
    data: RecordDataset,
    indices: Sequence[int],
    owned: frozenset[str],
    out: Path,
    device: torch.device | str = "cpu",
) -> LatentSums:
    """Encodes the owned images of some records into the shard ``out``; those of further sizes into shards beside it."""
    vae = load_vae(model).eval().to(device)
    latents: dict[str, torch.Tensor] = {}
    by_size: dict[torch.Size, dict[str, torch.Tensor]] = {}  # waiting to be encoded together

    def flush(waiting: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            means = posterior_means(vae, torch.stack(list(waiting.values())).to(device))
        latents.update(zip(waiting, means.to("cpu", torch.float16), strict=True))
        waiting.clear()

    for index in indices:
        sample = data.record(index).decode()
        for digest, image in zip(data.digests(index), [*sample.inputs, *sample.targets_LCHW], strict=True):
            if digest in owned and digest not in latents:
                waiting = by_size.setdefault(image.shape, {})
                waiting[digest] = image
                if len(waiting) >= ENCODE_BATCH:
                    flush(waiting)
    for waiting in by_size.values():
        if waiting:
            flush(waiting)
    if not latents:  # fewer images than workers
        channels = latent_channels(vae)
        return LatentSums(0, torch.zeros(channels).double(), torch.zeros(channels).double())
    sizes = sorted({latent.shape for latent in latents.values()})
    for number, size in enumerate(sizes):
        path = out.with_stem(f"{out.stem}-{size[1]}x{size[2]}") if number else out
        write_latent_shard(path, {digest: latent for digest, latent in latents.items() if latent.shape == size})
    values = [latent.double() for latent in latents.values()]
    sums, squares = (torch.stack([v.mean((1, 2)) for v in each]).sum(0) for each in (values, [v**2 for v in values]))
    return LatentSums(len(latents), sums, squares)


def latent_statistics(parts: Sequence[LatentSums]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel over all shares."""
    count = sum(part.count for part in parts)
    mean_C = torch.stack([part.sum_C for part in parts]).sum(0) / count
    return mean_C, (torch.stack([part.square_C for part in parts]).sum(0) / count - mean_C**2).sqrt()
