"""The run folder: whose it is, what is done in it, and where its records go.

runs/<name>/  identity.json config.yaml events.jsonl log.txt
              logs/               one log per actor, stacks of actors that hung
              dataset/            unless config.dataset names another
              vae/ sft/ continued/ grpo/   step-…/ training commits, final/ what the stage hands on
              grpo/watch/         looks of the gaming watch
              judging/            what the judge's servers wrote
              evaluate/final/     results.json, records.parquet, table.md, grids
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from actors.metrics import RunMetrics
from common.commit import Commit, begin, commit, latest, retain, step_folder, storage_errors, verify, write_atomic
from common.errors import CheckpointError, ConfigError, Interrupted
from common.events import EventLog, read_events
from data.sampler import TaskSampler
from pipeline.config import RunConfig
from pipeline.tracking import Tracker

log = logging.getLogger("omnialpha")


class Run:
    """An opened run folder. One driver at a time."""

    def __init__(self, config: RunConfig) -> None:
        """
        Raises:
            ConfigError: the folder belongs to another configuration, or another driver is at work in it.
        """
        self.config, self.folder = config, config.folder
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
            (self.folder / "events.jsonl").open("a").close()
            (self.folder / "log.txt").open("a").close()
        if not self._locked():
            raise ConfigError(
                f"{self.folder}: another driver is at work here; wait for it, or give this run its own run_dir"
            )
        self._claim()
        past = read_events(self.folder / "events.jsonl")
        attempt = 1 + sum(event["event"] == "run_started" for event in past)
        self.events = EventLog(self.folder / "events.jsonl", attempt, RunMetrics(config.name).hear)
        self._log_file = logging.FileHandler(self.folder / "log.txt")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log_file)
        self.events.write("run_started", config=config.identity_hash(), pid=os.getpid())
        self.tracker = Tracker(config, self.folder)
        self.commits, self.committed_at = 0, time.time()
        self.samplers: dict[str, TaskSampler] = {}
        self._stop: int | None = None
        self._stop_at = 0.0

    def _locked(self) -> bool:
        for _ in range(3):
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.1)  # `omnialpha status` holds the lock for an instant to see whether anyone does
        return False

    def _claim(self) -> None:
        identity, path = self.config.identity(), self.folder / "identity.json"
        if path.exists():
            try:
                theirs = json.loads(path.read_text())
            except ValueError as error:
                raise CheckpointError(f"{path}: damaged ({error}); give this run another run_dir") from None
            if theirs != identity:
                keys = ", ".join(_differences(theirs, identity)[:6])
                raise ConfigError(
                    f"{self.folder}: this run folder belongs to another configuration (different: {keys}); "
                    "use its own settings to go on with it, or give this run another run_dir"
                )
        else:
            write_atomic(path, json.dumps(identity, indent=1, sort_keys=True) + "\n")
        write_atomic(self.folder / "config.yaml", yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))

    def claim(self, what: str, source: Path, digest: str) -> None:
        """Binds the run to the content of something outside its folder: its dataset, a policy it starts from.

        Raises:
            ConfigError: the run was begun on other content.
        """
        path = self.folder / f"{what}.digest"
        if path.exists() and path.read_text().strip() != digest:
            raise ConfigError(
                f"{source}: not the {what} this run began with (content digest {digest[:12]}…, the run's is "
                f"{path.read_text()[:12]}…); name the one it began with, or give this run another run_dir"
            )
        write_atomic(path, digest + "\n")

    def close(self) -> None:
        """Flushes and releases everything."""
        log.removeHandler(self._log_file)
        for thing in (self.tracker, self.events, self._log_file, self._lock):
            with contextlib.suppress(OSError):  # what a full disk refused was reported when it was written
                thing.close()

    def final(self, stage: str) -> Path:
        """Where ``stage`` leaves its result."""
        return self.folder / stage / "final"

    def done(self, stage: str) -> bool:
        """Whether a stage's result is there and intact."""
        try:
            verify(self.final(stage))
            return True
        except CheckpointError as error:
            if self.final(stage).exists():
                log.warning("%s; the stage will be run again from its last commit", error)
            return False

    def require(self, stage: str, wanted_by: str) -> Path:
        """The result of an earlier stage.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        try:
            return verify(self.final(stage)).path
        except CheckpointError as error:
            raise CheckpointError(
                f"stage '{wanted_by}' needs the result of '{stage}': {error}; run `omnialpha {stage}` with this config"
            ) from None

    def record(self, stage: str, step: int, steps: int, line: str, values: dict[str, Any], show: bool = True) -> None:
        """One step: an event, a wandb row and, where ``show``, a line on the terminal (the log has all of them)."""
        log.log(logging.INFO if show else logging.DEBUG, "%-4s %4d/%d  %s", stage, step, steps, line)
        self.events.write("step", stage=stage, step=step, **values)
        self.tracker.log(stage, step, values)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turns SIGTERM and the first Ctrl-C into a request that stages honour between steps."""

        def ask(number: int, _: FrameType | None) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop, self._stop_at = number, time.monotonic()
            # Not through logging, whose locks this very thread may hold.
            os.write(2, f"asked to stop ({signal.Signals(number).name}): finishing the step\n".encode())

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def stop_requested(self) -> bool:
        return self._stop is not None

    def stop_here(self, stage: str) -> None:
        """Ends the run if it was asked to stop, at a point where nothing needs saving.

        Raises:
            Interrupted: it was.
        """
        if self.stop_requested:
            raise Interrupted(f"stopped in stage '{stage}'; the same command goes on from the last commit")

    def grace_left(self) -> float:
        """Seconds until whoever asked to stop loses patience."""
        return self.config.stop_grace_s - (time.monotonic() - self._stop_at)


