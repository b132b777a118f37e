"""Which stages a command runs, with which actors, and what is skipped because it is done."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from actors.cluster import connected, placement
from actors.colocated import ColocatedGroup, ColocatedRollouts
from actors.isolation import ScorerPool, isolated_terms
from actors.judge import JudgePool
from actors.learner import LearnerGroup
from actors.packages import check_runtime_env
from actors.processes import roster
from actors.reward import RewardPool
from actors.rollout import RolloutPool, Rollouts, RolloutSetup
from actors.room import room
from actors.shared_storage import SharedStorage
from actors.waiting import PROCESS_ENDED
from common.errors import CheckpointError, ConfigError, Interrupted, LearnerError, LostValueError, StorageError
from common.role_logs import first_failure
from data.build import build_dataset
from data.manifest import MANIFEST, read_manifest
from data.records import RecordDataset, content_digest
from pipeline.config import RunConfig
from pipeline.evaluate import run_evaluate
from pipeline.grpo import run_grpo
from pipeline.plan import other_rows
from pipeline.report import report_finished
from pipeline.report_data import environment
from pipeline.run import Run
from pipeline.train import run_continued, run_judge, run_rgb, run_sft, run_vae, starting_point
from policy.dit import PATCH
from policy.folder import load_vae, policy_digest
from policy.vae import LatentCodec
from rewards.base import build, check_group_size, check_source, describe
from rewards.combine import RewardConfig
from rewards.judge.client import FixedEndpoints, JudgeClient
from rewards.judge.served import check_templates, served_terms, with_judge

log = logging.getLogger("omnialpha")


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """The stages of a whole run: not those before ``grpo.start``; ``rgb`` and ``continued`` where configured."""
    before = () if config.grpo.start else (*_rgb(config), "vae", "sft")
    return (*before, *_control(config), "grpo", "evaluate")


def needs(config: RunConfig, stage: str) -> tuple[str, ...]:
    """Stages whose results a stage starts from."""
    sft = () if config.grpo.start else ("sft",)
    compared = (*sft, *_control(config), "grpo")
    return {
        "rgb": (),
        "vae": _rgb(config),
        "sft": ("vae",),
        "judge": (),
        "continued": ("vae", "sft"),
        "grpo": sft,
        "evaluate": compared,
    }[stage]


def _rgb(config: RunConfig) -> tuple[str, ...]:
    return ("rgb",) if config.rgb else ()


def _control(config: RunConfig) -> tuple[str, ...]:
    return ("continued",) if config.control else ()


def run_stages(config: RunConfig, stages: Sequence[str]) -> None:
    """Runs ``stages`` in order on one cluster; a stage whose result is there is skipped."""
    run = Run(config)
    try:
        todo = [stage for stage in stages if not run.done(stage)]
        for stage in stages:
            if stage not in todo:
                log.info("%s: done, skipped", stage)
        if todo:
            run.events.write("environment", **environment())
            _prepare(run, todo)
            _run_on_cluster(run, todo)
        if "evaluate" in stages:
            report_finished(run.folder)
        log.info("run folder: %s", run.folder)
    except BaseException as error:
        with contextlib.suppress(StorageError):  # a full disk must not hide the error that brought us here
            run.events.write("run_failed", error=type(error).__name__, message=str(error))
        if cause := root_cause(run, error):
            error.add_note(cause)
        log.debug("the run ended with an error", exc_info=True)
        raise
    finally:
        run.close()


def root_cause(run: Run, error: BaseException) -> str | None:
    """The first exception of any actor since the last commit, unless ``error`` itself says it: what the driver stumbles
    over may be its consequence. None also where a process ended: what its peers say of that is no cause.
    """
    if isinstance(error, Interrupted) or PROCESS_ENDED in str(error):
        return None
    cause = first_failure(run.folder / "logs", run.committed_at)
    said = cause and cause.message and cause.message in str(error)
    return str(cause) if cause and not said else None


def _prepare(run: Run, todo: Sequence[str]) -> None:
    """Everything that can be found out without actors: earlier stages, scorers, data."""
    config = run.config
    if "continued" in todo and not config.control:
        why = "grpo.start leaves out the SFT stage" if config.continued else "continued is not set"
        raise ConfigError(
            f"this config does not continue SFT ({why}); set continued.steps and continued.lr, without grpo.start"
        )
    if "judge" in todo and not config.judge:
        raise ConfigError("this config trains no judge; take judge-small or judge-qwen2.5-vl-7b, or set judge.*")
    for stage in todo:
        for needed in needs(config, stage):
            if needed not in todo:
                run.require(needed, wanted_by=stage)
    for key, folder in (("vae", config.vae.start), ("sft", config.sft.start), ("grpo", config.grpo.start)):
        if folder and key in todo:
            if not (folder / "vae").is_dir():
                raise CheckpointError(f"{key}.start {folder}: no vae/ here; give the folder of a trained policy")
            side = LatentCodec.factor_of(load_vae(folder)) * PATCH
            if config.data.size % side:
                raise ConfigError(
                    f"data.size {config.data.size} must be a multiple of {side} (VAE factor times patch size) for "
                    f"{key}.start {folder}; choose another size"
                )
            if key != "vae" and not (folder / "transformer").is_dir():
                raise CheckpointError(
                    f"{key}.start {folder}: no transformer/ here; give the folder of a trained policy"
                )
            run.claim(f"{key}.start", folder, policy_digest(folder))
    starts = [folder for folder in (config.sft.start, config.vae.start) if folder and "sft" in todo]
    if len({policy_digest(folder, "vae") for folder in starts}) > 1:
        raise ConfigError(
            f"sft.start {config.sft.start} was trained on another VAE than that of vae.start {config.vae.start}; "
            "name the same folder in both"
        )
    for doubt in config.grpo.doubts() if "grpo" in todo else ():
        log.warning("%s", doubt)
    described, rewards = {}, config.rewards
    if judging := config.judging:
        if {"grpo", "evaluate"} & set(todo):
            judging.check()
        # Nobody serves yet: this one is never asked, and lets params and templates be read.
        rewards = with_judge(rewards, JudgeClient(FixedEndpoints(()), judging.client, Path(judging.model).name))
    for term in rewards.terms:
        if not term.own_process:
            scorer = build(term.source, term.params)
            if "grpo" in todo:
                check_group_size(term.name, scorer, config.grpo.group)
            if words := describe(scorer):
                described[term.name] = words
            continue
        # Not built here: its code runs in its own processes only. What a runtime_env brings is known only there.
        check_runtime_env(term)
        if term.runtime_env is None:
            check_source(term.source)
    if described:
        run.events.write("scorers", terms=described)
    for name, words in described.items():
        log.info("reward %s: %s", name, words)
    ensure_dataset(config)
    run.claim("dataset", config.dataset_folder, content_digest(config.dataset_folder))


class Actors:
    """The run's actors, each role started when a stage first needs it and kept for the next one."""

    def __init__(self, run: Run) -> None:
        self._run, self._config = run, run.config
        roster.open(run.folder / "logs")

    @cached_property
    def learner(self) -> LearnerGroup:
        cluster = self._config.cluster
        return ColocatedGroup(cluster) if cluster.colocated else LearnerGroup(cluster)

    @cached_property
    def judge(self) -> JudgePool | None:
        judging = self._config.judging
        return JudgePool(judging, self._run.folder / "judging") if judging else None

    @cached_property
    def terms(self) -> RewardConfig:
        """The reward terms, with the run's judge in those that ask it."""
        terms = self._config.rewards
        if not self.judge:
            return terms
        asker = self.judge.asker(self._config.cluster.deadline_s)
        check_templates(terms, asker)
        return with_judge(terms, asker)

    @cached_property
    def rewards(self) -> RewardPool:
        judging, terms = self._config.judging, self.terms
        strict = [term.name for term in served_terms(terms)] if judging and judging.missing == "fail" else []
        return RewardPool(self._config.cluster, terms, self._run.events.write, strict)

    @cached_property
    def rollouts(self) -> Rollouts:
        setup = rollout_setup(self._run)
        if isinstance(self.learner, ColocatedGroup):
            return ColocatedRollouts(self.learner, setup)
        return RolloutPool(self._config.cluster, setup, self._run.events.write)

    def try_scorers(self) -> None:
        """Starts the judge, which stays, and the isolated terms' processes, which are ended again: what is wrong with
        one must not be found out hours later, after the training before it."""
        if terms := isolated_terms(self.terms):
            ScorerPool(terms, self._config.cluster.deadline_s).close()

    def judged(self) -> dict[str, float]:
        """What the judge's servers count now; raises as :meth:`actors.judge.JudgePool.check`."""
        if not self.judge:
            return {}
        self.judge.check()
        return self.judge.metrics()

    def close(self) -> None:
        """Ends what outlives its last reference."""
        roster.open(None)
        with contextlib.ExitStack() as closing:
            for part in ("judge", "rewards"):  # the last one first
                if (started := self.__dict__.get(part)) is not None:  # otherwise nothing has started it
                    closing.callback(started.close)


