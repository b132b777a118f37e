"""The driver's view of its actors' processes. Every actor says on start where it is and what it runs, and opens its log
in the run folder; one that runs other code or versions than the driver is refused. One run at a time, as there is one
connection to Ray.
"""

import dataclasses
import functools
import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle

import actors.origin
from actors.origin import arrive, versions
from common.errors import ClusterError

if TYPE_CHECKING:
    from actors.shared_storage import SharedStorage  # which waits, and what waits looks at the roster

cloudpickle.register_pickle_by_value(actors.origin)

driver_versions = functools.cache(versions)
"""What all actors must run. Read when the run connects: files that change later must not speak for the driver."""


@dataclasses.dataclass(frozen=True)
class Process:
    """Of one actor."""

    node: str
    """Ray's name of the node."""
    pid: int
    born: float
    """When it was started, in wall-clock seconds: another process may get its number later."""


class Roster:
    """The processes of a run's actors."""

    def __init__(self) -> None:
        self.logs: Path | None = None
        self.storage: SharedStorage | None = None
        self._known: dict[str, Process] = {}
        self._lock = threading.Lock()

    def open(self, logs: Path | None) -> None:
        """Forgets all processes; those to come write their logs into a folder that all nodes share."""
        with self._lock:
            self.logs, self.storage, self._known = logs, None, {}

    def add(self, name: str, process: Process) -> None:
        """Takes a process in; one of the same name is gone."""
        with self._lock:
            self._known[name] = process

    def known(self) -> dict[str, Process]:
        """The processes by role and number, such as ``rollout-1``."""
        with self._lock:
            return dict(self._known)


roster = Roster()


def enter(actor: Any, name: str, own: Collection[str] = ()) -> Any:
    """Reference to what a new actor says of itself, for :func:`admit`; it fails where the actor does not start.

    ``own``: what it may have another version of.
    """
    expected = {key: value for key, value in driver_versions().items() if key not in own}
    asked = dataclasses.asdict(roster.storage.question) if roster.storage else None
    return actor.__ray_call__.remote(arrive, name, expected, roster.logs, asked)


def admit(said: dict[str, Any], own: Collection[str] = ()) -> None:
    """Takes an actor in that has said what it is.

    Raises:
        ClusterError: it does not run what the driver runs, or does not see the storage that the driver sees.
    """
    here, there = driver_versions(), said["versions"]
    if differing := [
        f"{key} {there.get(key)} (the driver: {here[key]})"
        for key in here
        if key not in own and there.get(key) != here[key]
    ]:
        raise ClusterError(
            f"node {said['address']} does not run what the driver runs: {said['name']} has {', '.join(differing)}; "
            "give all nodes the same package and versions (one image or wheel, or `ray job submit --working-dir`); if "
            "files were changed since the run began, run the same command again"
        )
    if said.get("seen") and roster.storage:
        roster.storage.judge(said["node"], said["address"], said["seen"])
    roster.add(said["name"], Process(said["node"], said["pid"], said["born"]))
