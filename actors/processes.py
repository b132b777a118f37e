"""The driver's view of its actors' processes: every actor says on start where it is and what it runs, and one that runs
other code than the driver is refused. One run at a time, as there is one connection to Ray.
"""

import functools
from typing import Any

from ray import cloudpickle

import actors.origin
from actors.origin import arrive, versions
from common.errors import ClusterError

cloudpickle.register_pickle_by_value(actors.origin)

driver_versions = functools.cache(versions)
"""What all actors must run. Read when the run connects: files that change later must not speak for the driver."""


def enter(actor: Any) -> Any:
    """Reference to what a new actor says of itself, for :func:`admit`; it fails where the actor does not start."""
    return actor.__ray_call__.remote(arrive)


def admit(name: str, said: dict[str, Any]) -> None:
    """Takes an actor in.

    Args:
        name: role and number.
        said: what it said of itself.

    Raises:
        ClusterError: it does not run what the driver runs.
    """
    here, there = driver_versions(), said["versions"]
    if differing := [
        f"{key} {there.get(key)} (the driver: {here[key]})" for key in here if there.get(key) != here[key]
    ]:
        raise ClusterError(
            f"node {said['address']} does not run what the driver runs: {name} has {', '.join(differing)}; give all "
            "nodes the same package and versions (one image or wheel, or `ray job submit --working-dir`); if files were "
            "changed since the run began, run the same command again"
        )
