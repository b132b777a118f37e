"""What an actor says of itself when it starts: where it is, and which code and versions it runs.

:mod:`actors.processes` sends these functions by value: a node whose copy of this package is another one answers too.
So nothing here may name one of our modules outside a function body.
"""

import faulthandler
import hashlib
import logging
import os
import platform
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("actors", "common", "data", "pipeline", "policy", "rewards")
"""Whose sources must be the same everywhere."""


def versions() -> dict[str, str]:
    """This process's code and versions, by name."""
    import actors

    found = {"code": source_digest(Path(actors.__file__).parents[1]), "python": platform.python_version()}
    for package in ("omnialpha", "torch", "ray"):
        try:
            found[package] = version(package).partition("+")[0]  # the same release for CPUs and for GPUs
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def source_digest(root: Path) -> str:
    """Digest of all Python sources and YAML files of the packages that lie in ``root``: their names and contents."""
    whole = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                whole.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return whole.hexdigest()[:16]


def arrive(_: Any, name: str, expected: dict[str, str], logs: Path | None) -> dict[str, Any]:
    """Called on a new actor: opens its log, unless it runs something else than ``expected``.

    Returns:
        Its name, node, process and versions, for :func:`actors.processes.admit`.
    """
    import psutil
    import ray

    found = versions()
    if logs and found == expected:
        from common.role_logs import log_to

        faulthandler.register(signal.SIGUSR2, file=log_to(logs / f"{name}.log"), all_threads=True)
        logging.getLogger("omnialpha").info("process %d on %s: %s", os.getpid(), ray.util.get_node_ip_address(), found)
    return {
        "name": name,
        "node": ray.get_runtime_context().get_node_id(),
        "address": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "versions": found,
    }
