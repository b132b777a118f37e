"""What every actor's process is doing, written down before a hang is ended: py-spy looks at it from outside, and where
that is missing or not permitted the process writes its own stacks (:mod:`faulthandler`, on SIGUSR2).
"""

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.processes import Process, roster

log = logging.getLogger("omnialpha")

ALL_S = 60.0
"""Longest wait for the stacks of all nodes."""
ONE_S = 10.0
"""Longest wait for py-spy at one process."""
OWN_S = 2.0
"""Longest wait for a process's own stacks; one that was stopped writes none."""


def dump_stacks() -> Path | None:
    """Writes ``stacks-<time>/<role>-<number>.txt`` for every known process, and the driver's, into the run's logs.

    Returns:
        The folder; None where nothing is known of any process, or nothing can be written.
    """
    known, logs = roster.known(), roster.logs
    if not known or not logs:
        return None
    folder = logs / time.strftime("stacks-%Y%m%dT%H%M%SZ", time.gmtime())
    nodes: dict[str, dict[str, Process]] = defaultdict(dict)
    for name, process in known.items():
        nodes[process.node][name] = process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "driver.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        writing = [
            ray.remote(num_cpus=0, max_retries=0)(write_stacks)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
            .remote(processes, folder)
            for node, processes in nodes.items()
        ]
        done, late = ray.wait(writing, num_returns=len(writing), timeout=ALL_S)
        ray.get(done)
        if late:
            log.warning("%d of %d nodes did not write their stacks within %.0f s", len(late), len(writing), ALL_S)
    except (OSError, RayError) as error:
        log.warning("not all stacks could be written: %s", error)
    return folder


def write_stacks(processes: dict[str, Process], folder: Path) -> None:
    """Writes the stacks of processes on this node."""
    for name, process in processes.items():
        text = stacks_of(process, folder.parent / f"{name}.log")
        (folder / f"{name}.txt").write_text(text)


def stacks_of(process: Process, own_log: Path) -> str:
    """The stacks of all threads of one process on this machine, or why there are none.

    Args:
        process: which.
        own_log: where it writes its stacks when it is asked to.
    """
    try:
        found = psutil.Process(process.pid)
        if abs(found.create_time() - process.born) > 1.0:
            raise psutil.NoSuchProcess(process.pid)
        head = f"process {process.pid}, {found.status()}\n\n"
    except psutil.NoSuchProcess:
        return f"process {process.pid} has ended\n"
    stacks, refusal = _spied(process.pid)
    return head + (stacks or f"no stacks by py-spy: {refusal}\n\n{_own(process.pid, own_log)}")


def _spied(pid: int) -> tuple[str, str]:
    """(stacks, why there are none)."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("py-spy", path=places)
    if program is None:
        return "", "it is not installed here"
    # Otherwise it would have to stop the process, which may be stopped already; one that hangs stands still anyway.
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=ONE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return (result.stdout, "") if result.returncode == 0 else ("", result.stderr.strip())


def _own(pid: int, own_log: Path) -> str:
    with contextlib.suppress(OSError):
        size, end = own_log.stat().st_size, time.monotonic() + OWN_S
        os.kill(pid, signal.SIGUSR2)
        while time.monotonic() < end:
            time.sleep(0.1)
            with own_log.open() as file:
                file.seek(size)
                if "most recent call first" in (text := file.read()):
                    return text
    return "it did not write its own stacks either\n"
