"""Tries a scorer on small groups before a run does: what breaks, and what would quietly spoil the training.

The groups are drawn here and are the same every time: soft discs over gradients, one group of four candidates per
task, the first of them the truth itself and each next one visibly worse. Nothing is downloaded and no actor starts.
"""

import dataclasses
import pickle
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, OmniAlphaError, RewardError
from data.rgba import over
from data.tasks import TASKS, get_task
from rewards.base import NEEDS, RewardBatch, Scorer, build, describe, run_scorer, scorer_needs
from rewards.combine import RewardConfig, TermConfig, active_terms
from rewards.credit import cells_of

Status = Literal["ok", "warning", "failed"]

MEMBERS = 4
"""Candidates per example group."""

TOLERANCE = 1e-6
"""Scores that differ by less, absolutely or relatively, count as equal."""

_ADDS_UP = 0.01
"""What contributions may differ by from the scores, as a part of their spread over the group."""

CHECKS = {
    "scores": "one finite number for each member",
    "repeatable": "the same group has the same scores twice",
    "order": "reordered members keep their scores",
    "single": "a group of one is scored, as evaluation does it",
    "read-only": "writes to no tensor of the batch",
    "empty layers": "single-pixel and fully transparent layers are scored",
    "reads": "reads what it declares and nothing else",
    "spread": "tells visibly different qualities apart",
    "contributions": "what it says of each pixel adds up to its scores",
}
"""The checks that run per task, in the order of the report, and what is said of one that found nothing."""

_FIELDS = {"targets_LCHW": "targets", "inputs": "inputs", "prompt": "prompt"}
"""Fields that only a declared need entitles to, and that need."""

_ABSENT: dict[str, dict[str, Any]] = {
    "targets": {"targets_LCHW": None},
    "inputs": {"inputs": (), "input_roles": ()},
    "prompt": {"prompt": ""},
}

# The batch's own methods, run_scorer and dataclasses.replace read every field; that says nothing about the scorer.
_NOT_THE_SCORER = frozenset({"rewards.base", "dataclasses"})

_REORDERED = [2, 0, 3, 1]  # not its own inverse, so that applying it the wrong way round shows


@dataclass(frozen=True)
class Finding:
    """Outcome of one check."""

    what: str
    """Name of the check."""
    status: Status
    """``failed`` breaks a run or its result, ``warning`` may be meant."""
    detail: str
    """One sentence; where something is wrong it says what to do."""