def rollout_setup(run: Run) -> RolloutSetup:
    """What the run's rollout actors are made from."""
    config, grpo = run.config, run.config.grpo
    return RolloutSetup(
        starting_point(run, "grpo"),
        config.dataset_folder,
        config.seed,
        grpo.sampling,
        grpo.kernel,
        grpo.noise,
        grpo.recording,
        grpo.precision,
    )


def _run_on_cluster(run: Run, todo: Sequence[str]) -> None:
    cluster, others = run.config.cluster, other_rows(run.config)
    # Ray installs signal handlers of its own when it connects: ours go on top.
    with (
        connected(cluster, others, may_grow=True),
        run.signals(),
        room.kept([*placement(cluster), *others], cluster.wait_s),
        contextlib.closing(Actors(run)) as actors,
        contextlib.closing(SharedStorage(run.folder, run.config.dataset_folder)) as storage,
    ):
        room.wait(functools.partial(run.stop_here, todo[0]))
        storage.check(cluster.deadline_s)
        roster.storage = storage
        if todo[0] in ("vae", "sft") and {"grpo", "evaluate"} & set(todo):
            actors.try_scorers()
        for stage in todo:
            run.stop_here(stage)
            began = time.monotonic()
            run.events.write("stage_started", stage=stage)
            surviving(run, actors, functools.partial(run_stage, run, actors, stage))
            seconds = time.monotonic() - began
            run.events.write("stage_seconds", stage=stage, seconds=round(seconds, 1))
            log.info("%s: done in %.0f s", stage, seconds)


