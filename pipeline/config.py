"""The configuration of a run: composes the components' own config classes and adds each stage's length.

``load_config("demo", ["grpo.steps=20"])`` reads a shipped or own YAML file; everything that is not said there has the
default written beside its field.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

import configs
from actors.cluster import ClusterConfig
from actors.engine import OptimiserConfig
from common.config import StrictConfig, load_yaml, validate
from common.errors import ConfigError
from data.config import DataConfig
from data.tasks import get_task
from policy.adapters import LoraConfig, check_targets
from policy.dit import DitConfig
from policy.folder import shipped_policies
from policy.group import Recording
from policy.kernels import KernelConfig
from policy.precision import Precision
from policy.programs import SftConfig
from policy.rl import GrpoConfig, GrpoProgram, NftConfig, NftProgram, Start
from policy.schedule import SamplingConfig, ScheduleConfig
from policy.vae import VaeConfig
from policy.vae_program import VaeLossConfig
from rewards.combine import RewardConfig, TermConfig, active_terms
from rewards.gaming import WatchConfig, applies, optimised, watched
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
    """Policy folder whose VAE is taken as it is; the stage then only encodes the training split."""
    loss: VaeLossConfig = VaeLossConfig()
    """Loss weights."""

    @model_validator(mode="after")
    def _loss_fits(self) -> "VaeStageConfig":
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

    @model_validator(mode="after")
    def _lora_has_a_base(self) -> "SftStageConfig":
        if self.lora and self.start is None:
            raise ValueError(
                "lora adapts a trained transformer: name its policy folder in sft.start, or leave lora out"
            )
        _check_lora(self.lora)
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
    share_noise: bool = False
    """Whether the members of a group start from the same noise."""
    first_ratio_bound: float = Field(1e-6, ge=0)
    """Largest |ratio − 1| allowed while the learner still holds the weights that sampled the group."""
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
        _check_lora(self.lora)
        return self

    @property
    def recording(self) -> Recording:
        """What rollouts carry for the objective."""
        return self.objective.recording if self.algorithm == "grpo" else self.nft.recording

    @property
    def recompute(self) -> bool:
        """Whether the learner computes the old log-probabilities itself."""
        return self.algorithm == "grpo" and self.objective.old_log_probs == "recomputed"

    def program(self, start: Start) -> Callable[[], GrpoProgram | NftProgram]:
        """Builds the objective's program from a starting policy."""
        sigmas = self.sampling.schedule.sigmas()
        if self.algorithm == "nft":
            return functools.partial(NftProgram, start, self.nft, sigmas)
        return functools.partial(GrpoProgram, start, self.objective, self.kernel, sigmas)

    def doubts(self) -> list[str]:
        """Settings that are allowed and probably not meant."""
        if self.algorithm == "nft" or self.minibatches * self.epochs == 1:
            return []
        scale = "GRPO-Guard" if self.objective.guard else "published CPS" if not self.kernel.gaussian else "Gaussian"
        low, high = CLIP_RANGES[scale]
        if low <= self.objective.clip_range <= high:
            return []
        return [
            f"grpo.objective.clip_range {self.objective.clip_range:g} is outside {low:g} to {high:g}, the usual range "
            f"for {scale} ratios: was it tuned for another kernel? Choose it by the logged clip fraction"
        ]


CLIP_RANGES = {"Gaussian": (1e-5, 1e-2), "published CPS": (1e-6, 5e-4), "GRPO-Guard": (1e-6, 5e-4)}
"""Clip ranges beyond which a setting is doubtful, by the scale of the ratio; see docs/algorithms.md."""


def _check_vae_loss(loss: VaeLossConfig, zero_stage: int) -> None:
    if loss.adversarial and zero_stage == 3:
        raise ValueError("loss.adversarial needs the discriminator's weights whole: set zero_stage to 2 or less")


def _check_lora(lora: LoraConfig | None) -> None:
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


