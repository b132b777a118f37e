"""``omnialpha judge``: train one, and check one before it is trusted."""

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from pipeline.reward_commands import key_values

if TYPE_CHECKING:
    from rewards.judge.asking import Asker
    from rewards.judge.checking import JudgeCheck

log = logging.getLogger("omnialpha")


def register(commands: Any) -> None:
    """Adds ``judge train | check`` to the subparsers of the command line."""
    judge = commands.add_parser("judge", help="train a judge, check a judge").add_subparsers(
        required=True, metavar="COMMAND"
    )
    train = judge.add_parser("train", help="train the config's judge on graded degradations")
    train.add_argument("config", help="a config with a judge section: judge-small, judge-qwen2.5-vl-7b, or your YAML")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example judge.steps=2000")
    train.set_defaults(handler=_train)
    check = judge.add_parser("check", help="agreement with graded degradations, position bias, spread, cost")
    check.add_argument(
        "judge", help="folder of a Qwen2.5-VL or judge-small, asked in this process, or the URL of a vLLM server"
    )
    check.add_argument("dataset", type=Path, help="a dataset folder")
    check.add_argument(
        "--serve",
        nargs="*",
        metavar="key=value",
        help="have vLLM serve the folder and ask it over HTTP; settings as in judging.server, for example gpus=true",
    )
    check.add_argument("--model", help="name under which the server at the URL knows the model")
    check.add_argument("--key-env", metavar="NAME", help="environment variable that holds the server's key")
    check.add_argument("--split", default="test", choices=("train", "val", "test"))
    check.add_argument("--templates", default="small", help="shipped prompt templates (small, vlm) or a folder")
    check.add_argument("--records", type=int, default=20, help="records per task (%(default)s)")
    check.add_argument("--seed", type=int, default=0, help="of the degradations (%(default)s)")
    check.add_argument("--out", type=Path, metavar="FILE", help="also write what was found as JSON")
    check.set_defaults(handler=_check)


def _train(options: argparse.Namespace) -> None:
    from pipeline.config import load_config
    from pipeline.stages import run_stages

    run_stages(load_config(options.config, options.overrides), ("judge",))


@contextmanager
def _asked(options: argparse.Namespace) -> "Iterator[tuple[Asker, Callable[[str], int]]]":
    """Whoever the command line names, and how many tokens a text has there."""
    from actors.judge import JudgeServing
    from actors.judge_here import judge_here
    from common.config import validate
    from rewards.judge.model import ModelJudge
    from rewards.judge.shipped import named_judge

    judge, by_url = options.judge, "://" in options.judge
    if by_url and (options.serve is not None or not options.model):
        raise ConfigError(f"{judge}: a server is named by its URL and --model NAME; --serve is for a folder")
    if not by_url and (options.model or options.key_env):
        raise ConfigError(f"{judge}: --model and --key-env are for a server, whose URL has http:// or https://")
    if by_url:
        serving = {"external": {"url": judge, "model": options.model, "key_env": options.key_env}}
    elif options.serve is not None:
        serving = {"server": {**key_values(options.serve), "model": judge}}
    else:
        here = ModelJudge(named_judge(judge))
        yield here, here.reader.tokens
        return
    with judge_here(validate(JudgeServing, serving, "judge check").anchored()) as client:
        yield client, client.tokens


def _check(options: argparse.Namespace) -> None:
    from common.commit import write_atomic
    from common.events import finite
    from data.records import RecordDataset
    from rewards.judge.checking import check_judge
    from rewards.judge.templates import load_templates

    if options.records < 2:
        raise ConfigError(f"--records {options.records}: at least 2 are needed to compare")
    templates, data = load_templates(options.templates), RecordDataset(options.dataset, options.split)

    def progress(done: int, work: int) -> None:
        if done % 20 == 0 or done == work:
            log.info("judge check: %d of %d records", done, work)

    with _asked(options) as (judge, tokens):
        templates.check_labels(tokens)
        found = check_judge(judge, templates, data, options.records, options.seed, progress)
    for line in render(found):
        log.info("%s", line)
    if options.out:
        write_atomic(options.out, json.dumps(finite(dataclasses.asdict(found)), indent=1) + "\n")
        log.info("wrote %s", options.out)


def render(found: "JudgeCheck") -> list[str]:
    """What was found, for the terminal; intervals are 95 % over objects."""

    def interval(numbers: tuple[float, float, float]) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)

    def each(values: dict[str, float], digits: int = 2) -> str:
        return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items()) or "-"

    return [
        f"records                        {found.records}",
        f"grade and score, Spearman      {interval(found.spearman)}",
        f"  by kind                      {each(found.spearman_by_kind)}",
        f"  by task                      {each(found.spearman_by_task)}",
        f"better one wins, one order     {interval(found.pair_accuracy)}",
        f"better one wins, both orders   {interval(found.pair_accuracy_both)}",
        f"preference for first place     {interval(found.position_bias)}",
        f"wrong object, AUC              {each(found.wrong_object_auc)}",
        f"grid and grade, Spearman       {found.grid_spearman:.3f}",
        f"spread in near groups          {each(found.spread, 4)}",
        f"seconds per group of five      {each(found.seconds_per_group, 3)}",
        f"questions without an answer    {sum(found.missing.values())}",
        *(f"  {count} times: {reason}" for reason, count in sorted(found.missing.items(), key=lambda e: -e[1])[:5]),
    ]
