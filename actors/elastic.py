"""Training state of one number of learner ranks, for another: DeepSpeed's universal checkpoint, made when it is needed.

ZeRO 1 to 3 write one file per rank. Those files are what a commit holds; only a run that resumes with other ranks pays
for cutting them up by parameter, tensor by tensor, so that memory stays that of one rank's file.
"""

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path

from common.commit import storage_errors
from common.errors import CheckpointError

WRITERS = "writers.json"


def note_writers(folder: Path, ranks: int, zero_stage: int) -> None:
    """Puts down beside the training state who wrote it."""
    (folder / WRITERS).write_text(json.dumps({"ranks": ranks, "zero_stage": zero_stage}) + "\n")


def must_convert(folder: Path, ranks: int, zero_stage: int) -> bool:
    """Whether the state has to be cut anew for these ranks. Without ZeRO every rank holds all of it, and a commit from
    before this note was kept is read as it is.

    Raises:
        CheckpointError: another ZeRO stage wrote it.
    """
    try:
        writers = json.loads((folder / WRITERS).read_text())
    except FileNotFoundError:
        return False
    if writers["zero_stage"] != zero_stage:
        raise CheckpointError(
            f"{folder}: the training state is of ZeRO stage {writers['zero_stage']} and this run has stage "
            f"{zero_stage}; set the stage back, or give the run another run_dir"
        )
    return bool(zero_stage and writers["ranks"] != ranks)


def convert(folder: Path, tag: str) -> Path:
    """Cuts the state under ``folder / tag`` up by parameter; returns the folder to load ``tag`` from.

    It lies beside the commit under a temporary name: the next retention removes it.
    """
    from deepspeed.checkpoint import ds_to_universal

    out = folder.with_name(f".tmp-universal-{folder.name}")
    with storage_errors(out):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=str(folder / tag),
                    output_folder=str(out / tag),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    # All its entries are about models that are split in other ways than by ZeRO.
                    inject_missing_state=True,
                )
            )
    return out