class RunConfig(StrictConfig):
    """One run: data, stages, cluster."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the run and of its folder."""
    seed: int = Field(0, ge=0)
    """All randomness follows from it."""
    run_dir: Path | None = None
    """Folder of the run; None is ``runs/<name>`` under the working directory."""
    dataset: Path | None = None
    """A dataset built earlier; None builds one from ``data`` inside the run folder."""
    data: DataConfig = DataConfig()
    """The dataset to build."""
    rgb: RgbStageConfig | None = None
    """Stage 0; None starts stage 1 from a fresh network."""
    vae: VaeStageConfig
    """Stage 1."""
    sft: SftStageConfig
    """Stage 2."""
    continued: ContinuedConfig | None = None
    """Control beside stage 3; None leaves it out, and so does ``grpo.start``, with which there is no stage 2."""
    grpo: GrpoStageConfig
    """Stage 3."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Stage 4."""
    rewards: RewardConfig
    """Reward terms and how they become advantages."""
    cluster: ClusterConfig = ClusterConfig()
    """Placement."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""
    keep_commits: int = Field(2, ge=1)
    """Commits kept per stage."""
    stop_grace_s: float = Field(3.0, gt=0)
    """Time between SIGTERM and SIGKILL where the run lives; a final commit is made only if it fits."""

    @model_validator(mode="after")
    def _starts_fit(self) -> "RunConfig":
        if self.rgb and self.vae.start:
            raise ValueError("rgb trains what vae.start would replace; leave one of them out")
        if self.sft.start and not self.vae.start:
            raise ValueError(
                "sft.start needs vae.start: its transformer knows the latents of the VAE in its own folder, not those "
                "of one that this run would train; name the same folder in both"
            )
        if self.sft.lora and self.grpo.lora and not self.grpo.start and self.sft.lora != self.grpo.lora:
            raise ValueError(
                "grpo.lora differs from sft.lora, whose adapter it would train on; make them equal, or leave grpo.lora "
                "out to merge it and train all weights"
            )
        return self

    @model_validator(mode="after")
    def _metrics_are_outside_the_reward(self) -> "RunConfig":
        for task, metrics in self.evaluate.primary.items():
            for name in metrics:
                if term := optimised(self.rewards, task).get(name):
                    raise ValueError(
                        f"evaluate.primary.{task}: {name} is what the reward term {term!r} trains on; judge the run "
                        "by metrics outside its reward"
                    )
        watch, tasks = self.grpo.watch, [task for task, weight in self.grpo.tasks.items() if weight]
        if watch.every and not any(watched(watch, self.rewards, task) for task in tasks):
            raise ValueError(
                f"grpo.watch.metrics: of {', '.join(watch.metrics)} none is left to watch, since the rewards train on "
                "them or no task has them; name others, or switch the watch off with grpo.watch.every=0"
            )
        return self

    @model_validator(mode="after")
    def _rewards_cover_tasks(self) -> "RunConfig":
        for task, weight in self.grpo.tasks.items():
            if weight and not any(self.rewards.terms[k].weight for k in active_terms(self.rewards, task)):
                named = ", ".join(term.name for term in self.rewards.terms)
                raise ValueError(f"grpo.tasks.{task}: none of the configured rewards ({named}) judges it with a weight")
        side = 2 ** (len(self.vae.network.channels) - 1) * 2
        if not self.vae.start and self.data.size % side:
            raise ValueError(f"data.size {self.data.size} must be a multiple of {side} (VAE factor times patch size)")
        if any(channel % self.vae.network.norm_groups for channel in self.vae.network.channels):
            raise ValueError("vae.network.norm_groups must divide every entry of vae.network.channels")
        return self

    @property
    def folder(self) -> Path:
        """Run folder; absolute once :func:`load_config` has filled it in."""
        return self.run_dir or Path("runs") / self.name

    @property
    def control(self) -> ContinuedConfig | None:
        """The control stage of a whole run, where it has one."""
        return None if self.grpo.start else self.continued

    @property
    def dataset_folder(self) -> Path:
        """Dataset folder."""
        return self.dataset or self.folder / "dataset"

    def identity(self) -> dict[str, Any]:
        """What a run folder belongs to: all that changes its results, so not placement, tracking, paths or cadence."""
        outside = ("name", "run_dir", "dataset", "cluster", "tracking", "keep_commits", "stop_grace_s")
        cadence = {"commit_every", "pictures_every", "keep_rollouts"}
        # A watch that only warns changes no result.
        grpo = cadence if self.grpo.watch.stop else cadence | {"watch"}
        exclude: dict[str, Any] = {"data": {"workers"}, "rgb": cadence, "vae": cadence, "sft": cadence, "grpo": grpo}
        # What is not used is left out: runs that were begun before it existed can be resumed.
        exclude |= {"continued": cadence if self.control else True}
        exclude |= {} if self.evaluate.primary else {"evaluate": {"primary"}}
        values = self.model_dump(mode="json", exclude=exclude | dict.fromkeys(outside, True))
        for term in values["rewards"]["terms"]:
            for key in ("isolated", "deadline_s", "resources"):  # where and how long, not what
                del term[key]
            if term["runtime_env"] is None:
                del term["runtime_env"]
        return values

    def identity_hash(self) -> str:
        """Short hash of :meth:`identity`, recorded in every commit."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def shipped_configs() -> dict[str, Path]:
    """Configs that come with the package, by name."""
    return {path.stem: path for folder in configs.__path__ for path in sorted(Path(folder).rglob("*.yaml"))}


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a shipped config by name, or a YAML file by path.

    Raises:
        ConfigError: no such config, or anything in it that does not fit.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        shipped = shipped_configs()
        if name not in shipped:
            raise ConfigError(f"no config {name!r}; shipped ones: {', '.join(shipped)}; or give a path to a .yaml file")
        path = shipped[name]
    config = validate(RunConfig, load_yaml(path, overrides, shipped_configs()), str(path))
    return _anchored(config)


