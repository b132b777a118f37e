"""DeepSpeed under one roof: exact gradient accumulation, global loss normalisation, EMA, state on disk.

DeepSpeed averages gradients over ranks, so a loss that is to be divided by a *global* count is multiplied by the
world size. Accumulation boundaries are set explicitly and losses are never scaled by accumulation steps: the number
of micro-batches may differ from step to step, and DeepSpeed has dropped all but the last one before.
"""

import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin
from pydantic import Field

from actors import training_state
from common.config import StrictConfig
from common.errors import CheckpointError, NumericsError
from policy.precision import Precision, attending, computing
from policy.programs import MicroLoss


class OptimiserConfig(StrictConfig):
    """AdamW with warm-up and optional cosine decay."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments' decay."""
    eps: float = Field(1e-8, gt=0)
    """Denominator offset."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(1.0, ge=0)
    """Gradient norm limit; 0 switches clipping off."""
    warmup: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up; ``cosine`` falls to a tenth at the last step."""


class EngineConfig(StrictConfig):
    """How ranks share the work."""

    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage. Stage 3 without gradient checkpointing keeps gathered weights until the backward pass."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the averaged weights that a stage hands on; 0 switches averaging off."""
    precision: Precision = "float32"
    """Of matrix products and convolutions in the forward and backward pass (autocast); weights stay float32."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes the blocks of a diffusers model again instead of keeping their activations."""


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0) of ``steps``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


