"""The configuration of a run: composes the components' own config classes and adds each stage's length.

``load_config("demo", ["grpo.steps=20"])`` reads a shipped or own YAML file; everything that is not said there has the
default written beside its field.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

import configs
from actors.cluster import ClusterConfig
from actors.judge import JudgeServing
from common.config import StrictConfig, load_yaml, validate
from common.errors import ConfigError
from data.config import DataConfig
from pipeline.stage_config import (
    ContinuedConfig,
    EvaluateConfig,
    GrpoStageConfig,
    JudgeStageConfig,
    RgbStageConfig,
    SftStageConfig,
    TrackingConfig,
    VaeStageConfig,
)
from policy.folder import shipped_policies
from policy.vae_program import VaeLossConfig
from rewards.combine import RewardConfig, TermConfig, active_terms
from rewards.gaming import optimised, watched
from rewards.judge.served import served_terms
from rewards.judge.shipped import named_judge
from rewards.judge.templates import anchored


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
    judge: JudgeStageConfig | None = None
    """A judge to train, with ``omnialpha judge train`` only."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Stage 4."""
    rewards: RewardConfig
    """Reward terms and how they become advantages."""
    judging: JudgeServing | None = None
    """Who answers reward terms ``judge`` that have no model's folder of their own; None serves nothing."""
    cluster: ClusterConfig = ClusterConfig()
    """Placement."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""
    keep_commits: int = Field(2, ge=1)
    """Newest commits kept while a stage goes on, and 1 when it is done."""
    keep_every: int = Field(0, ge=0)
    """Also keeps every commit whose step is a multiple of this, for good; 0 keeps none for that reason."""
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

    @model_validator(mode="after")
    def _ranks_do_one_thing_at_a_time(self) -> "RunConfig":
        if self.cluster.colocated and self.grpo.max_staleness:
            raise ValueError(
                "cluster.colocated: ranks that sample cannot train meanwhile; set grpo.max_staleness to 0, or leave "
                "colocated out"
            )
        return self

    @model_validator(mode="after")
    def _the_judge_is_served_and_asked(self) -> "RunConfig":
        served = served_terms(self.rewards)
        if served and not self.judging:
            raise ValueError(
                f"rewards: term {served[0].name!r} has nobody to ask; say in judging who serves the judge, or give the "
                "term params.folder, a judge's model folder"
            )
        if self.judging and not served:
            raise ValueError(
                "judging: no reward term asks; add {name: judge, tasks: [text_to_rgba]} to rewards.terms, or leave "
                "judging out"
            )
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
        outside = ("name", "run_dir", "dataset", "cluster", "tracking", "keep_commits", "keep_every", "stop_grace_s")
        # Nor do recomputed activations: gradients are the same.
        cadence = {"commit_every", "pictures_every", "keep_rollouts", "gradient_checkpointing"}
        # A watch that only warns changes no result.
        grpo = cadence if self.grpo.watch.stop else cadence | {"watch"}
        grpo |= set() if self.grpo.max_staleness else {"max_staleness"}
        exclude: dict[str, Any] = {"data": {"workers"}, "rgb": cadence, "vae": cadence, "sft": cadence, "grpo": grpo}
        # What is not used is left out: runs that were begun before it existed can be resumed.
        exclude |= {"continued": cadence if self.control else True}
        exclude |= {"judge": cadence if self.judge else True}
        exclude |= {} if self.evaluate.primary else {"evaluate": {"primary"}}
        exclude |= {"judging": True}
        values = self.model_dump(mode="json", exclude=exclude | dict.fromkeys(outside, True))
        for term in values["rewards"]["terms"]:
            for key in ("isolated", "deadline_s", "resources"):  # where and how long, not what
                del term[key]
            for key in ("runtime_env", "optimises"):
                if term[key] is None:
                    del term[key]
        if self.judging:  # not where, or how fast
            values["judging"] = {"model": self.judging.model} | ({} if self.judging.compare else {"compare": False})
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
            "judge": config.judge and _anchored_judge(config.judge),
            "judging": config.judging and config.judging.anchored(),
        }
    )


def _anchored_loss(loss: VaeLossConfig) -> VaeLossConfig:
    return loss.model_copy(update={"weights": _absolute(loss.weights)})


def _anchored_judge(judge: JudgeStageConfig) -> JudgeStageConfig:
    asked = judge.objective
    update = {"model": _absolute(asked.model), "templates": anchored(asked.templates)}
    return judge.model_copy(update={"objective": asked.model_copy(update=update)})


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
        judge = term.source == "judge"
        absolute = {
            key: str((named_judge(value) if judge else Path(value).expanduser()).resolve())
            for key, value in named.items()
        }
        update["params"] = {**term.params, **absolute}
    if term.source == "judge" and isinstance(templates := term.params.get("templates"), str):
        update["params"] = {**update.get("params", term.params), "templates": anchored(templates)}
    return term.model_copy(update=update)


def _absolute_unless_uri(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).resolve())


def _absolute(path: Path | None) -> Path | None:
    return path.resolve() if path else None


def _policy(path: Path | None) -> Path | None:
    """A policy that comes with the package by its name, any other by its path."""
    return shipped_policies().get(str(path), _absolute(path)) if path else None
