"""Which stages a command runs, with which actors, and what is skipped because it is done."""

import logging
import time
from collections.abc import Sequence

from actors.cluster import connected
from actors.learner import LearnerGroup
from actors.reward import RewardPool
from data.build import build_dataset
from pipeline.config import RunConfig
from pipeline.evaluate import run_evaluate
from pipeline.grpo import run_grpo
from pipeline.run import Run
from pipeline.train import run_sft, run_vae

log = logging.getLogger("omnialpha")

STAGES = ("vae", "sft", "grpo", "evaluate")


def run_stages(config: RunConfig, stages: Sequence[str]) -> None:
    """Runs ``stages`` in order on one cluster; a stage whose result is there is skipped."""
    run = Run(config)
    try:
        with run.signals():
            todo = [stage for stage in stages if not run.done(stage)]
            for stage in stages:
                if stage not in todo:
                    log.info("%s: done, skipped", stage)
            if todo:
                ensure_dataset(config)
                _run_on_cluster(run, todo)
        log.info("run folder: %s", run.folder)
    except BaseException as error:
        run.events.write("run_failed", error=type(error).__name__, message=str(error))
        log.debug("the run ended with an error", exc_info=True)
        raise
    finally:
        run.close()


def _run_on_cluster(run: Run, todo: Sequence[str]) -> None:
    config = run.config
    with connected(config.cluster):
        learner = LearnerGroup(config.cluster) if {"vae", "sft", "grpo"} & set(todo) else None
        rewards = RewardPool(config.cluster, config.rewards) if {"grpo", "evaluate"} & set(todo) else None
        for stage in todo:
            began = time.monotonic()
            run.events.write("stage_started", stage=stage)
            match stage:
                case "vae":
                    assert learner is not None
                    run_vae(run, learner)
                case "sft":
                    assert learner is not None
                    run_sft(run, learner)
                case "grpo":
                    assert learner is not None
                    assert rewards is not None
                    run_grpo(run, learner, rewards)
                case "evaluate":
                    assert rewards is not None
                    run_evaluate(run, rewards)
            seconds = time.monotonic() - began
            run.events.write("stage_seconds", stage=stage, seconds=round(seconds, 1))
            log.info("%s: done in %.0f s", stage, seconds)


def ensure_dataset(config: RunConfig) -> None:
    """Builds the run's dataset unless the config names one that exists."""
    if config.dataset is None:
        build_dataset(config.data, config.dataset_folder, progress=log.info)
