"""``omnialpha reward``: which scorers there are, a new one to start from, whether one keeps the contract, and what
several say about stored rollouts."""

import argparse
import inspect
import keyword
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common.errors import ConfigError, OmniAlphaError, RewardError, StorageError
from pipeline.child import Beat, in_child

log = logging.getLogger("omnialpha")

SCORER = '''\
"""Reward {name}: say here what it prefers."""


def {name}(batch, power=1.0):
    """One score per member, higher is better; `power` is set by `params` in the config."""
    # Decoded samples: G members, L layers back to front, RGBA, float32 in [0, 1]. Never write to a tensor.
    alpha_GLHW = batch.layers_GLCHW[:, :, 3]
    # The true layers: L, RGBA.
    truth_LHW = batch.targets_LCHW[:, 3]
    error_G = (alpha_GLHW - truth_LHW).abs().mean(dim=(1, 2, 3))
    return (1 - error_G) ** power


# What it reads beside the layers, out of "targets", "inputs", "prompt"; where one is absent it is not called.
{name}.needs = {{"targets"}}
'''

TEST = '''\
"""The contract of reward {name}: loads, finite, repeatable, order-free, reads what it declares (rewards.contract)."""

import subprocess
import sys
from pathlib import Path

PARAMS = []  # as in the config, for example ["power=2"]


def test_{name}_keeps_the_contract():
    target = f"{{Path(__file__).with_name('{name}.py')}}:{name}"
    # A process of its own, with -P: a folder called data/ or rewards/ here must not stand in for omnialpha's.
    command = [sys.executable, "-P", "-m", "pipeline.cli", "reward", "check", target, *PARAMS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
'''

NEXT = """\
wrote {scorer} and {test}

try it:     omnialpha reward check {scorer}:{name}
use it:     rewards:
              terms:
                - name: {name}
                  scorer: {absolute}:{name}"""


def register(commands: Any) -> None:
    """Adds ``reward list | new | check | score`` to the subparsers of the command line."""
    reward = commands.add_parser("reward", help="list, begin, check and compare scorers").add_subparsers(
        required=True, metavar="COMMAND"
    )
    reward.add_parser("list", help="every scorer that has a name here").set_defaults(handler=_list)
    new = reward.add_parser("new", help="write a scorer to start from and its test")
    new.add_argument("name", metavar="NAME", help="a Python identifier; becomes NAME.py and test_NAME.py")
    new.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where to write; default: here")
    new.set_defaults(handler=_new)
    check = reward.add_parser("check", help="try a scorer on small groups; exit code 1 when a check failed")
    check.add_argument("target", metavar="TARGET", help="a name, module:attribute or path/to/file.py:attribute")
    check.add_argument("params", nargs="*", metavar="key=value", help="params of the scorer, as in the config")
    check.add_argument("--task", action="append", metavar="TASK", help="only this task; may be repeated")
    check.add_argument("--size", type=int, default=64, help="height of the example images in pixels (%(default)s)")
    check.add_argument("--deadline", type=_seconds, default=300.0, help="seconds for all of it (%(default)s)")
    check.set_defaults(handler=_check)
    fit = reward.add_parser("fit-words", help="fit prompt_fidelity's map to a dataset and say what it is worth")
    fit.add_argument(
        "dataset", type=Path, metavar="DATASET", help="a dataset folder with the splits train, val and test"
    )
    fit.add_argument(
        "out", type=Path, metavar="OUT.safetensors", help="where to write the map and, beside it, OUT.json"
    )
    fit.add_argument(
        "--records", type=int, default=150, help="pictures for measuring, per split and task (%(default)s)"
    )
    fit.set_defaults(handler=_fit_words)
    score = reward.add_parser("score", help="score stored rollouts with any rewards and compare them")
    score.add_argument("rollouts", type=Path, help="a run's grpo/rollouts folder, or one of its files")
    score.add_argument("targets", nargs="*", metavar="TARGET", help="scorers; default: the rewards of --config")
    score.add_argument("--config", default="demo", help="whose rewards to take where no TARGET is given (%(default)s)")
    score.add_argument("--out", type=Path, metavar="FOLDER", help="writes scores.json and best-and-worst PNGs there")
    score.add_argument("--deadline", type=_seconds, default=60.0, help="seconds for each group (%(default)s)")
    score.set_defaults(handler=_score)


