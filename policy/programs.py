"""What a learner trains: a program owns a module and turns work items into micro-batches and losses.

A program knows nothing about ranks, engines or Ray. Whoever drives it forwards through ``model`` (the module itself,
or an engine wrapped round it), divides the loss sums by the global count and steps the optimiser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import QwenImageTransformer2DModel
from PIL.Image import Image
from pydantic import Field

from common.config import StrictConfig
from common.errors import ConfigError
from data.records import RecordDataset
from data.rgba import draw_grid, layer_rows
from data.sampler import Draw
from data.seeding import seed_for
from policy.adapters import LoraConfig, base_dtype
from policy.conditions import ConditionCache, ConditionEncoder, open_encoder
from policy.dit import DitConfig, build_dit, velocity
from policy.folder import export_policy, load_vae, starting_policy
from policy.held_out import sample_records
from policy.latents import LatentCache
from policy.objectives import flow_matching_pair, shifted_times
from policy.sampling import Condition
from policy.schedule import ScheduleConfig
from policy.sight import Sight, sight_for
from policy.text import TEXT_DIM, pad_states
from policy.vae import LatentCodec, latent_channels


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
    """The contract between a learner rank and what it trains.

    Random numbers are drawn in host memory, so that they do not depend on the device, and inputs are moved to it.
    """

    module: torch.nn.Module

    def place(self, device: torch.device) -> None:
        """Moves the module, and whatever of its own the program computes with beside it."""

    def micro_batches(self, payload: Any, extra: Any) -> Sequence[Any]:
        """Splits one work item (with its small companion, such as advantages) into micro-batches, one backward each."""

    def loss(self, model: torch.nn.Module, micro: Any) -> MicroLoss:
        """Forwards ``model`` on a micro-batch."""

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Writes the module with the given weights as a policy folder."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of records: a draw and its position in the training stream."""

    position: int
    draw: Draw


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
        transformer: QwenImageTransformer2DModel,
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
        self._dataset, self._data = dataset, RecordDataset(dataset, "train")
        self._conditions = vae_stage / "conditions"
        self._device = transformer.device

    def place(self, device: torch.device) -> None:
        self._device = device
        self.module.to(device)
        self._vae.to(device)

    @cached_property
    def _text(self) -> ConditionEncoder:  # not in the constructor: a real base's is large, and its device known later
        return open_encoder(self._start, self._conditions, self._device)

    @cached_property
    def _sight(self) -> Sight | None:
        return sight_for(self.module, self._device)

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
        condition = Condition(torch.stack(inputs), text, mask).to(self._device)
        output = velocity(
            model,
            noisy.to(self._device),
            times.to(self._device),
            condition.inputs_BNCHW,
            condition.text_BTD,
            condition.text_mask_BT,
        )
        errors_B = ((output.float() - target.to(self._device)) ** 2).flatten(1).mean(1)
        return MicroLoss(errors_B.sum(), len(indices), {"mse": float(errors_B.detach().sum())})

    def export(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        export_policy(folder, self._vae, self.module, weights, self._lora, self._start)

    def draw(self, model: torch.nn.Module, indices: Sequence[int], schedule: ScheduleConfig) -> Image:
        """A grid of validation records: input, a sample of ``model``, truth; one row for each layer."""
        data, codec = RecordDataset(self._dataset, "val"), LatentCodec(self._vae, self._sight)
        rows, titles = list[list[torch.Tensor | None]](), list[str]()
        precision = base_dtype(self._lora)
        for index in indices:  # one by one: they differ in task and size
            record = data.record(index)
            ((sample, layers),) = sample_records(model, codec, self._text, [record], schedule, self._seed, precision)
            rows += layer_rows(sample.inputs, [layers], sample.targets_LCHW)
            titles += [f"{record.task}: {record.prompt}"] * len(layers)
        return draw_grid(rows, ["input", "sample", "truth"], titles)

    def _states(self, index: int, prompt: str) -> torch.Tensor:
        if not isinstance(self._text, ConditionCache):  # it reads the prompt alone
            return self._text.encode(prompt)
        digests = [image.digest for image in self._data.cheap(index).inputs]
        return self._text.lookup(prompt, digests, lambda: self._data.record(index).decode().inputs).float()

    def _latents(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self._data.cheap(index)
        digests = [image.digest for image in record.inputs]
        # In one stack, which knows the size also where there are no inputs.
        inputs, targets = self._cache.stack([*digests, *(image.digest for image in record.targets)]).tensor_split(
            [len(digests)]
        )
        if self._sight is not None:
            seen = self._sight.lookup(digests, lambda: self._data.record(index).decode().inputs, *targets.shape[-2:])
            inputs = torch.cat([inputs, seen], dim=1)
        return inputs, targets


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
