"""The gaming watch of a GRPO run: looks at fixed validation records with the policy that whoever samples holds.

grpo/watch/  look-00000010.json          what a look measured; these files are the watch's whole state
             before/<task>.parquet       samples from before training, for pictures
             pictures/step-00010-….png   input | before | now | truth, where a look raised an alarm
             clean/step-00000010/model/  policies of looks without suspicion, with ``stop``

A look belongs to a training step. Those at steps after the stage's last commit are forgotten at resumption, together
with the steps, and made again: a killed run comes to the same verdicts.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from actors.learner import LearnerGroup
from actors.reward import RewardPool
from actors.rollout import Rollouts
from common.commit import begin, commit, step_folder, storage_errors, verify, write_atomic
from common.errors import CheckpointError
from common.events import finite
from pipeline.measure import HeldOut, measure, quantity
from pipeline.run import Run
from rewards.gaming import FRECHET, Change, Entry, Suspects, alarms, describe, judge, suspects, watched

log = logging.getLogger("omnialpha")


class Watch:
    """Looks, judges, warns, and with ``grpo.watch.stop`` ends the stage. It does nothing where ``every`` is 0."""

    def __init__(self, run: Run, learner: LearnerGroup, rollouts: Rollouts, rewards: RewardPool) -> None:
        """Made before the stage resumes, while the learner holds the policy that training starts from."""
        self._run, self._learner, self._rollouts, self._rewards = run, learner, rollouts, rewards
        self._config, self._steps = run.config.grpo.watch, run.config.grpo.steps
        self._root = run.folder / "grpo" / "watch"
        self._history: dict[int, Suspects] = {}
        """Step of every look after the one before training → what was suspicious."""
        self.stopped = False
        """Whether an alarm has ended the stage."""
        if not self._config.every:
            return
        tasks = [task for task, weight in run.config.grpo.tasks.items() if weight]
        self._held = HeldOut.choose(run.config, "val", tasks, self._config.records)
        self._outside = {task: watched(self._config, run.config.rewards, task) for task in self._held.tasks}
        ids = [record.id for record in self._held.records]
        # The watch can be switched on, or given other records, when the run is resumed.
        if not self._path(0).exists() or ids != [entry.record for entry in self._read(0)]:
            with storage_errors(self._root):
                shutil.rmtree(self._root, ignore_errors=True)
            self._look_before_training()

    def resume(self, committed: int) -> None:
        """Forgets looks after the stage's last commit and judges the others again."""
        for path in [*self._root.glob("look-*.json"), *self._clean.glob("step-*")]:
            if _step(path) > committed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for step in sorted(_step(path) for path in self._root.glob("look-*.json")):
            if self._config.every and step:
                self._judge(step, self._read(step))

    def until_stopped(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps, as long as no alarm has ended the stage."""
        for step in steps:
            if self.stopped:
                return
            yield step

    def after_step(self, step: int) -> None:
        """Looks where a look is due after ``step`` (from 1)."""
        if not self._config.due(step, self._steps):
            return
        entries, pixels = self._look(step)
        self._write(step, entries)
        changes, alarm = self._judge(step, entries)
        self._run.events.write("watch", stage="grpo", step=step, changes=[asdict(change) for change in changes])
        means = {f"watch/{c.quantity}/{c.task}": c.now for c in changes if math.isfinite(c.now)}
        self._run.tracker.log("grpo", step, means)
        if alarm:
            self._warn(step, changes, alarm, pixels)
        elif not self._history[step]:
            log.info("gaming watch, step %d: nothing suspicious", step)
            if self._config.stop:
                self._keep_policy(step)
        else:
            log.info("gaming watch, step %d: suspicious, not yet an alarm: %s", step, sorted(self._history[step]))

    def hand_on(self, folder: Path) -> None:
        """Writes the stage's result: the learner's policy, or after an alarm the last one without suspicion."""
        if not self.stopped:
            self._learner.export(folder / "model")
            return
        step = self._last_clean()
        shutil.copytree(verify(step_folder(self._clean, step)).path / "model", folder / "model")
        log.warning("grpo: stopped by the gaming watch; the stage hands on the policy of step %d", step)
        self._run.events.write("stopped_early", stage="grpo", step=max(self._history), handed_on=step)

    def result(self) -> dict[str, Any]:
        """Facts about the policy that the stage hands on."""
        step = self._last_clean() if self.stopped else self._steps
        return {"step": step, "version": step}

    def _look_before_training(self) -> None:
        self._rollouts.publish(0, *self._learner.publish())
        entries, pixels = self._look(0)
        kept = [self._rewards.keep(self._before(t), pixels[self._held.first(t)]) for t in self._held.tasks]
        self._rewards.wait(kept, "samples from before training to be stored")
        if self._config.stop:
            self._keep_policy(0)
        self._write(0, entries)  # last: this file says that the others are there

    def _look(self, step: int) -> tuple[list[Entry], list[Any]]:
        """Measurements, and each chunk's pixels by reference."""
        config = self._run.config
        what, features = f"gaming watch, step {step}", any(FRECHET in names for names in self._outside.values())
        measured, pixels = measure(config, self._rollouts, self._rewards, self._held, what, features)
        entries = [
            Entry(
                record=record.id,
                task=record.task,
                photo=record.photo_group or None,
                object=record.object_groups[0],
                reward=quantity(config, found, "reward"),
                metrics=found.metrics,
                features=found.features,
                truth=found.truth,
            )
            for record, found in zip(self._held.records, measured, strict=True)
        ]
        return entries, pixels

    def _judge(self, step: int, entries: Sequence[Entry]) -> tuple[list[Change], Suspects]:
        """What changed since before training, and what the alarm is about, if there is one."""
        looks = self._config.looks(self._steps)
        changes = judge(self._config, self._outside, looks, self._read(0), entries, self._run.config.seed)
        self._history[step] = suspects(changes)
        alarm = alarms(list(self._history.values()), self._config.patience)
        self.stopped = self._config.stop and bool(alarm)
        return changes, alarm

    def _warn(self, step: int, changes: Sequence[Change], alarm: Suspects, pixels: Sequence[Any]) -> None:
        paths = {
            task: self._root / "pictures" / f"step-{step:05d}-{task}.png" for task in sorted({t for t, _ in alarm})
        }
        rows = self._run.config.evaluate.rows
        drawn = [
            self._rewards.draw_change(path, rows, self._before(task), pixels[self._held.first(task)])
            for task, path in paths.items()
        ]
        self._rewards.wait(drawn, "pictures of the gaming watch")
        message = f"GAMING WATCH, step {step}: {describe(changes, alarm)}"
        shown = [str(path.relative_to(self._run.folder)) for path in paths.values()]
        self._run.events.write("gaming", stage="grpo", step=step, message=message, pictures=shown)
        log.warning("%s; input | before | now | truth: %s", message, ", ".join(map(str, paths.values())))
        for task, path in paths.items():
            self._run.tracker.picture(f"grpo/gaming/{task}", path)

    def _keep_policy(self, step: int) -> None:
        """Keeps the policy of a look without suspicion, and of earlier ones what a resumed run may still hand on."""
        folder = step_folder(self._clean, step)
        temporary = begin(folder)
        self._learner.export(temporary / "model")
        commit(temporary, folder, {"step": step, "config": self._run.config.identity_hash()})
        commits = [_step(path) for path in self._root.parent.glob("step-*")]
        kept = {_step(path): path for path in self._clean.glob("step-*")}
        needed = max((k for k in kept if k <= min(commits, default=0)), default=0)
        for k in kept:
            if k < needed:
                shutil.rmtree(kept[k])

    def _last_clean(self) -> int:
        return max((step for step, found in self._history.items() if not found), default=0)

    def _write(self, step: int, entries: Sequence[Entry]) -> None:
        content = finite({"step": step, "entries": [asdict(entry) for entry in entries]})
        write_atomic(self._path(step), json.dumps(content) + "\n")

    def _read(self, step: int) -> list[Entry]:
        """
        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._path(step)
        try:
            entries = [Entry(**entry) for entry in json.loads(path.read_text())["entries"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error!r}); remove {self._root} to have the watch begin anew"
            ) from None
        return [replace(e, reward=math.nan if e.reward is None else e.reward) for e in entries]

    @property
    def _clean(self) -> Path:
        return self._root / "clean"

    def _before(self, task: str) -> Path:
        return self._root / "before" / f"{task}.parquet"

    def _path(self, step: int) -> Path:
        return self._root / f"look-{step:08d}.json"


def _step(path: Path) -> int:
    """The step in the name of a look's file or of a kept policy's folder."""
    return int(path.stem.rpartition("-")[2])
