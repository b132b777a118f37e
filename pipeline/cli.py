"""The command line: ``omnialpha COMMAND [CONFIG] [key=value …]``."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError, OmniAlphaError
from pipeline import (
    data_import,
    export,
    judge_commands,
    release,
    report,
    reward_commands,
    sample,
    status,
    trace,
    vae_convert,
)

log = logging.getLogger("omnialpha")

STAGE_HELP = {
    "run": "all stages, skipping what is done",
    "rgb": "train the RGB VAE that the next stage converts, where the config asks for one",
    "vae": "train the alpha-aware VAE and encode the training split",
    "sft": "multi-task supervised cold start",
    "continued": "SFT for as long again as GRPO takes: the control",
    "grpo": "GRPO on rewards of the decoded layers",
    "eval": "compare the policies on held-out records",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Expected errors end as one message and a documented exit code (2: configuration, 130: stopped)."""
    options = _parser().parse_args(arguments)
    logging.raiseExceptions = False  # a log file on a full disk must not bury the message below
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    try:
        options.handler(options)
        return 0
    except OmniAlphaError as error:
        print(f"omnialpha: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("omnialpha: interrupted; the same command again takes a run up at its last commit", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="omnialpha", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in STAGE_HELP.items():
        _with_config(commands.add_parser(name, help=text)).set_defaults(handler=_run, stage=name)
    _with_config(commands.add_parser("plan", help="show configuration, actors and cores; check them")).set_defaults(
        handler=_plan
    )
    commands.add_parser("doctor", help="check this machine").set_defaults(handler=_doctor)
    data = commands.add_parser("data", help="build and look at datasets").add_subparsers(required=True)
    build = data.add_parser("build", help="compose the config's dataset from pinned public sources")
    _with_config(build).add_argument("--out", type=Path, help="folder to write; default: the run's dataset folder")
    build.set_defaults(handler=_data_build)
    inspect = data.add_parser("inspect", help="draw a contact sheet")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--split", default="train", choices=("train", "val", "test"))
    inspect.add_argument("--rows", type=int, default=4, help="records per task")
    inspect.add_argument("--out", type=Path, default=Path("contact-sheet.png"))
    inspect.set_defaults(handler=_data_inspect)
    check = data.add_parser("verify", help="decode every record and check every digest")
    check.add_argument("folder", type=Path)
    check.set_defaults(handler=_data_verify)
    data_import.register(data)
    report.register(commands)
    status.register(commands)
    trace.register(commands)
    reward_commands.register(commands)
    judge_commands.register(commands)
    sample.register(commands)
    export.register(commands)
    release.register(commands)
    vae_convert.register(commands)
    return parser


def _with_config(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("config", help="a shipped config (demo, tiny) or a path to a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example grpo.steps=20")
    return parser


def _run(options: argparse.Namespace) -> None:
    from pipeline.config import load_config
    from pipeline.stages import run_stages, stages_of

    config = load_config(options.config, options.overrides)
    one = "evaluate" if options.stage == "eval" else options.stage
    run_stages(config, stages_of(config) if options.stage == "run" else (one,))


def _plan(options: argparse.Namespace) -> None:
    from pipeline.config import load_config
    from pipeline.plan import check_plan, render_plan

    config = load_config(options.config, options.overrides)
    print(render_plan(config))
    print(f"\n{check_plan(config)}")


def _doctor(_: argparse.Namespace) -> None:
    from pipeline.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        print(f"{'ok     ' if finding.ok else 'MISSING'} {finding.what}: {finding.detail}")
    if bad := [finding.what for finding in findings if not finding.ok]:
        raise ConfigError(f"not ready: {', '.join(bad)}")


def _data_build(options: argparse.Namespace) -> None:
    from data.build import build_dataset
    from pipeline.config import load_config

    config = load_config(options.config, options.overrides)
    out = options.out.resolve() if options.out else config.dataset_folder
    manifest = build_dataset(config.data, out, progress=log.info)
    log.info("dataset: %s, content digest %s", out, manifest.content_digest)


def _data_inspect(options: argparse.Namespace) -> None:
    from data.inspect import contact_sheet

    contact_sheet(options.folder, options.split, options.out, rows=options.rows)
    log.info("wrote %s", options.out)


def _data_verify(options: argparse.Namespace) -> None:
    from common.errors import DataError
    from data.records import verify

    if problems := verify(options.folder):
        raise DataError(f"{options.folder}: {len(problems)} problems; first: {problems[0]}")
    log.info("%s: every record decodes and matches its digests", options.folder)


if __name__ == "__main__":
    sys.exit(main())