def run_stage(run: Run, actors: Actors, stage: str) -> None:
    """Runs one stage with the actors it needs."""
    match stage:
        case "rgb":
            run_rgb(run, actors.learner)
        case "vae":
            run_vae(run, actors.learner)
        case "sft":
            run_sft(run, actors.learner)
        case "judge":
            run_judge(run, actors.learner)
        case "continued":
            run_continued(run, actors.learner)
        case "grpo":
            run_grpo(run, actors.learner, actors.rollouts, actors.rewards, actors.judged)
        case "evaluate":
            run_evaluate(run, actors.rollouts, actors.rewards)


def surviving(run: Run, actors: Actors, stage: Callable[[], None]) -> None:
    """Runs a stage; where learner ranks are lost, builds new ones and runs it again: it goes on from its last commit.
    So it does where values were lost with a node that nobody can make again.

    Raises:
        LearnerError: they were lost more than ``cluster.replacements`` times without a commit in between.
        LostValueError: values were.
    """
    allowed, lost, commits = run.config.cluster.replacements, list[str](), run.commits
    ranks_lost_at: float | None = None
    while True:
        try:
            if ranks_lost_at is not None:  # new ranks may be lost as well, while they start
                actors.learner.rebuild()
                run.events.write("actor_replaced", role="learner", seconds=round(time.monotonic() - ranks_lost_at, 3))
                ranks_lost_at = None
            return stage()
        except (LearnerError, LostValueError) as error:
            if run.commits > commits:
                lost, commits = [], run.commits
            lost.append(str(error))
            if isinstance(error, LostValueError):
                run.events.write("values_lost", cause=str(error))
                if len(lost) > allowed:
                    raise
                log.warning("%s; the stage is run again from its last commit", error)
                continue
            run.events.write("actor_lost", role="learner", cause=str(error))
            if len(lost) > allowed:
                raise LearnerError(
                    f"learner ranks were lost {len(lost)} times without a commit in between, the first time because of "
                    f"{lost[0]}; mend that, then run the same command again to go on from the last commit"
                ) from None
            log.warning("learner ranks were lost (%s); all are started again from the last commit", error)
            ranks_lost_at = ranks_lost_at or time.monotonic()


def ensure_dataset(config: RunConfig) -> None:
    """Builds the run's dataset unless the config names one, and opens it, before any actor starts.

    Raises:
        ConfigError: the named dataset's images have another size than ``data.size``, which an exported policy records
            as the size that it was trained at.
        DataError: the dataset is missing or damaged; names the file.
    """
    if config.dataset is None:
        build_dataset(config.data, config.dataset_folder, progress=log.info)
    elif (config.dataset / MANIFEST).is_file():
        size = read_manifest(config.dataset).config.get("size", config.data.size)
        if size != config.data.size:
            raise ConfigError(
                f"dataset {config.dataset}: its images have a side of {size} pixels, data.size says "
                f"{config.data.size}; set data.size={size}, or name another dataset"
            )
    looked_at = ("val",) if config.grpo.watch.every or config.sft.pictures_every else ()
    for split in ("train", config.evaluate.split, *looked_at):
        RecordDataset(config.dataset_folder, split)
