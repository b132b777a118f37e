"""Keeps a server from outliving whoever started it. A program of its own: ``judge_guard.py LOG COMMAND...``

It leaves the family of its starter first, because Ray kills the children of an actor that ends, and a guard that is
killed guards nothing. Then it starts the command and waits until its standard input closes, which happens however the
starter ends, or until the command ends. Last it ends the command and whatever the command started: orphans among them
become its own children, for it is their subreaper.

Standard output: the command's process id, later its exit code, a line each.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

import psutil

GRACE_S = 5.0
"""For the command to end by itself."""
SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""


def main() -> None:
    """Starts the command of the command line and sees to its end."""
    log, *command = sys.argv[1:]
    if os.fork():
        os._exit(0)
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with open(log, "ab") as out:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Where even this guard is killed, the command goes too.
            preexec_fn=lambda: libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0),
        )
    try:
        say(server.pid)
        changes = select.poll()
        changes.register(sys.stdin.fileno(), select.POLLIN)  # nothing is ever sent: it is readable when it is closed
        changes.register(os.pidfd_open(server.pid), select.POLLIN)
        changes.poll()
    finally:
        end(server)
    with contextlib.suppress(BrokenPipeError):
        say(server.returncode)


def say(number: int) -> None:
    """Tells the starter."""
    os.write(sys.stdout.fileno(), b"%d\n" % number)


def end(server: "subprocess.Popen[bytes]") -> None:
    """Ends the command, kindly at first, and every process that comes from it."""
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_S)
    server.kill()
    server.wait()
    while orphans := psutil.Process().children(recursive=True):
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(orphans, timeout=1.0)


if __name__ == "__main__":
    main()