class Progress:
    """Commits and resumption of one training stage."""

    def __init__(self, run: Run, stage: str, steps: int, every: int) -> None:
        self._run, self._stage, self._steps, self._every = run, stage, steps, every
        self._root = run.folder / stage
        self._commit_seconds = 0.0
        self.committed = 0

    def resume(self, restore: Callable[[Path], None]) -> int:
        """Restores the newest commit that verifies; returns the step to go on with (0 when there is none).

        Raises:
            CheckpointError: the commit was made under another configuration.
        """
        found = latest(self._root, lambda reason: log.warning("skipped a damaged commit: %s", reason))
        retain(self._root, self._run.config.keep_commits, self._run.config.keep_every)
        self.committed = found.step if found else 0
        past = read_events(self._run.events.path)
        if found:
            if found.facts["config"] != self._run.config.identity_hash():
                raise CheckpointError(f"{found.path}: made under another configuration; give this run another run_dir")
            restore(found.path)
            log.info("%s: going on from the commit of step %d", self._stage, self.committed)
        if any(e.get("stage") == self._stage and e.get("step", 0) > self.committed for e in past):
            self._run.events.write("rollback", stage=self._stage, to_step=self.committed)
        return self.committed

    def after_step(self, step: int, save: Callable[[Path], None], facts: dict[str, Any] | None = None) -> None:
        """Commits where it is due, and stops here if the run was asked to.

        Raises:
            Interrupted: SIGTERM or Ctrl-C; the message says at which commit the next run goes on.
        """
        due = step % self._every == 0 or step == self._steps
        if due or (self._run.stop_requested and self._commit_seconds < self._run.grace_left()):
            start = time.monotonic()
            self._commit(step, save, facts or {})
            self._commit_seconds = time.monotonic() - start
        if self._run.stop_requested:
            raise Interrupted(
                f"stopped in stage '{self._stage}' after step {step}; "
                f"the same command goes on from step {self.committed}"
            )

    def _commit(self, step: int, save: Callable[[Path], None], facts: dict[str, Any]) -> Commit:
        folder = step_folder(self._root, step)
        temporary = begin(folder)
        with storage_errors(folder):
            save(temporary)
        self._run.events.sync()
        made = commit(temporary, folder, {"step": step, "config": self._run.config.identity_hash(), **facts})
        retain(self._root, self._run.config.keep_commits, self._run.config.keep_every)
        self.committed = step
        self._run.commits, self._run.committed_at = self._run.commits + 1, time.time()
        self._run.events.write("commit", stage=self._stage, step=step)
        return made

    def finish(self, write: Callable[[Path], None], facts: dict[str, Any] | None = None) -> Path:
        """Commits the stage's result. The last training commit stays, so that the stage could be prolonged."""
        final = self._run.final(self._stage)
        temporary = begin(final)
        with storage_errors(final):
            write(temporary)
        base = {"step": self._steps, "config": self._run.config.identity_hash()}
        commit(temporary, final, base | (facts or {}))
        retain(self._root, 1, self._run.config.keep_every)
        self._run.events.write("stage_done", stage=self._stage)
        return final


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [path for key in keys for path in _differences(a.get(key), b.get(key), f"{prefix}{key}.")]
    return [] if a == b else [prefix.rstrip(".")]
