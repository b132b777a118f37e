"""What an actor says of itself when it starts: where it is, and which code and versions it runs; what a node sees.

:mod:`actors.processes` sends these functions by value: a node whose copy of this package is another one answers too.
So nothing here may name one of our modules outside a function body.
"""

import faulthandler
import hashlib
import logging
import os
import platform
import signal
from collections.abc import Sequence
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


def answer_of(question: Path, node: str) -> Path:
    """Where a node leaves its answer to a question in the run folder."""
    return question.with_name(f"{question.name}-{node}")


def look(question: Path, answer: Path, dataset: Path, names: Sequence[str]) -> dict[str, Any]:
    """Called on a node: what it reads at ``question``, which it copies to ``answer``, and of files in ``dataset``.

    Returns:
        ``token`` and ``error`` (None each where there is none), ``files``: digests by name of those that are there.
    """
    token, error, files = None, None, {}
    try:
        token = question.read_text()
        answer.write_text(token)
    except OSError as refused:
        error = refused.strerror
    for name in names:
        if (dataset / name).is_file():
            files[name] = hashlib.sha256((dataset / name).read_bytes()).hexdigest()
    return {"token": token, "error": error, "files": files}


def arrive(
    _: Any, name: str, expected: dict[str, str], logs: Path | None, asked: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Called on a new actor: looks at the shared storage where nobody has done so on its node, and opens its log,
    unless it runs something else than ``expected``.

    Args:
        asked: ``path``, ``dataset``, ``names`` and ``known`` of a :class:`actors.shared_storage.Question`; None where
            nothing is asked.

    Returns:
        Its name, node, process and versions and what it saw, for :func:`actors.processes.admit`.
    """
    import psutil
    import ray

    node, seen = ray.get_runtime_context().get_node_id(), None
    if asked and node not in asked["known"]:
        seen = look(asked["path"], answer_of(asked["path"], node), asked["dataset"], asked["names"])
    found = versions()
    if logs and expected.items() <= found.items():
        from common.role_logs import log_to

        faulthandler.register(signal.SIGUSR2, file=log_to(logs / f"{name}.log"), all_threads=True)
        logging.getLogger("omnialpha").info("process %d on %s: %s", os.getpid(), ray.util.get_node_ip_address(), found)
    return {
        "name": name,
        "node": node,
        "seen": seen,
        "address": ray.util.get_node_ip_address(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "versions": found,
    }