class Engine:
    """A DeepSpeed engine round one module. ``torch.distributed`` must be initialised."""

    def __init__(self, module: torch.nn.Module, optimiser: OptimiserConfig, config: EngineConfig) -> None:
        os.environ.setdefault("DS_ACCELERATOR", next(module.parameters()).device.type)
        import deepspeed

        self.config, self.optimiser = config, optimiser
        self.world = torch.distributed.get_world_size()
        self.module = module
        if config.gradient_checkpointing:
            assert isinstance(module, ModelMixin)
            module.enable_gradient_checkpointing()
        parameters = [p for p in module.parameters() if p.requires_grad]
        # By name and once: a program may switch between adapters, and with them what carries gradients.
        self._trained = {name for name, p in module.named_parameters() if p.requires_grad}
        self._partly = len(self._trained) < sum(1 for _ in module.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optimiser.clip_norm,
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "overlap_comm": False,
                    # True would put another nn.functional.linear into this process for good. Under autocast it rounds
                    # differently from the rollouts' (first ratio off by 4e-5), and stages after this one would use it.
                    "memory_efficient_linear": False,
                },
                "zero_allow_untested_optimizer": True,
                "optimizer": {
                    "type": "AdamW",
                    "params": {
                        "lr": optimiser.lr,
                        "betas": list(optimiser.betas),
                        "eps": optimiser.eps,
                        "weight_decay": optimiser.weight_decay,
                        "torch_adam": True,
                    },
                },
                "steps_per_print": 10**9,
            },
        )
        self.ema: dict[str, torch.Tensor] = {}
        if config.ema:
            self.ema = {name: value.detach().clone() for name, value in self.weights().items()}

    @property
    def _device_type(self) -> str:
        return next(self.module.parameters()).device.type

    def autocast(self) -> AbstractContextManager[None]:
        """Context of a forward pass at the configured precision."""
        return computing(self.config.precision, self._device_type)

    def accumulate(self, loss: MicroLoss, global_count: int, *, last: bool, weight: float = 1.0) -> None:
        """Backward of one micro-batch.

        Args:
            global_count: terms of this optimiser step over all ranks.
            last: whether this is the rank's last micro-batch of the step.
            weight: 0 for a micro-batch that only keeps the ranks' backward calls equal in number.

        Raises:
            NumericsError: the loss is not finite; nothing was stepped.
        """
        if not torch.isfinite(loss.total):
            raise NumericsError(f"loss is {float(loss.total)} before the optimiser step; nothing was trained on it")
        self.engine.set_gradient_accumulation_boundary(last)
        scaled = loss.total * (weight * self.world / global_count)
        with attending(self.config.precision, self._device_type):  # checkpointed blocks are computed again in here
            self.engine.backward(scaled, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; no update before the boundary

    def step(self, lr: float) -> float:
        """Updates the weights and returns the gradient norm before clipping.

        Raises:
            NumericsError: the gradient norm is not finite; the weights are as before.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # Without ZeRO the reduced gradients are the module's own and DeepSpeed reports no norm.
        plain = [p.grad for p in self.module.parameters() if p.grad is not None] if not self.config.zero_stage else []
        norm = float(torch.nn.utils.get_total_norm(plain)) if plain else None
        if norm is None or math.isfinite(norm):
            self.engine.step()
            norm = float(self.engine.get_global_grad_norm()) if norm is None else norm
        # ZeRO has skipped the step by itself when it reports an infinite norm (or -1).
        if not math.isfinite(norm) or norm < 0:
            raise NumericsError(f"gradient norm is {norm} before the optimiser step; the weights are unchanged")
        if self.ema:
            # Early steps average over less: min(decay, (1 + n) / (10 + n)), as in TensorFlow's moving averages.
            n = self.engine.global_steps
            decay = min(self.config.ema, (1 + n) / (10 + n))
            for name, value in self.weights().items():
                self.ema[name].lerp_(value.detach(), 1 - decay)
        return norm

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, whole, by name; with a frozen base only what is trained on top of it.

        Under ZeRO 3 all ranks must call it together.
        """
        if self.config.zero_stage < 3:
            state = dict(self.module.state_dict())
            return {name: state[name] for name in self._trained} if self._partly else state
        import deepspeed

        parameters = {name: p for name, p in self.module.named_parameters() if name in self._trained}
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            gathered = {name: value.detach().clone() for name, value in parameters.items()}
        return gathered if self._partly else gathered | dict(self.module.named_buffers())

    def published(self) -> dict[str, torch.Tensor]:
        """What the stage hands on: averaged weights where averaging is on, else the weights."""
        return self.ema or self.weights()

    def save(self, folder: Path, rank: int) -> None:
        """Writes this rank's share of the training state into a temporary commit folder; all ranks together."""
        training_state.save(self.engine, self.config.zero_stage, self._trained_parameters(), folder)
        if self.ema and rank == 0:
            torch.save(self.ema, folder / "ema.pt")

    def load(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote, from a folder that the manifest has vouched for; all ranks together.

        Number of ranks and ZeRO stage may be others than those that wrote it.

        Raises:
            CheckpointError: the state is not there, or is of other parameters.
        """
        if not (folder / training_state.FOLDER).is_dir():
            raise CheckpointError(f"{folder}: no training state in this commit")
        if (folder / training_state.FOLDER / "state.json").is_file():
            training_state.load(self.engine, self.config.zero_stage, self._trained_parameters(), folder)
        else:
            self._load_deepspeed(folder)
        if self.config.ema:
            self.ema = torch.load(folder / "ema.pt", next(self.module.parameters()).device, weights_only=True)

    def _load_deepspeed(self, folder: Path) -> None:
        """Restores a commit of earlier versions, which hold DeepSpeed's own checkpoint."""
        try:
            # A frozen base is not in the checkpoint: it came from the folder that training started from.
            tag = training_state.FOLDER
            path, _ = self.engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not self._partly)
        except Exception as error:  # DeepSpeed raises bare assertions and runtime errors here
            raise CheckpointError(
                f"{folder}: the training state cannot be loaded ({str(error)[:200] or error!r}); an earlier version"
                " wrote it: resume with the number of learner ranks and the ZeRO stage that it had"
            ) from error
        if path is None:  # DeepSpeed's way of saying "nothing there"
            raise CheckpointError(f"{folder}: no training state in this commit")

    def _trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if name in self._trained}


def sum_stats(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Adds logged sums; keys that begin with ``max_`` keep the largest."""
    total: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            if key.startswith("max_"):
                total[key] = max(total.get(key, value), value) if value == value else value
            else:
                total[key] = total.get(key, 0.0) + value
    return total
