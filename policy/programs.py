"""What a learner trains: a program owns a module and turns work items into micro-batches and losses.

A program knows nothing about ranks, engines or Ray. Whoever drives it forwards through ``model`` (the module itself,
or an engine wrapped round it), divides the loss sums by the global count and steps the optimiser.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from pydantic import Field

from common.config import StrictConfig
from common.errors import ConfigError
from data.records import RecordDataset
from data.rgba import blend
from data.sampler import Draw
from data.seeding import seed_for
from policy.adapters import LoraConfig
from policy.conditions import ConditionCache, open_encoder
from policy.dit import DitConfig, build_dit, velocity
from policy.folder import export_policy, load_vae, save_vae, starting_policy
from policy.latents import LatentCache
from policy.objectives import (
    alpha_blend_mse,
    flow_matching_pair,
    gaussian_kl,
    gaussian_kl_between,
    shifted_times,
)
from policy.text import TEXT_DIM, pad_states
from policy.vae import VaeConfig, build_vae, latent_channels, opaque


@dataclass(frozen=True)
class MicroLoss:
    """Loss of one micro-batch."""

    total: torch.Tensor
    """Sum over the micro-batch's terms, a scalar with gradient."""
    count: int
    """Number of terms in the sum."""
    stats: dict[str, float]
    """Sums of logged quantities over the same terms; keys with a ``max_`` prefix are maxima."""


class Program(Protocol):
    """The contract between a learner rank and what it trains."""

    module: torch.nn.Module

    def micro_batches(self, payload: Any, extra: Any) -> Sequence[Any]:
        """Splits one work item (with its small companion, such as advantages) into micro-batches, one backward each."""

    def loss(self, model: torch.nn.Module, micro: Any) -> MicroLoss:
        """Forwards ``model`` on a micro-batch."""

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes the module with the given weights as a policy folder."""


class VaeLossConfig(StrictConfig):
    """Weights of the VAE's loss terms."""

    blend: float = Field(1.0, ge=0)
    """Alpha-blend MSE over random backgrounds."""
    alpha: float = Field(0.5, ge=0)
    """Mean absolute error of alpha, which the blend loss alone sees only through colour."""
    colour: float = Field(0.5, ge=0)
    """Mean absolute error of alpha-weighted colour."""
    kl: float = Field(1e-6, ge=0)
    """KL to N(0, I)."""
    reference: float = Field(0.0, ge=0)
    """KL of the encoder to the one it started from, on images blended on black and on white."""


class VaeForward(torch.nn.Module):
    """Encoder and decoder in one forward pass, as an engine wants it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, pixels_BCHW: torch.Tensor, noise_seed: int, encode_NCHW: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Reconstruction, posterior mean and log-variance of the pixels, and the posterior of ``encode_NCHW``."""
        posterior = self.vae.encode(pixels_BCHW).latent_dist
        generator = torch.Generator().manual_seed(noise_seed)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = self.vae.decode(posterior.mean + posterior.std * noise).sample
        also = None if encode_NCHW is None else self.vae.encode(encode_NCHW).latent_dist.parameters
        return output, posterior.mean, posterior.logvar, also


@dataclass(frozen=True)
class Batch:
    """One micro-batch of records: a draw and its position in the training stream."""

    position: int
    draw: Draw