def _anchored(config: RunConfig) -> RunConfig:
    """Makes every path absolute now: actors and later code run in other working directories."""
    return config.model_copy(
        update={
            "run_dir": config.folder.resolve(),
            "dataset": _absolute(config.dataset),
            "rgb": config.rgb and config.rgb.model_copy(update={"loss": _anchored_loss(config.rgb.loss)}),
            "vae": config.vae.model_copy(
                update={"start": _policy(config.vae.start), "loss": _anchored_loss(config.vae.loss)}
            ),
            "sft": config.sft.model_copy(update={"start": _policy(config.sft.start)}),
            "grpo": config.grpo.model_copy(update={"start": _policy(config.grpo.start)}),
            "rewards": config.rewards.model_copy(update={"terms": tuple(map(_anchored_term, config.rewards.terms))}),
        }
    )


def _anchored_loss(loss: VaeLossConfig) -> VaeLossConfig:
    return loss.model_copy(update={"weights": _absolute(loss.weights)})


def _anchored_term(term: TermConfig) -> TermConfig:
    update: dict[str, Any] = {}
    file, _, attribute = term.source.rpartition(":")
    env = term.runtime_env
    # With a working_dir of its own a relative file is one in there, on whichever node.
    if file.endswith(".py") and attribute and not (env and env.working_dir):
        update["scorer"] = f"{Path(file).resolve()}:{attribute}"
    if env:
        paths = {
            "working_dir": _absolute_unless_uri(env.working_dir),
            "py_modules": env.py_modules and tuple(str(_absolute_unless_uri(path)) for path in env.py_modules),
        }
        files = {name: value for name in ("pip", "uv", "conda") if isinstance(value := getattr(env, name), str)}
        paths |= {name: str(Path(value).resolve()) for name, value in files.items() if Path(value).is_file()}
        update["runtime_env"] = env.model_copy(update=paths)
    # By these names the shipped scorers take files; what another scorer's params mean is its own business.
    named = {key: value for key in ("weights", "folder") if isinstance(value := term.params.get(key), str)}
    if named:
        absolute = {key: str(Path(value).expanduser().resolve()) for key, value in named.items()}
        update["params"] = {**term.params, **absolute}
    return term.model_copy(update=update)


def _absolute_unless_uri(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).resolve())


def _absolute(path: Path | None) -> Path | None:
    return path.resolve() if path else None


def _policy(path: Path | None) -> Path | None:
    """A policy that comes with the package by its name, any other by its path."""
    return shipped_policies().get(str(path), _absolute(path)) if path else None
