"""The supervised stages, VAE, SFT and SFT continued: the same loop over stored records with another program."""

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from actors.learner import Item, LearnerGroup
from data.records import RecordDataset
from data.sampler import TaskSampler
from data.seeding import seed_for
from data.tasks import get_task
from pipeline.run import Progress, Run
from pipeline.stage_config import BatchedConfig
from policy.folder import load_vae, save_vae
from policy.programs import Batch, SftProgram, make_sft_program
from policy.rl import Start, Supervised
from policy.vae import set_latent_statistics
from policy.vae_program import make_rgb_program, make_started_program, make_vae_program
from rewards.judge.training import make_judge_program

log = logging.getLogger("omnialpha")

SHOW_EVERY_S = 2.0
"""Steps of these stages take fractions of a second; the terminal shows some of them, the log all."""


def run_rgb(run: Run, learner: LearnerGroup) -> None:
    """Trains the RGB VAE that :func:`run_vae` converts."""
    config, stage = run.config, run.config.rgb
    assert stage is not None
    make = functools.partial(make_rgb_program, config.vae.network, stage.loss, config.dataset_folder, config.seed)
    progress = _train(run, "rgb", stage, learner, make)
    progress.finish(lambda folder: learner.export(folder / "model"))


def run_vae(run: Run, learner: LearnerGroup) -> None:
    """Trains the VAE, measures its latents and encodes the training split."""
    config, dataset = run.config, run.config.dataset_folder
    start, part = config.vae.start, config.vae.train
    if start and part != "nothing":
        make = functools.partial(make_started_program, config.vae.loss, dataset, config.seed, start, part)
        progress = _train(run, "vae", config.vae, learner, make)
    elif start:
        progress = Progress(run, "vae", 0, 1)
    else:
        rgb = run.require("rgb", wanted_by="vae") / "model" if config.rgb else None
        make = functools.partial(make_vae_program, config.vae.network, config.vae.loss, dataset, config.seed, rgb)
        progress = _train(run, "vae", config.vae, learner, make)

    def write(folder: Path) -> None:
        if start and part == "nothing":
            save_vae(folder / "model", load_vae(start))
        else:
            learner.export(folder / "model")
        (folder / "latents").mkdir()
        log.info("vae: encoding the training split")
        mean_C, std_C = learner.encode_split(folder / "model", dataset, folder / "latents")
        vae = load_vae(folder / "model")
        if not start or vae.config.latents_mean is None:  # what was trained on a VAE's statistics keeps them
            set_latent_statistics(vae, mean_C, std_C)
            save_vae(folder / "model", vae)

    progress.finish(write)


def run_sft(run: Run, learner: LearnerGroup) -> None:
    """Trains the transformer on all tasks from cached latents."""
    config = run.config
    vae_stage = run.require("vae", wanted_by="sft")
    dataset = config.dataset_folder
    sft = config.sft
    make = functools.partial(
        make_sft_program, sft.network, sft.start, sft.lora, sft.objective, vae_stage, dataset, config.seed
    )
    progress = _train(run, "sft", config.sft, learner, make, show=pictures(run, "sft", learner))
    progress.finish(lambda folder: learner.export(folder / "model"))


def run_continued(run: Run, learner: LearnerGroup) -> None:
    """Trains the SFT stage's policy on, with SFT's data and loss: what GRPO has to be better than."""
    config, sft, control = run.config, run.config.sft, run.config.control
    assert control is not None
    vae_stage = run.require("vae", wanted_by="continued")
    start = run.require("sft", wanted_by="continued") / "model"
    make = functools.partial(
        make_sft_program, sft.network, start, sft.lora, sft.objective, vae_stage, config.dataset_folder, config.seed
    )
    # It goes on in SFT's stream: records and noise that SFT has not had.
    position = sft.steps * sft.micro_batches
    show = pictures(run, "continued", learner)
    progress = _train(run, "continued", control.stage(sft), learner, make, "sft", position, show)
    progress.finish(lambda folder: learner.export(folder / "model"))


def run_judge(run: Run, learner: LearnerGroup) -> None:
    """Trains a judge on graded degradations of the training split."""
    config, stage = run.config, run.config.judge
    assert stage is not None
    make = functools.partial(make_judge_program, stage.objective, config.dataset_folder, config.seed)
    progress = _train(run, "judge", stage, learner, make)
    facts = {"seed": config.seed, "templates": stage.objective.templates}
    progress.finish(lambda folder: learner.export(folder / "model"), facts)


