"""Layers from a trained policy in the calling process: no Ray, no dataset."""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from common.config import StrictConfig
from common.errors import ConfigError, NumericsError
from data.tasks import Task
from policy.dit import PATCH
from policy.folder import load_transformer, load_vae
from policy.sampling import Condition, Guidance, denoise, member_noise
from policy.schedule import ScheduleConfig
from policy.sight import sight_for
from policy.text import TextEncoder
from policy.vae import LatentCodec


class InferConfig(StrictConfig):
    """How samples are drawn."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Noise levels and solver; every step is an ODE step."""
    guidance: float = Field(1.0, ge=1)
    """Scale of classifier-free guidance with rescaling; 1 is none."""
    negative: str = ""
    """What guidance leads away from; the empty prompt is what training drops prompts to."""
    seed: int = 0
    """Of the initial noise."""
    count: int = Field(1, ge=1)
    """Number of samples."""
    size: int = Field(64, ge=1)
    """Side of the model's square in pixels: the size that the policy was trained at, which its folder does not say."""


class Policy:
    """A policy folder, loaded for sampling: transformer with its adapter, VAE and text encoder.

    Raises:
        CheckpointError: the folder holds no usable policy.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        vae = load_vae(folder)
        self._model = load_transformer(folder).eval().requires_grad_(False)
        self._codec = LatentCodec(vae, sight_for(self._model))
        self._text = TextEncoder()

    @property
    def patch(self) -> int:
        """Pixels along a side of one patch of the transformer."""
        return self._codec.factor * PATCH

    def check_size(self, size: int) -> None:
        """Raises ConfigError if squares of ``size`` pixels do not split into patches."""
        if size % self.patch:
            raise ConfigError(
                f"size {size} must be a multiple of {self.patch} (VAE factor {self._codec.factor} x patch {PATCH}) for "
                f"{self._folder}; take the size that the policy was trained at"
            )

    def infer(self, task: Task, inputs: Sequence[torch.Tensor], prompt: str, config: InferConfig) -> torch.Tensor:
        """Samples ``config.count`` stacks of layers, with G that number.

        Sample g follows from the seed and g alone, however many are drawn: they are sampled one after another, since
        the size of a batch shows in the last bits of its results.

        Args:
            inputs: condition images in the order of ``task.inputs``, float in [0, 1], each (4, size, size).

        Returns:
            layers_GLCHW in [0, 1], straight alpha, layers back to front as in ``task.targets``.

        Raises:
            ConfigError: the size does not fit the model, or the inputs do not fit the task or the size.
            NumericsError: the model gave something that is not a number.
        """
        self.check_size(config.size)
        square, shapes = (4, config.size, config.size), [tuple(image.shape) for image in inputs]
        if shapes != [square] * len(task.inputs):
            roles = ", ".join(task.inputs) or "none"
            raise ConfigError(f"{task.name} takes {len(task.inputs)} images ({roles}), each {square}; got {shapes}")
        latents_NCHW = self._codec.encode_stack(inputs, config.size, config.size)
        shape = (len(task.targets), self._codec.channels, *latents_NCHW.shape[2:])
        condition = Condition(latents_NCHW[None], self._text.encode(prompt)[None])
        guidance = None
        if config.guidance > 1:
            negative = Condition(latents_NCHW[None], self._text.encode(config.negative)[None])
            guidance = Guidance(negative, config.guidance)
        layers = []
        for number in range(config.count):
            initial = member_noise(shape, config.seed, 0, 0, number, "sample")[None]
            schedule = config.schedule
            result = denoise(
                self._model, condition, initial, schedule.sigmas(), solver=schedule.solver, guidance=guidance
            )
            layers.append(self._codec.decode(result.latents_BMCHW[0]))
        layers_GLCHW = torch.stack(layers)
        if not torch.isfinite(layers_GLCHW).all():
            raise NumericsError(f"{self._folder}: the model gave values that are not numbers; take another checkpoint")
        return layers_GLCHW
