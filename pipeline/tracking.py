"""wandb, offline by default: metrics of every step and pictures. Secrets come from the environment only."""

import logging
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from pipeline.config import RunConfig

log = logging.getLogger("omnialpha")


class Tracker:
    """A wandb run, started on first use so that commands which log nothing leave nothing behind."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._run: Any = None

    def log(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """Adds one step's metrics under ``stage/``."""
        if run := self._started():
            numbers = {f"{stage}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
            run.log(numbers | {f"{stage}/step": step})

    def picture(self, name: str, path: Path) -> None:
        """Adds a PNG that is already on disk."""
        if (run := self._started()) and path.is_file():
            import wandb

            run.log({name: wandb.Image(str(path))})

    def close(self) -> None:
        """Flushes and ends the wandb process."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _started(self) -> Any:
        if self._config.tracking.wandb == "disabled":
            return None
        if self._run is None:
            import wandb

            logging.getLogger("wandb").setLevel(logging.ERROR)
            mode = self._config.tracking.wandb
            try:
                self._run = wandb.init(
                    mode=mode,
                    project=self._config.tracking.project,
                    name=self._config.name,
                    id=f"{self._config.name}-{self._config.identity_hash()}",
                    resume="allow",  # a run that was killed goes on as the same wandb run
                    dir=str(self._folder),
                    config=self._config.model_dump(mode="json"),
                    settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
                )
            except (wandb.Error, OSError) as error:
                raise ConfigError(
                    f"wandb ({mode}) did not start: {error}; set WANDB_API_KEY in the environment for online mode, or "
                    "tracking.wandb=offline or disabled"
                ) from None
            for stage in ("rgb", "vae", "sft", "judge", "continued", "grpo"):
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        return self._run
