"""``omnialpha data import``: OmniAlpha's JSONL files and plain folders as a dataset of the project."""

import argparse
import logging
from pathlib import Path

log = logging.getLogger("omnialpha")


def register(data: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command to ``omnialpha data``."""
    parser = data.add_parser("import", help="bring JSONL files or folders of images into a dataset (docs/data.md)")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a .jsonl file or a folder of records; PATH,task=NAME,split=NAME settles these for one source",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--size", type=int, default=64, help="side in pixels of the square all images are fitted to")
    parser.add_argument(
        "--pixels",
        type=int,
        help="pixels of all images of a record together, which then keep their proportions; sides: multiples of 32",
    )
    parser.add_argument("--task", help="task of rows that do not name theirs; default: inferred from the roles")
    parser.add_argument("--split", choices=("train", "val", "test"), help="split of all rows; default: drawn by group")
    parser.add_argument("--val-share", type=float, default=0.1, help="share of groups drawn for val (0.1)")
    parser.add_argument("--test-share", type=float, default=0.15, help="share of groups drawn for test (0.15)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--bad", choices=("fail", "skip"), default="fail", help="what a bad row does: end it, or be left out"
    )
    parser.add_argument(
        "--begin-with-bg",
        action=argparse.BooleanOptionalAction,
        help="whether the first output is the background, for rows without begin_with_bg",
    )
    parser.add_argument("--allow-outside", action="store_true", help="image paths may leave the JSONL file's folder")
    parser.add_argument("--licence", default="unknown", help="of rows that do not name theirs")
    parser.set_defaults(handler=_import)


def _import(options: argparse.Namespace) -> None:
    from data.import_rows import parse_source
    from data.importer import ImportOptions, import_dataset

    sources = [parse_source(text, options.task, options.split) for text in options.sources]
    names = ("size", "pixels", "val_share", "test_share", "seed", "bad", "begin_with_bg", "allow_outside", "licence")
    settings = ImportOptions(**{name: getattr(options, name) for name in names})
    manifest = import_dataset(sources, options.out.resolve(), settings, log.info)
    log.info("dataset: %s, content digest %s", options.out, manifest.content_digest)
    if missing := [split for split in ("train", "test") if split not in manifest.counts]:
        log.info("no record is in %s; a run trains on train and evaluates on test", " or ".join(missing))