class VaeProgram:
    """Trains a VAE on every kind of image a record holds: 4 channels on RGBA, 3 on its blend over a random colour."""

    def __init__(self, vae: AutoencoderKL, config: VaeLossConfig, dataset: Path, seed: int) -> None:
        self.module = VaeForward(vae)
        self._config, self._seed, self._rgb = config, seed, vae.config.in_channels == 3
        self._data = RecordDataset(dataset, "train")
        self._reference = deepcopy(vae.encoder).requires_grad_(False).eval() if config.reference else None

    def micro_batches(self, payload: Batch, extra: None = None) -> Sequence[Batch]:
        return (payload,)

    def loss(self, model: torch.nn.Module, micro: Batch) -> MicroLoss:
        seed = seed_for(self._seed, "vae", micro.position)
        pick = np.random.default_rng(seed)
        images = []
        for index in micro.draw.indices:
            sample = self._data.record(int(index)).decode()
            stack = [*sample.inputs, *sample.targets_LCHW]
            image = stack[int(pick.integers(len(stack)))]
            image = image.flip(-1) if pick.random() < 0.5 else image
            images.append(blend(image, torch.tensor(pick.random((3, 1, 1)), dtype=image.dtype)) if self._rgb else image)
        pixels = torch.stack(images) * 2 - 1
        blends = None if self._reference is None else self._blends(pixels)
        output, mean, logvar, also = model(pixels, seed, blends)
        output, mean, logvar = output.float(), mean.float(), logvar.float()
        alpha = torch.ones(()) if self._rgb else (pixels[:, 3:] + 1) / 2
        parts = {
            "blend": (output - pixels).square().mean() if self._rgb else alpha_blend_mse(output, pixels),
            "colour": ((output[:, :3] - pixels[:, :3]).abs() * alpha).mean() / 2,
            "kl": gaussian_kl(mean, logvar),
        }
        if not self._rgb:
            parts["alpha"] = (output[:, 3:] - pixels[:, 3:]).abs().mean() / 2
        if self._reference is not None and blends is not None:
            with torch.no_grad():
                reference = self._reference(blends)
            parts["reference"] = gaussian_kl_between(also.float(), reference.float())
        total = sum((getattr(self._config, name) * part for name, part in parts.items()), torch.zeros(()))
        count = len(images)
        return MicroLoss(total * count, count, {name: float(part.detach()) * count for name, part in parts.items()})

    def _blends(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """The images on black and on white, opaque, (2B, C, H, W) in [−1, 1]."""
        if self._rgb:
            return pixels_BCHW
        images = (pixels_BCHW + 1) / 2
        solid = torch.cat([blend(images, 0.0), blend(images, 1.0)])
        return torch.cat([solid, torch.ones_like(solid[:, :1])], dim=1) * 2 - 1

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        module = deepcopy(self.module)
        module.load_state_dict(weights)
        save_vae(folder, module.vae)


class SftConfig(StrictConfig):
    """The supervised objective."""

    shift: float = Field(3.0, gt=0)
    """Time shift of the training noise levels; 1 is the paper's uniform law."""
    prompt_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a sample's prompt is replaced by the empty one."""


class SftProgram:
    """Rectified flow on cached latents of all tasks."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        config: SftConfig,
        vae_stage: Path,
        dataset: Path,
        seed: int,
        lora: LoraConfig | None = None,
        start: Path | None = None,
    ) -> None:
        """
        Args:
            vae_stage: what the VAE stage left: ``model/`` and ``latents/``.
            lora: settings of the adapter in ``transformer``, where it has one, and
            start: the policy folder that its base came from.
        """
        self.module, self._lora, self._start = transformer, lora, start
        self._config, self._seed = config, seed
        self._vae = load_vae(vae_stage / "model")
        statistics = self._vae.config
        self._cache = LatentCache(vae_stage / "latents", statistics.latents_mean, statistics.latents_std)
        self._data = RecordDataset(dataset, "train")
        self._text = open_encoder(start, vae_stage / "conditions")

    def micro_batches(self, payload: Batch, extra: None = None) -> Sequence[Batch]:
        return (payload,)

    def loss(self, model: torch.nn.Module, micro: Batch) -> MicroLoss:
        indices = [int(index) for index in micro.draw.indices]
        generator = torch.Generator().manual_seed(seed_for(self._seed, "sft", micro.position))
        inputs, targets = zip(*(self._latents(index) for index in indices), strict=True)
        clean = torch.stack(targets)
        noise = torch.randn(clean.shape, generator=generator)
        times = shifted_times(torch.rand(len(indices), generator=generator), self._config.shift)
        dropped = torch.rand(len(indices), generator=generator) < self._config.prompt_dropout
        prompts = ["" if drop else self._data.prompt(i) for i, drop in zip(indices, dropped, strict=True)]
        text, mask = pad_states([self._states(i, prompt) for i, prompt in zip(indices, prompts, strict=True)])
        noisy, target = flow_matching_pair(clean, noise, times)
        output = velocity(model, noisy, times, torch.stack(inputs), text, mask)
        errors_B = ((output.float() - target) ** 2).flatten(1).mean(1)
        return MicroLoss(errors_B.sum(), len(indices), {"mse": float(errors_B.detach().sum())})

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        export_policy(folder, self._vae, self.module, weights, self._lora, self._start)

    def _states(self, index: int, prompt: str) -> torch.Tensor:
        if not isinstance(self._text, ConditionCache):  # it reads the prompt alone
            return self._text.encode(prompt)
        digests = [image.digest for image in self._data.cheap(index).inputs]
        return self._text.lookup(prompt, digests, lambda: self._data.record(index).decode().inputs).float()

    def _latents(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self._data.cheap(index)
        return (
            self._cache.stack(image.digest for image in record.inputs),
            self._cache.stack(image.digest for image in record.targets),
        )


def make_vae_program(
    network: VaeConfig, config: VaeLossConfig, dataset: Path, seed: int, rgb: Path | None = None
) -> VaeProgram:
    """A 4-channel VAE and its objective: fresh, or converted from the RGB VAE in the folder ``rgb``."""
    vae = opaque(load_vae(rgb)) if rgb else build_vae(network, seed_for(seed, "vae weights"))
    return VaeProgram(vae, config, dataset, seed)


def make_rgb_program(network: VaeConfig, config: VaeLossConfig, dataset: Path, seed: int) -> VaeProgram:
    """A fresh 3-channel VAE and its objective."""
    vae = build_vae(network, seed_for(seed, "vae weights"), image_channels=3)
    return VaeProgram(vae, config, dataset, seed_for(seed, "rgb"))


def make_sft_program(
    network: DitConfig,
    start: Path | None,
    lora: LoraConfig | None,
    config: SftConfig,
    vae_stage: Path,
    dataset: Path,
    seed: int,
) -> SftProgram:
    """A fresh transformer that fits the VAE's latents, or the one of the policy folder ``start``, and its objective.

    Raises:
        ConfigError: the transformer of ``start`` works on other latents than the VAE stage's.
    """
    channels = latent_channels(load_vae(vae_stage / "model"))
    if start is None:
        transformer = build_dit(network, channels, TEXT_DIM, seed_for(seed, "transformer weights"))
    else:
        transformer = starting_policy(start, lora, seed)
        if transformer.config.out_channels != channels:
            raise ConfigError(
                f"sft.start {start}: its transformer works on {transformer.config.out_channels} latent channels, the "
                f"VAE of this run makes {channels}; set vae.network.latent_channels, or start from another policy"
            )
    return SftProgram(transformer, config, vae_stage, dataset, seed, lora, start)