@dataclass(frozen=True, eq=False)
class _Trial:
    """One call of the scorer."""

    values_G: np.ndarray
    reason: str | None
    """Why the first missing score is missing."""
    refused: bool
    """The scorer raised RewardError: it says that it cannot judge this task."""
    reads: frozenset[str]
    """Fields out of ``_FIELDS`` that the scorer read."""
    written: tuple[str, ...]
    """Tensors that the scorer changed."""
    seconds: float

    def equals(self, values_G: np.ndarray) -> bool:
        return np.allclose(self.values_G, values_G, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def check_scorer(
    source: str,
    params: Mapping[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    size: int = 64,
) -> list[Finding]:
    """Builds a scorer as a run would and tries it on an example group of every task it would judge.

    Args:
        source: registered name, entry point, ``module:attribute`` or ``path/to/file.py:attribute``.
        params: keyword arguments of the scorer, as in the config.
        tasks: names in the task table; None takes the tasks a run would give to a term of this name.
        size: height of the example images in pixels, at least 16; they are three quarters as wide.

    Returns:
        Findings in a fixed order. What a failed check makes meaningless is left out: a scorer that does not load has
        one finding.

    Raises:
        ConfigError: an unknown task, or a size that is too small. Whatever is wrong with the scorer is a finding.
    """
    if size < 16:
        raise ConfigError(f"size {size} is too small for the shipped terms; give at least 16 pixels")
    chosen = None if tasks is None else [get_task(task).name for task in tasks]
    try:
        scorer = build(source, params)
    except RewardError as error:
        return [_loaded(), Finding("declares", "failed", str(error))]
    except OmniAlphaError as error:
        return [Finding("loads", "failed", str(error))]
    needs = scorer_needs(scorer)
    findings = [
        _loaded(describe(scorer)),
        Finding("declares", "ok", f"needs {', '.join(sorted(needs)) or 'nothing but the layers'}"),
    ]
    seconds: list[float] = []
    by_task: dict[str, list[Finding]] = {}
    for task in judged_tasks(source) if chosen is None else chosen:
        batch = example_group(task, size)
        if not needs & _unmet(batch):
            by_task[task] = list(_judge(scorer, needs, batch, seconds))
    findings += _merge(by_task)
    findings.append(_pickled(scorer))
    if seconds:
        height, width = batch.layers_GLCHW.shape[-2:]
        each = statistics.median(seconds) / MEMBERS * 1000
        findings.append(
            Finding("speed", "ok", f"{each:.3g} ms per sample of {height} × {width} pixels on this machine")
        )
    return findings


def judged_tasks(source: str) -> list[str]:
    """Tasks whose samples a run gives to a term called ``source``: by the rule of :func:`active_terms`."""
    config = RewardConfig(terms=(TermConfig(name=source),))
    return [task for task in TASKS if active_terms(config, task)]


def example_group(task: str, size: int = 64) -> RewardBatch:
    """Four candidates for ``task``, the same on every call: member 0 equals the truth, each next one is worse.

    Discs move, soften and change colour; backgrounds get ripples in colour and alpha. Layers are (4, L, 4, size,
    3·size/4), not square, so that swapped axes show.

    Raises:
        ConfigError: no such task.
    """
    entry = get_task(task)
    height, width = size, size * 3 // 4

    def layers(fault: int) -> Tensor:
        drawn = [
            _disc(height, width, fault, place)
            if role == "foreground"
            else _background(height, width, fault)
            if role == "background"
            else over(torch.stack([_background(height, width, fault), _disc(height, width, fault, place)])).clamp(0, 1)
            for place, role in enumerate(entry.targets)
        ]
        return torch.stack(drawn)

    object_4HW = _disc(height, width, 0, len(entry.targets) - 1)
    images = {
        "image": over(torch.stack([_background(height, width, 0), object_4HW])).clamp(0, 1),
        "background": _background(height, width, 0),
        "foreground": object_4HW,
        "mask": torch.cat([(object_4HW[3:] > 0).float().expand(3, height, width), torch.ones(1, height, width)]),
    }
    return RewardBatch(
        task=task,
        prompt=entry.instructions[0].format(caption="a red disc"),
        roles=entry.targets,
        layers_GLCHW=torch.stack([layers(fault) for fault in range(MEMBERS)]),
        targets_LCHW=layers(0),
        inputs=tuple(images[role] for role in entry.inputs),
        input_roles=entry.inputs,
        group=f"contract/{task}",
    )


def _background(height: int, width: int, fault: int) -> Tensor:
    rows, columns = _grid(height, width)
    ripple = 0.5 + 0.5 * torch.sin(40 * (rows + columns))
    colour = torch.stack([0.2 + 0.6 * columns, 0.3 + 0.4 * rows, 0.8 - 0.5 * columns])
    colour = colour.lerp(ripple.expand_as(colour), 0.2 * fault)
    return torch.cat([colour, (1 - 0.15 * fault * ripple)[None]])


def _disc(height: int, width: int, fault: int, place: int) -> Tensor:
    rows, columns = _grid(height, width)
    across = (columns - 0.45 - 0.05 * fault) * width / height
    distance = torch.hypot(rows - 0.35 - 0.08 * fault - 0.05 * place, across)
    alpha = ((0.25 - distance) / (0.06 + 0.04 * fault) + 0.5).clamp(0, 1)
    colour = torch.stack([0.9 - 0.4 * rows, 0.2 + 0.3 * columns, 0.1 + 0.2 * rows])
    return torch.cat([colour.lerp(1 - colour, 0.15 * fault), alpha[None]])


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel in [0, 1], each (H, W)."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return rows, columns


def _judge(scorer: Scorer, needs: frozenset[str], batch: RewardBatch, seconds: list[float]) -> Iterator[Finding]:
    """All checks of one task; appends the time of calls after the first to ``seconds``."""
    first = _try(scorer, batch)
    undeclared = sorted(field for field in first.reads if _FIELDS[field] not in needs)
    if undeclared:
        wanted = sorted(needs | {_FIELDS[field] for field in undeclared})
        fields = ", ".join(f"batch.{field}" for field in undeclared)
        yield Finding("reads", "failed", f"reads {fields} without declaring it; write needs = {_set_text(wanted)}")
    if first.written:
        detail = f"writes to {', '.join(first.written)}, which other terms read after it; work on a clone"
        yield Finding("read-only", "failed", detail)
    else:
        yield _ok("read-only")
    if first.reason is not None:
        if first.refused:
            detail = (
                f"declines the task, so that its samples have no score from it ({first.reason}); keep missing: drop"
            )
            yield Finding("scores", "warning", detail)
        else:
            detail = f"{first.reason}; return one finite number for each of the {batch.members} members"
            yield Finding("scores", "failed", detail)
        return
    yield _ok("scores")
    yield _tells_apart(first.values_G, "targets" in needs)
    yield from _odd_groups(scorer, batch)
    if callable(getattr(scorer, "contributions", None)):
        yield _adds_up(scorer, batch, first.values_G)

    again = _try(scorer, batch)
    seconds.append(again.seconds)
    if not again.equals(first.values_G):
        change = np.nanmax(np.abs(again.values_G - first.values_G), initial=0.0)
        detail = f"the same group scores differently by up to {change:.3g} the second time"
        yield Finding("repeatable", "failed", f"{detail}; draw random numbers from a fixed seed and keep no state")
        return  # whatever is compared below would differ for this reason alone
    yield _ok("repeatable")
    layers, name = batch.layers_GLCHW[_REORDERED], f"{batch.group}/reordered"
    reordered = _try(scorer, dataclasses.replace(batch, layers_GLCHW=layers, group=name))
    if reordered.equals(first.values_G[_REORDERED]):
        yield _ok("order")
    else:
        detail = "a member's score changes when the members are reordered; judge it by its pixels, not by its position"
        yield Finding("order", "failed", detail)
    if not undeclared:
        yield _without_undeclared(scorer, needs, batch, first.values_G)


def _tells_apart(values_G: np.ndarray, with_truth: bool) -> Finding:
    if np.ptp(values_G) <= TOLERANCE:
        detail = f"all {len(values_G)} qualities score {values_G[0]:.4g}, from which nothing can be learned; "
        return Finding("spread", "warning", detail + "check that it looks at the layers")
    if with_truth and values_G[0] < values_G[-1]:
        detail = f"the truth itself scores {values_G[0]:.4g}, a spoilt copy {values_G[-1]:.4g}; higher must be better"
        return Finding("spread", "warning", detail)
    return _ok("spread")


def _adds_up(scorer: Scorer, batch: RewardBatch, values_G: np.ndarray) -> Finding:
    """Whether what a scorer says of each pixel adds up to what it says of the whole."""
    try:
        cells = cells_of(scorer, dataclasses.replace(batch), max(batch.layers_GLCHW.shape[-2:]))
    except Exception as error:  # a plug-in may raise anything
        return Finding("contributions", "failed", f"contributions(batch) raised {type(error).__name__}: {error}")
    if cells is None:
        return _ok("contributions")
    sums_G = cells.astype(np.float64).mean(axis=(1, 2, 3))
    off = float(np.abs((sums_G - sums_G[0]) - (values_G - values_G[0])).max())
    if not off <= _ADDS_UP * max(float(np.ptp(values_G)), TOLERANCE):
        detail = f"means of contributions differ from the scores by up to {off:.3g} beyond what all members share"
        return Finding("contributions", "failed", f"{detail}; their mean over layers and pixels must be the score")
    return _ok("contributions")


def _odd_groups(scorer: Scorer, batch: RewardBatch) -> Iterator[Finding]:
    """Groups that are rare in tests and common in runs: nearly empty layers early on, one member in evaluation."""
    height, width = batch.layers_GLCHW.shape[-2:]
    clear = batch.layers_GLCHW.clone()
    clear[:, :, 3] = 0
    pixel = clear.clone()
    for member in range(batch.members):
        pixel[member, :, 3, height // 2, width // 3 + member] = 1
    for kind, layers in (("fully transparent", clear), ("single-pixel", pixel)):
        trial = _try(scorer, dataclasses.replace(batch, layers_GLCHW=layers, group=f"{batch.group}/{kind}"))
        if trial.reason is not None:
            detail = (
                f"{kind} layers have no score ({trial.reason}); an untrained policy makes such layers, give a number"
            )
            yield Finding("empty layers", "failed", detail)
            break
    else:
        yield _ok("empty layers")
    alone = dataclasses.replace(batch, layers_GLCHW=batch.layers_GLCHW[1:2], group=f"{batch.group}/single")
    if reason := _try(scorer, alone).reason:
        detail = f"a group of one has no score ({reason}), so that evaluation cannot report this term; score it too"
        yield Finding("single", "warning", detail)
    else:
        yield _ok("single")


def _without_undeclared(scorer: Scorer, needs: frozenset[str], batch: RewardBatch, values_G: np.ndarray) -> Finding:
    """Catches what watching attributes cannot: reads through ``vars(batch)`` or a copy."""
    absent = sorted(NEEDS - needs)
    changes = {field: value for need in absent for field, value in _ABSENT[need].items()}
    bare = _try(scorer, dataclasses.replace(batch, **changes, group=f"{batch.group}/bare"))
    if bare.reason is None and bare.equals(values_G):
        return _ok("reads")
    problem = f"has no score ({bare.reason})" if bare.reason is not None else "scores differently"
    detail = f"{problem} where {', '.join(absent)}, which it does not declare, are absent; add what it uses to needs"
    return Finding("reads", "failed", detail)


def _try(scorer: Scorer, batch: RewardBatch) -> _Trial:
    """Scores a copy of ``batch`` that records who reads what."""
    reads: set[str] = set()
    watched = _recording(batch, reads)
    started = time.perf_counter()
    scores = run_scorer("scorer", scorer, watched)
    seconds = time.perf_counter() - started
    reasons = [reason for reason in scores.reasons if reason is not None]
    after = _tensors(watched)
    written = tuple(name for name, before in _tensors(batch).items() if not torch.equal(before, after[name]))
    # run_scorer describes an exception by its class's name first.
    refused = len(reasons) == batch.members and all(reason.startswith("RewardError") for reason in reasons)
    return _Trial(scores.values_G, next(iter(reasons), None), refused, frozenset(reads), written, seconds)


def _recording(batch: RewardBatch, reads: set[str]) -> RewardBatch:
    class Recording(RewardBatch):
        def __getattribute__(self, name: str) -> Any:
            if name in _FIELDS and sys._getframe(1).f_globals.get("__name__") not in _NOT_THE_SCORER:
                reads.add(name)
            return super().__getattribute__(name)

    fields = dict(vars(batch))
    fields["layers_GLCHW"] = batch.layers_GLCHW.clone()
    fields["targets_LCHW"] = None if batch.targets_LCHW is None else batch.targets_LCHW.clone()
    fields["inputs"] = tuple(image.clone() for image in batch.inputs)
    return Recording(**fields)


def _tensors(batch: RewardBatch) -> dict[str, Tensor]:
    """The batch's tensors by name, without leaving a trace in a recording batch."""
    fields = vars(batch)
    found = {f"batch.{name}": fields[name] for name in ("layers_GLCHW", "targets_LCHW") if fields[name] is not None}
    return found | {f"batch.inputs[{index}]": image for index, image in enumerate(fields["inputs"])}


def _unmet(batch: RewardBatch) -> set[str]:
    """Needs that no group of the batch's task can meet."""
    return set() if batch.inputs else {"inputs"}


def _merge(by_task: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """One finding per check: the worst over the tasks, which it names."""
    if not by_task:
        return [Finding("scores", "failed", "no task gives what it needs; drop a need or name other tasks")]
    merged = []
    for what, fine in CHECKS.items():
        found = {task: finding for task, findings in by_task.items() for finding in findings if finding.what == what}
        for status in ("failed", "warning"):
            bad = [task for task, finding in found.items() if finding.status == status]
            if bad:
                where = "every task" if len(bad) == len(by_task) > 1 else ", ".join(bad)
                # A scorer may leave some tasks to other terms; one that leaves all of them scores nothing.
                worst: Status = "failed" if what == "scores" and len(bad) == len(by_task) else found[bad[0]].status
                merged.append(Finding(what, worst, f"{where}: {found[bad[0]].detail}"))
                break
        else:
            if found:
                merged.append(Finding(what, "ok", fine + (f": {', '.join(found)}" if what == "scores" else "")))
    return merged


def _pickled(scorer: Scorer) -> Finding:
    try:
        pickle.dumps(scorer)
    except Exception as error:  # objects may raise anything here
        detail = f"cannot be pickled ({_name(error)}); a run builds it anew in every actor, so mend it only to send it"
        return Finding("pickle", "warning", detail)
    return Finding("pickle", "ok", "can be pickled")


def _ok(what: str) -> Finding:
    return Finding(what, "ok", CHECKS[what])


def _loaded(described: str | None = None) -> Finding:
    return Finding("loads", "ok", "found and built" + (f": {described}" if described else ""))


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _set_text(names: Sequence[str]) -> str:
    """A set of names as one would write it in Python."""
    return "{" + ", ".join(f'"{name}"' for name in names) + "}"
