"""Layers from a real base: what diffusers' Edit-Plus pipeline does for one RGB picture, for stacks of RGBA layers.

Sizes, schedule, template and guidance are the pipeline's own; with one opaque input and one target it gives the same
latents (``tests/unit/policy/test_real_base.py``).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from pydantic import Field
from torch import Tensor

from common.config import StrictConfig
from common.errors import ConfigError, DataError, NumericsError
from data.rgba import to_uint8_hwc
from data.tasks import Task
from policy.base import load_base
from policy.dit import PATCH, check_axis
from policy.qwen import QwenEncoder
from policy.sampling import Condition, Guidance, denoise
from policy.schedule import ScheduleConfig, Solver
from policy.vae import LatentCodec

MULTIPLE = 32
"""Sides of what the pipeline scales pictures to are multiples of this."""


class EditConfig(StrictConfig):
    """How samples are drawn from a real base."""

    steps: int = Field(50, ge=2)
    """Number of denoising steps."""
    shift: float | None = Field(None, gt=0)
    """Time shift of the noise levels; None takes the schedule of the base, which depends on the size."""
    solver: Solver = "euler"
    """ODE steps: first-order Euler, as the base has it, or the second-order multistep DPM-Solver++ (2M)."""
    guidance: float = Field(4.0, ge=1)
    """Scale of classifier-free guidance with rescaling; 1 is none, which halves the work."""
    negative: str = " "
    """What guidance leads away from."""
    seed: int = 0
    """Of the initial noise; result g takes seed + g, as diffusers' users do."""
    count: int = Field(1, ge=1)
    """Number of samples."""
    size: int = Field(1024, ge=MULTIPLE, multiple_of=MULTIPLE)
    """Pictures are scaled to an area of size x size pixels, proportions kept."""


def canvas(height: int, width: int, size: int, where: str = "the picture") -> tuple[int, int]:
    """(height, width) to which the pipeline scales a picture for an area of size x size pixels.

    Raises:
        DataError: the picture, which ``where`` names, is too narrow for that or for the text encoder.
    """
    area, ratio = size * size, width / height
    if not all(min(stock.calculate_dimensions(pixels, ratio)) for pixels in (area, stock.CONDITION_IMAGE_SIZE)):
        raise DataError(f"{where}: {width}x{height} pixels are too narrow for the model; crop it to a less narrow part")
    scaled_width, scaled_height = stock.calculate_dimensions(area, ratio)
    return scaled_height, scaled_width


def base_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int) -> list[float]:
    """The base's noise levels for targets of ``tokens`` tokens each: steps + 1 of them, falling to 0."""
    settings = scheduler.config
    mu = stock.calculate_shift(
        tokens,
        settings.get("base_image_seq_len", 256),
        settings.get("max_image_seq_len", 4096),
        settings.get("base_shift", 0.5),
        settings.get("max_shift", 1.15),
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return [float(sigma) for sigma in scheduler.sigmas]


class EditPolicy:
    """A base folder, loaded for sampling in the dtype it is stored in.

    Raises:
        CheckpointError: the folder holds no usable base.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self._folder, self._device = folder, torch.device(device)
        base = load_base(folder, self._device)
        self.transformer, self._scheduler = base.transformer, base.scheduler
        self._codec = LatentCodec(base.vae)
        self._encoder = QwenEncoder(folder, self._device)
        self._scale = VaeImageProcessor(vae_scale_factor=self._codec.factor * PATCH, do_normalize=False)

    def infer(self, task: Task, inputs: Sequence[Tensor], prompt: str, config: EditConfig) -> Tensor:
        """Samples ``config.count`` stacks of layers, with G that number.

        Args:
            inputs: condition images in the order of ``task.inputs``, float in [0, 1], each (4, H, W) of any size.

        Returns:
            layers_GLCHW in [0, 1] on the CPU, straight alpha, layers back to front as in ``task.targets``; their size
            is the last input's canvas, or a square without inputs.

        Raises:
            ConfigError: the inputs do not fit the task, or the sequence the model.
            DataError: an input is too narrow.
            NumericsError: the model gave something that is not a number.
        """
        shapes = [tuple(image.shape) for image in inputs]
        if len(shapes) != len(task.inputs) or any(len(shape) != 3 or shape[0] != 4 for shape in shapes):
            roles = ", ".join(task.inputs) or "none"
            raise ConfigError(f"{task.name} takes {len(task.inputs)} images ({roles}), each (4, H, W); got {shapes}")
        latents_GMCHW = self.latents(len(task.targets), inputs, prompt, config)
        layers_GLCHW = torch.stack([self._codec.decode(stack).float().cpu() for stack in latents_GMCHW])
        if not torch.isfinite(layers_GLCHW).all():
            raise NumericsError(f"{self._folder}: the model gave values that are not numbers; take another checkpoint")
        return layers_GLCHW

    @torch.no_grad()
    def latents(self, targets: int, inputs: Sequence[Tensor], prompt: str, config: EditConfig) -> Tensor:
        """Clean latents (G, M, C, h, w) of ``targets`` layers under a prompt and pictures; see :meth:`infer`."""
        sizes = [canvas(image.shape[1], image.shape[2], config.size) for image in inputs]
        height, width = (side // self._codec.factor for side in (sizes[-1] if sizes else (config.size,) * 2))
        places = [(height, width)] * targets + [(h // self._codec.factor, w // self._codec.factor) for h, w in sizes]
        text = self._encoder.encode(prompt, inputs)[None]
        check_axis(places, text.shape[1])  # before the pictures go through the VAE
        dtype = self.transformer.dtype
        condition = Condition(self._encode(inputs, sizes), text.to(dtype))
        guidance = None
        if config.guidance > 1:
            negative = self._encoder.encode(config.negative, inputs)[None].to(dtype)
            guidance = Guidance(Condition(condition.inputs_BNCHW, negative), config.guidance)
        if config.shift is None:
            sigmas = base_sigmas(self._scheduler, config.steps, (height // PATCH) * (width // PATCH))
        else:
            sigmas = ScheduleConfig(steps=config.steps, shift=config.shift).sigmas()
        results = []
        for number in range(config.count):
            # As diffusers draws it: on the CPU, and on every device the same.
            generator = torch.Generator().manual_seed(config.seed + number)
            initial = torch.randn((1, targets, self._codec.channels, height, width), generator=generator, dtype=dtype)
            results.append(
                denoise(
                    self.transformer,
                    condition,
                    initial.to(self._device),
                    sigmas,
                    solver=config.solver,
                    guidance=guidance,
                ).latents_BMCHW[0]
            )
        return torch.stack(results)

    def _encode(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Latents (1, C, h, w) of the inputs, alpha and all, each at its own size."""
        found = []
        for image, (height, width) in zip(inputs, sizes, strict=True):
            pixels = self._scale.preprocess(Image.fromarray(to_uint8_hwc(image)), height, width)
            found.append(self._codec.encode(pixels.to(self._device, self._codec.vae.dtype)).to(self.transformer.dtype))
        return found
