"""What a reward term asks for when it runs in a process of its own; plain data, for Ray to read."""

from typing import Any

from pydantic import Field, field_validator

from common.config import StrictConfig

DEADLINE_S = 60.0
"""Seconds that a term in a process of its own has for one group, unless its ``deadline_s`` says otherwise."""


class ResourcesConfig(StrictConfig):
    """What the processes of one term reserve."""

    actors: int = Field(1, ge=1)
    """Processes; each scores one group at a time."""
    cpus: float = Field(0.05, gt=0)
    """Ray CPUs of each. Scorers mostly work while nobody else does, so a fraction is enough; from 2 on it is also the
    number of torch threads."""
    gpus: float = Field(0.0, ge=0)
    """Ray GPUs of each; below 1 a share of one. The batch is on the CPU all the same: the scorer moves it."""

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} GPUs cannot be reserved; give a share of one (below 1) or a whole number")
        return gpus


class RuntimeEnvConfig(StrictConfig):
    """Ray's ``runtime_env`` for the processes of one term: how its code and what it imports get to the nodes."""

    py_modules: tuple[str, ...] | None = None
    """Packages (folders), single ``.py`` files or wheels that become importable; local paths or URIs."""
    working_dir: str | None = None
    """Folder that becomes the working directory and importable; a local path or a URI."""
    excludes: tuple[str, ...] | None = None
    """Patterns, as in .gitignore, of files in these folders that stay behind."""
    pip: str | tuple[str, ...] | dict[str, Any] | None = None
    """Requirements that pip installs on the node: a list, a requirements file, or Ray's own dict."""
    uv: str | tuple[str, ...] | dict[str, Any] | None = None
    """The same by uv."""
    conda: str | dict[str, Any] | None = None
    """Name of a conda environment of the node, a YAML file, or its content."""
    env_vars: dict[str, str] | None = None
    """Environment variables. They are saved with the run, so they must not hold secrets."""
    py_executable: str | None = None
    """Python interpreter; it must be able to import Ray and this project."""
    image_uri: str | None = None
    """Container image; it must hold Ray and this project."""
    config: dict[str, Any] | None = None
    """Ray's settings of the set-up itself, such as ``setup_timeout_seconds``."""

    def options(self) -> dict[str, Any]:
        """What Ray takes: the fields that are set."""
        return self.model_dump(mode="json", exclude_none=True)
