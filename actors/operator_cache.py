"""Loads DeepSpeed's shared-memory operator, whatever a killed process left in its build folder.

torch guards a build with a file that whoever wrote it must delete. A process killed in between leaves it, and every
later process waits for it for ever. A lock of the kernel's (``flock``) ends with its holder: under one, a file that
is still there is a dead process's.
"""

import fcntl
import logging
import os
import sys
from pathlib import Path

OPERATOR = "deepspeed_shm_comm"
log = logging.getLogger("omnialpha")


def load_operator() -> None:
    """Loads the operator into this process, building it where it is missing (about 40 s).

    Call it before ``deepspeed.init_distributed``, which then finds it loaded; never hold the lock across that call,
    where ranks wait for each other.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    # One ninja and one folder per environment: another version, or another checkout, finds every command changed
    # and builds again. Both lie beside this interpreter.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    folder = Path(_get_build_directory(OPERATOR, False))
    with (folder / "omnialpha.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        stale = folder / "lock"
        if stale.exists():
            log.warning("%s was left by a killed process; removed", stale)
            stale.unlink(missing_ok=True)
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


if __name__ == "__main__":
    load_operator()