def _train(
    run: Run,
    stage: str,
    config: BatchedConfig,
    learner: LearnerGroup,
    make: functools.partial,
    stream: str | None = None,
    first: int = 0,
    show: Callable[[int], None] = lambda _: None,
) -> Progress:
    """Trains on a stream of records, the stage's own or ``stream``, from position ``first`` on; calls ``show`` with the
    number of steps done after each."""
    sampler = task_sampler(run, stream or stage, config.tasks)
    size = learner.setup(make, config.optimiser, config.engine, config.steps)
    progress = Progress(run, stage, config.steps, config.commit_every)
    start = progress.resume(learner.restore)
    log.info("%s: %.2f M parameters, %d steps of %d records", stage, size / 1e6, config.steps, _records(config))
    began, shown = time.monotonic(), 0.0
    for step in range(start, config.steps):
        record = learner.train(step, step_items(sampler, config, first + step * config.micro_batches))
        done, now = step + 1, time.monotonic()
        per_step = (now - began) / (done - start)
        line = (
            f"loss {record['loss']:.4f}  grad {record['max_grad_norm']:.2f}  lr {record['lr']:.1e}  "
            f"{per_step:.2f} s/step  {(config.steps - done) * per_step / 60:.1f} min left"
        )
        said = now - shown >= SHOW_EVERY_S or done == config.steps
        shown = now if said else shown
        run.record(stage, done, config.steps, line, record, said)
        show(done)
        progress.after_step(done, learner.save, {"position": first + done * config.micro_batches})
    return progress


def step_items(sampler: TaskSampler, config: BatchedConfig, position: int) -> list[Item]:
    """The micro-batches of an optimiser step that begins at ``position`` of the stream."""
    items = []
    for place in range(position, position + config.micro_batches):
        draw = sampler.draw(place, config.micro_batch)
        cost = get_task(draw.task).images * math.prod(draw.shape or ())
        items.append(Item(Batch(place, draw), config.micro_batch, cost, name=draw.task))
    return items


def pictures(run: Run, stage: str, learner: LearnerGroup) -> Callable[[int], None]:
    """Draws the first validation record of every task that SFT trains, at the steps where that is due."""
    sft, schedule = run.config.sft, run.config.evaluate.schedule
    if not sft.pictures_every:
        return lambda _: None
    data = RecordDataset(run.config.dataset_folder, "val")
    indices = [int(data.positions(task)[0]) for task in data.tasks if sft.tasks.get(task)]

    def show(done: int) -> None:
        if done % sft.pictures_every == 0:
            path = run.folder / stage / "pictures" / f"step-{done:05d}.png"
            learner.draw(path, indices, schedule)
            run.tracker.picture(f"{stage}/validation", path)

    return show


def task_sampler(run: Run, stage: str, tasks: dict[str, float]) -> TaskSampler:
    """The stage's own stream of training records, opened once in a run: that reads the split's index."""
    if stage not in run.samplers:
        data, seed = RecordDataset(run.config.dataset_folder, "train"), seed_for(run.config.seed, "stream", stage)
        run.samplers[stage] = TaskSampler(data.task_positions, tasks, seed, data.sizes)
    return run.samplers[stage]


def starting_point(run: Run, wanted_by: str) -> Start:
    """The policy that GRPO starts from and is compared with: the one the config names, or the SFT stage's."""
    grpo = run.config.grpo
    policy = grpo.start or run.require("sft", wanted_by=wanted_by) / "model"
    return Start(policy, grpo.lora, seed_for(run.config.seed, "adapter"))


def supervised_program(run: Run, start: Start) -> Supervised | None:
    """What GRPO's learner ranks make the supervised loss from; None where none is configured.

    Raises:
        CheckpointError: the VAE stage, whose latents it trains on, is not done.
    """
    config = run.config
    if not config.grpo.supervised:
        return None
    latents = run.require("vae", wanted_by="grpo.supervised")
    return functools.partial(
        SftProgram,
        config=config.sft.objective,
        vae_stage=latents,
        dataset=config.dataset_folder,
        seed=config.seed,
        lora=config.grpo.lora,
        start=start.policy,
    )


def supervised_items(run: Run, update: int, groups: Sequence[Item]) -> list[Item]:
    """Records for the supervised loss of GRPO's optimiser step ``update`` (from 0) on ``groups``. They go on in SFT's
    stream: records and noise that SFT has not had."""
    config, sft, members = run.config.grpo.supervised, run.config.sft, run.config.grpo.group
    if not config:
        return []
    beside = sft.model_copy(update={"micro_batches": config.micro_batches})
    position = sft.steps * sft.micro_batches + update * config.micro_batches
    share = config.weight * sum(group.count for group in groups) / _records(beside)
    # A call on records costs about what one on as many members of a group does.
    cost = sum(group.cost for group in groups) / sum(group.calls for group in groups) * sft.micro_batch / members
    items = step_items(task_sampler(run, "sft", sft.tasks), beside, position)
    return [replace(item, count=0, extra=share, cost=cost, name=f"supervised {item.name}") for item in items]


def _records(config: BatchedConfig) -> int:
    return config.micro_batch * config.micro_batches
