"""Settings of every stage, beside each other; :mod:`pipeline.config` makes a run of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from actors.engine import EngineConfig, OptimiserConfig
from common.config import StrictConfig
from common.errors import ConfigError
from data.tasks import get_task
from policy.adapters import LoraConfig, base_dtype, check_targets
from policy.dit import DitConfig
from policy.group import Recording
from policy.kernels import KernelConfig
from policy.precision import Precision
from policy.programs import SftConfig
from policy.rl import CreditConfig, GrpoConfig, GrpoProgram, NftConfig, NftProgram, Start, Supervised, SupervisedConfig
from policy.sampling import GroupNoise
from policy.schedule import SamplingConfig, ScheduleConfig
from policy.vae import VaeConfig
from policy.vae_program import VaeLossConfig
from rewards.gaming import WatchConfig, applies
from rewards.judge.training import JudgeConfig
from rewards.metrics import HIGHER_IS_BETTER


class TrainingConfig(StrictConfig):
    """What every training stage has."""

    optimiser: OptimiserConfig
    """Optimiser and learning rate."""
    steps: int = Field(ge=1)
    """Steps of the stage's loop: optimiser steps, or in GRPO batches of rollouts."""
    commit_every: int = Field(100, ge=1)
    """Steps between commits; a killed run loses at most this many."""
    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    precision: Precision = "float32"
    """Of matrix products and convolutions while training, and in GRPO while sampling groups (autocast); weights stay
    float32."""
    tasks: dict[str, float]
    """Relative weight of each task in the mix."""

    @property
    def engine(self) -> EngineConfig:
        """How the stage's ranks share the work."""
        return EngineConfig(zero_stage=self.zero_stage, precision=self.precision)

    @model_validator(mode="after")
    def _tasks_exist(self) -> "TrainingConfig":
        for name, weight in self.tasks.items():
            try:
                get_task(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
            if weight < 0:
                raise ValueError(f"task {name} has weight {weight}; weights are 0 or more")
        if not any(self.tasks.values()):
            raise ValueError("no task has a positive weight")
        return self


class BatchedConfig(TrainingConfig):
    """A stage that trains on stored records."""

    micro_batch: int = Field(8, ge=1)
    """Records per backward call, all of one task."""
    micro_batches: int = Field(4, ge=1)
    """Backward calls per optimiser step over all ranks; the same whatever their number."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the averaged weights that the stage hands on; 0 switches averaging off."""

    @property
    def engine(self) -> EngineConfig:
        return super().engine.model_copy(update={"ema": self.ema})


class RgbStageConfig(BatchedConfig):
    """Stage 0, optional: an RGB VAE of the size of ``vae.network`` that stage 1 converts."""

    loss: VaeLossConfig = VaeLossConfig()
    """Loss weights; ``alpha`` has no meaning here."""

    @model_validator(mode="after")
    def _loss_fits(self) -> "RgbStageConfig":
        _check_vae_loss(self.loss, self.zero_stage)
        return self


class VaeStageConfig(BatchedConfig):
    """Stage 1: the alpha-aware VAE."""

    network: VaeConfig = VaeConfig()
    """Size of the network."""
    start: Path | None = None
    """Policy folder whose VAE is taken instead of a fresh one."""
    train: Literal["nothing", "decoder", "all"] = "nothing"
    """What of the VAE of ``start`` trains on; a fresh one always trains whole. With ``nothing`` the stage only encodes
    the training split; with ``decoder`` the encoder stays, and with it all that knows its latents; ``all`` aligns a VAE
    that `omnialpha vae-convert` made opaque, and ``loss.reference`` keeps its latents near those it started from."""
    loss: VaeLossConfig = VaeLossConfig()
    """Loss weights."""

    @model_validator(mode="after")
    def _loss_fits(self) -> "VaeStageConfig":
        if self.train != "nothing" and self.start is None:
            raise ValueError("train says what of an earlier VAE trains on: name its folder in vae.start")
        _check_vae_loss(self.loss, self.zero_stage)
        return self


class SftStageConfig(BatchedConfig):
    """Stage 2: the multi-task cold start."""

    network: DitConfig = DitConfig()
    """Size of a fresh transformer."""
    start: Path | None = None
    """Policy folder to fine-tune; None starts from a fresh transformer of size ``network``."""
    lora: LoraConfig | None = None
    """Adapter to train on top of ``start``; None trains all weights."""
    objective: SftConfig = SftConfig()
    """Loss."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes the transformer's blocks again instead of keeping their activations: less
    memory for one more forward pass, and the same gradients."""
    pictures_every: int = Field(0, ge=0)
    """Steps between pictures of one validation record of every task, sampled by the learner ranks with the schedule of
    ``evaluate``; 0 draws none."""

    @property
    def engine(self) -> EngineConfig:
        return super().engine.model_copy(update={"gradient_checkpointing": self.gradient_checkpointing})

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> "SftStageConfig":
        if self.lora and self.start is None:
            raise ValueError(
                "lora adapts a trained transformer: name its policy folder in sft.start, or leave lora out"
            )
        _check_lora(self.lora, self.precision)
        return self


class JudgeStageConfig(BatchedConfig):
    """A judge, trained by ``omnialpha judge train`` alone: no run needs to train its own."""

    objective: JudgeConfig = JudgeConfig()
    """The judge and what it is asked."""

    @model_validator(mode="after")
    def _precision_fits(self) -> "JudgeStageConfig":
        _check_base(self.objective.lora, self.precision)
        return self


class ContinuedConfig(StrictConfig):
    """Control: SFT goes on from where it ended for about as long as GRPO takes, so that a gain of GRPO can be told from
    one of more training. Data, tasks, batches, objective, averaging and adapter are those of ``sft``."""

    steps: int = Field(ge=1)
    """Optimiser steps; the evaluation reports the measured seconds of both stages."""
    lr: float = Field(gt=0)
    """Constant learning rate."""
    commit_every: int = Field(100, ge=1)
    """Steps between commits."""

    def stage(self, sft: SftStageConfig) -> SftStageConfig:
        """The SFT stage's settings with this length and learning rate."""
        optimiser = sft.optimiser.model_copy(update={"lr": self.lr, "warmup": 0, "decay": "constant"})
        changes = {"steps": self.steps, "commit_every": self.commit_every, "optimiser": optimiser}
        return sft.model_copy(update=changes)


class GrpoStageConfig(TrainingConfig):
    """Stage 3: GRPO on rewards of the decoded layers."""

    start: Path | None = None
    """Policy folder to train; None takes the SFT stage's."""
    lora: LoraConfig | None = None
    """Adapter to train; None trains all weights."""
    algorithm: Literal["grpo", "nft"] = "grpo"
    """``grpo``: policy gradient on recorded transitions; ``nft``: forward-process training on clean latents."""
    objective: GrpoConfig = GrpoConfig()
    """Loss of ``grpo``."""
    nft: NftConfig = NftConfig()
    """Loss of ``nft``."""
    supervised: SupervisedConfig | None = None
    """SFT's loss and stream of records beside the objective; null trains on rewards alone."""
    sampling: SamplingConfig = SamplingConfig()
    """Schedule and window of rollouts."""
    kernel: KernelConfig = KernelConfig()
    """Stochastic steps."""
    prompts: int = Field(8, ge=1)
    """Groups per step."""
    group: int = Field(8, ge=2)
    """Members per group (G)."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps per pass over a step's groups, each on its share of them."""
    epochs: int = Field(1, ge=1)
    """Passes over a step's groups."""
    resample: int = Field(0, ge=0)
    """Times that dropped groups of a step are replaced by groups of fresh prompts."""
    max_staleness: int = Field(0, ge=0)
    """Steps by which the policy that samples may lag behind the one that is trained; 0 takes turns, 2 keeps rollout,
    rewards and learner busy at once."""
    noise: GroupNoise = "independent"
    """Of a group's members: ``independent``; ``shared``: they start from one noise; ``mirrored``: pairs start from one
    noise, and the second of a pair takes the first's noise negated in the window. Then only what a pair's noises do to
    the rewards in opposite ways counts in the gradient, and not what both do, or where they started."""
    first_ratio_bound: float = Field(1e-6, ge=0)
    """Largest |ratio − 1| allowed while the learner still holds the weights that sampled the group."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay per optimiser step of the averaged weights that the stage hands on, as in Flow-GRPO's code; rollouts and
    the gaming watch take the newest weights. 0 switches averaging off."""
    gradient_checkpointing: bool = False
    """As in ``sft``."""
    pictures_every: int = Field(10, ge=1)
    """Steps between pictures of a group."""
    keep_rollouts: int = Field(0, ge=0)
    """Steps between stored rollouts, which ``omnialpha reward score`` scores again; 0 stores none."""
    max_empty_steps: int = Field(5, ge=1)
    """Consecutive steps without any trainable group after which the run stops."""
    watch: WatchConfig = WatchConfig()
    """Watch for a reward that is being gamed."""

    @model_validator(mode="after")
    def _algorithm_fits(self) -> "GrpoStageConfig":
        if self.algorithm == "grpo" and self.objective.guard and not self.kernel.gaussian:
            raise ValueError(
                "objective.guard needs Gaussian log-probabilities, which kernel cps does not publish; "
                "set kernel.density: gaussian, or take another kernel"
            )
        if self.algorithm == "nft" and self.nft.times > self.sampling.schedule.steps:
            raise ValueError(
                f"nft.times {self.nft.times} does not fit: the schedule has {self.sampling.schedule.steps} noise levels"
            )
        if self.noise == "mirrored" and self.group % 2:
            raise ValueError(f"noise: mirrored pairs a group's members, but group is {self.group}; take an even one")
        if self.noise == "mirrored" and self.algorithm == "nft":
            raise ValueError("noise: mirrored needs a window, which nft has not: the two of a pair would be equal")
        if self.supervised and self.start:
            raise ValueError(
                "supervised takes the latents of this run's own VAE stage, which a policy of grpo.start may not know; "
                "leave out one of them"
            )
        _check_lora(self.lora, self.precision)
        return self

    @property
    def engine(self) -> EngineConfig:
        return super().engine.model_copy(
            update={"ema": self.ema, "gradient_checkpointing": self.gradient_checkpointing}
        )

    @property
    def recording(self) -> Recording:
        """What rollouts carry for the objective."""
        return self.objective.recording if self.algorithm == "grpo" else self.nft.recording

    @property
    def credit(self) -> CreditConfig | None:
        """Local credit, where the algorithm knows it."""
        return self.objective.credit if self.algorithm == "grpo" else None

    @property
    def recompute(self) -> bool:
        """Whether the learner computes the old log-probabilities itself."""
        return self.algorithm == "grpo" and self.objective.old_log_probs == "recomputed"

    def program(self, start: Start, supervised: Supervised | None = None) -> Callable[[], GrpoProgram | NftProgram]:
        """Builds the objective's program from a starting policy, with a supervised loss beside it where given."""
        sigmas = self.sampling.schedule.sigmas()
        if self.algorithm == "nft":
            return functools.partial(NftProgram, start, self.nft, sigmas, supervised)
        return functools.partial(GrpoProgram, start, self.objective, self.kernel, sigmas, supervised)

    def doubts(self) -> list[str]:
        """Settings that are allowed and probably not meant."""
        stale = [
            "grpo.objective.old_log_probs=recomputed with grpo.max_staleness > 0: the ratio then does not see how far "
            "the policy has moved since it sampled, and nothing corrects for it"
        ]
        return [*(stale if self.recompute and self.max_staleness else []), *self._doubtful_clip_range()]

    def _doubtful_clip_range(self) -> list[str]:
        # Without staleness and with one update per batch every ratio is 1.
        if self.algorithm == "nft" or (self.minibatches * self.epochs == 1 and not self.max_staleness):
            return []
        scale = "GRPO-Guard" if self.objective.guard else "published CPS" if not self.kernel.gaussian else "Gaussian"
        scale = "local credit's" if self.credit else scale
        low, high = CLIP_RANGES[scale]
        if low <= self.objective.clip_range <= high:
            return []
        return [
            f"grpo.objective.clip_range {self.objective.clip_range:g} is outside {low:g} to {high:g}, the usual range "
            f"for {scale} ratios: was it tuned for another kernel? Choose it by the logged clip fraction"
        ]


CLIP_RANGES = {
    "Gaussian": (1e-5, 1e-2),
    "published CPS": (1e-6, 5e-4),
    "GRPO-Guard": (1e-6, 5e-4),
    "local credit's": (1e-4, 0.3),
}
"""Clip ranges beyond which a setting is doubtful, by the scale of the ratio; see docs/algorithms.md."""


def _check_vae_loss(loss: VaeLossConfig, zero_stage: int) -> None:
    if loss.adversarial and zero_stage == 3:
        raise ValueError("loss.adversarial needs the discriminator's weights whole: set zero_stage to 2 or less")


def _check_base(lora: LoraConfig | None, precision: Precision) -> None:
    if base_dtype(lora) == "bfloat16" and precision != "bfloat16":
        raise ValueError("lora.base_dtype bfloat16 is for products in bfloat16: set the stage's precision to bfloat16")


def _check_lora(lora: LoraConfig | None, precision: Precision) -> None:
    _check_base(lora, precision)
    if lora:
        try:
            check_targets(lora)
        except ConfigError as error:
            raise ValueError(str(error)) from None


class EvaluateConfig(StrictConfig):
    """Stage 4: comparison of SFT and GRPO on held-out records."""

    split: Literal["val", "test"] = "test"
    """Which split."""
    records: int = Field(60, ge=2)
    """Records per task, at most."""
    batch: int = Field(10, ge=1)
    """Records sampled together."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Noise levels of the deterministic sampler."""
    draws: int = Field(2000, ge=100)
    """Bootstrap draws of an interval."""
    rows: int = Field(4, ge=1)
    """Records per task in the pictures."""
    primary: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Task → metrics by which the run is to be judged, chosen before it; none that the task's reward trains on."""

    @model_validator(mode="after")
    def _primary_metrics_exist(self) -> "EvaluateConfig":
        for task, metrics in self.primary.items():
            try:
                get_task(task)
            except ConfigError as error:
                raise ValueError(f"primary: {error}") from None
            for name in metrics:
                if HIGHER_IS_BETTER.get(name) is None:
                    known = ", ".join(key for key, higher in HIGHER_IS_BETTER.items() if higher is not None)
                    raise ValueError(f"primary.{task}: {name!r} is not a metric with a direction; known: {known}")
                if not applies(name, task):
                    raise ValueError(f"primary.{task}: {name} needs a layer that the task does not have")
            if not metrics or len(set(metrics)) < len(metrics):
                raise ValueError(f"primary.{task}: name at least one metric, and each once")
        return self


class TrackingConfig(StrictConfig):
    """Where metrics go besides the event log."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """wandb mode; ``online`` takes its key from the environment."""
    project: str = "omnialpha"
    """wandb project."""