def _list(_: argparse.Namespace) -> None:
    from rewards.base import find, registered, unavailable

    rows = [("name", "needs", "from", "what")]
    for name in registered():
        try:
            thing = find(name)
        except OmniAlphaError as error:  # one broken package must not hide the others
            rows.append((name, "?", "?", f"CANNOT BE LOADED: {error}"))
            continue
        home = thing if hasattr(thing, "__qualname__") else type(thing)
        declared = getattr(thing, "needs", ())  # of a class it may be a property, known only once it is built
        needs = ", ".join(sorted(declared)) or "-" if isinstance(declared, (set, frozenset, list, tuple)) else "?"
        summary = (inspect.getdoc(thing) or "-").partition("\n")[0]
        rows.append((name, needs, f"{home.__module__}:{home.__qualname__}", summary))
    print(_table(rows))
    for module, reason in unavailable().items():
        print(f"not available: {module} ({reason})")


def _new(options: argparse.Namespace) -> None:
    name, folder = options.name, options.out
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a Python function; use letters, digits and _, as in my_reward"
        )
    files = {folder / f"{name}.py": SCORER, folder / f"test_{name}.py": TEST}
    if there := [path for path in files if path.exists()]:
        raise ConfigError(f"{there[0]} exists and is left as it is; choose another name or --out FOLDER")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(text.format(name=name))
    except OSError as error:
        raise StorageError(
            f"{error.filename} cannot be written ({error.strerror}); give another --out FOLDER"
        ) from None
    scorer, test = files
    print(NEXT.format(name=name, scorer=scorer, test=test, absolute=scorer.absolute()))


def _check(options: argparse.Namespace) -> None:
    arguments = (options.target, key_values(options.params), options.task, options.size)
    findings = in_child(options.target, options.deadline, _check_here, *arguments)
    print(_table([(finding.status, finding.what, finding.detail) for finding in findings]))
    if failed := [finding.what for finding in findings if finding.status == "failed"]:
        raise RewardError(f"{options.target} breaks the contract: {', '.join(failed)}; mend what the table says")


def _check_here(beat: Beat, *arguments: Any) -> Any:
    from rewards.contract import check_scorer

    beat()
    return check_scorer(*arguments)


def _score(options: argparse.Namespace) -> None:
    from actors.judge_here import judge_here
    from pipeline.config import load_config
    from pipeline.rescore import render, write
    from rewards.combine import RewardConfig, TermConfig
    from rewards.judge.served import check_templates, with_judge

    judging = None
    if options.targets:
        names = [target.rpartition(":")[2] for target in options.targets]
        terms = [TermConfig(name=n, scorer=t) for n, t in zip(names, options.targets, strict=True)]
        config = RewardConfig(terms=tuple(terms))
    else:
        run = load_config(options.config)
        config, judging = run.rewards, run.judging
    what = ", ".join(term.name for term in config.terms)
    with judge_here(judging) if judging else nullcontext() as asker:
        if asker:
            check_templates(config, asker)
            config = with_judge(config, asker)
        result = in_child(what, options.deadline, _score_here, config, options.rollouts)
    print("\n\n".join(_table(rows) for rows in render(result)))
    if options.out:
        for path in write(result, options.rollouts, options.out):
            print(f"wrote {path}")


def _score_here(beat: Beat, config: Any, rollouts: Path) -> Any:
    from policy.rollout_files import read_rollouts
    from rewards.groups import rescore

    beat()

    def pixels() -> Iterator[Any]:
        for group in read_rollouts(rollouts):
            beat()
            yield group.pixels

    return rescore(config, pixels())


def _fit_words(options: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from common.commit import write_atomic
    from data.manifest import read_manifest
    from data.records import RecordDataset
    from rewards.word_fitting import fit_to

    if options.out.suffix != ".safetensors":
        raise ConfigError(f"{options.out} must end with .safetensors: it will hold tensors")
    if options.records < 1:
        raise ConfigError("--records must be at least 1")
    manifest = read_manifest(options.dataset)
    train, val, test = (RecordDataset(options.dataset, split) for split in ("train", "val", "test"))

    def progress(done: int, count: int) -> None:
        if done % 200 == 0 or done == count:
            log.info("%d of %d objects", done, count)

    fitted = fit_to(train, val, test, options.records, progress)
    fitted.words.save(options.out)
    facts = {key: value for key, value in asdict(fitted).items() if key != "words"}
    facts |= {"dataset": manifest.content_digest, "dataset_config": manifest.config}
    write_atomic(options.out.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    rows: list[tuple[str, ...]] = [("AUC on", "pictures", "classes", "words", "both")]
    for name, row in fitted.aucs.items():
        rows.append((name, str(fitted.trials[name]), *(f"{row[kind]:.3f}" for kind in ("classes", "words", "both"))))
    print(f"fitted to {fitted.objects} objects, strength {fitted.strength:g}\n{_table(rows)}\nwrote {options.out}")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return seconds


def key_values(items: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as the config would read them: YAML values, dotted keys nest."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"param {item!r} is not of the form key=value, for example metrics=[psnr]")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(list(items)), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"params {' '.join(items)}: {str(error).splitlines()[0]}; quote the value as YAML") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
