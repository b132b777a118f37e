"""Latents of a dataset split, encoded once: training reads them instead of pixels.

A cache is a safetensors file per shard with the raw (un-normalised) posterior means in float16 and, in its metadata,
the pixel digest of each row. The same image in several records is stored once.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import CheckpointError


def write_latent_shard(path: Path, latents: Mapping[str, torch.Tensor]) -> None:
    """Writes raw latents (C, H, W) keyed by pixel digest; all of one shape."""
    digests = sorted(latents)
    stacked = torch.stack([latents[digest] for digest in digests]).to(torch.float16)
    save_file({"latents": stacked}, path, metadata={"digests": json.dumps(digests)})


class LatentCache:
    """Normalised latents by pixel digest.

    Raises:
        CheckpointError: no shard in the folder, or a digest nobody encoded.
    """

    def __init__(self, folder: Path, mean_C: Iterable[float], std_C: Iterable[float]) -> None:
        self._folder = folder
        self._mean = torch.tensor(list(mean_C)).view(-1, 1, 1)
        self._std = torch.tensor(list(std_C)).view(-1, 1, 1)
        self._rows: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                stacked = file.get_tensor("latents")
                self._rows.update(zip(json.loads(file.metadata()["digests"]), stacked, strict=True))
        if not self._rows:
            raise CheckpointError(f"{folder}: no latents here; run `omnialpha vae` first")

    def __len__(self) -> int:
        return len(self._rows)

    def stack(self, digests: Iterable[str]) -> torch.Tensor:
        """Normalised latents (K, C, H, W) float32 in the order asked for."""
        try:
            rows = [self._rows[digest] for digest in digests]
        except KeyError as error:
            raise CheckpointError(
                f"{self._folder}: image {error.args[0]} was never encoded; the dataset changed after `omnialpha vae`"
            ) from None
        if not rows:
            return torch.zeros(0, *next(iter(self._rows.values())).shape)
        return (torch.stack(rows).float() - self._mean) / self._std
