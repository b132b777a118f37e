"""``omnialpha report RUN [RUN ...]``: one self-contained HTML page about one run, or several side by side."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.commit import write_atomic
from common.errors import ConfigError

log = logging.getLogger("omnialpha")

FILE = "report.html"


def register(commands: Any) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser("report", help="write one HTML page about a run, or several side by side")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, finished or not")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"default: {FILE} in the run folder; for several runs in the working directory",
    )
    parser.set_defaults(handler=_report)


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page about the runs in ``folders`` and returns its path.

    Raises:
        ConfigError: a folder that is no run folder, or ``out`` is a folder.
        StorageError: the file system refused.
    """
    from pipeline.report_data import collect
    from pipeline.report_page import render

    path = out or (folders[0] / FILE if len(folders) == 1 else Path(FILE))
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of the file to write, for example {path / FILE}")
    write_atomic(path, render(collect(folders)))
    return path


def report_finished(folder: Path) -> None:
    """Writes a finished run's page into its folder. What the run computed is safe, so a failure is only a warning."""
    try:
        log.info("report: %s", write_report([folder]))
    except Exception as error:
        log.warning("no report: %s; `omnialpha report %s` tries again", error, folder)


def _report(options: argparse.Namespace) -> None:
    log.info("wrote %s", write_report(options.runs, options.out))
