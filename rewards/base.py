"""The plug-in contract of a reward: what a scorer gets, what it may return, and how it is found.

A scorer is a plain function ``score(batch)`` or an object with that method. It returns G numbers, one per member
of the group, higher is better, as a list, tuple, NumPy array or tensor; an exception in a number's place says why there
is none. It may carry an attribute ``needs``, a
collection out of ``{"targets", "inputs", "prompt"}``: without them it is not called.

Whatever goes wrong inside a scorer becomes a *missing* score with a reason. It is never 0, because 0 is a judgement.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import operator
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, RewardError, UnansweredError
from data.tasks import get_task
from policy.group import GroupPixels
from rewards.credit import cells_of, without_unfit

NEEDS = frozenset({"targets", "inputs", "prompt"})

Scorer = Any
"""A callable ``(batch) -> G floats`` or an object with such a method ``score``; checked by :func:`scorer_needs`."""

Factory = TypeVar("Factory", bound=Callable[..., Any])
Shared = TypeVar("Shared")

_registry: dict[str, Callable[..., Any]] = {}

# Modules that register the shipped scorers. They import this one, so they are imported on first use and not above.
_SHIPPED = ("rewards.terms", "rewards.matting", "rewards.prompt", "rewards.judge.term")

ENTRY_POINTS = "omnialpha.rewards"
"""Group of entry points by which an installed package gives its scorers names."""


@dataclass(frozen=True, eq=False)
class RewardBatch:
    """One group of candidates for one prompt, decoded. All tensors lie on one device; scorers must not write to them.

    Raises:
        RewardError: a field breaks its contract.
    """

    task: str
    """Name in the task table (``data.tasks``)."""
    prompt: str
    """The instruction as the policy saw it; may be empty."""
    roles: tuple[str, ...]
    """Role of each of the L target layers, back to front: "background", "foreground" or "image"."""
    layers_GLCHW: Tensor
    """Decoded candidates: G members, L layers, straight-alpha RGBA (C = 4), float32 in [0, 1]."""
    targets_LCHW: Tensor | None = None
    """Truth in the same layout and size; None where no unique truth exists."""
    inputs: tuple[Tensor, ...] = ()
    """Conditioning images, each RGBA 4×H×W float32 in [0, 1]."""
    input_roles: tuple[str, ...] = ()
    """Role of each input: "image", "mask", "background" or "foreground"."""
    group: str = ""
    """Identifier of the group, for messages and logs."""

    def __post_init__(self) -> None:
        layers = self.layers_GLCHW
        if layers.ndim != 5 or layers.shape[2] != 4 or 0 in layers.shape:
            self._refuse("layers_GLCHW", f"has shape {tuple(layers.shape)}; pass (G, L, 4, H, W)")
        if layers.dtype != torch.float32:
            self._refuse("layers_GLCHW", f"is {layers.dtype}; convert the decoded layers to float32")
        if len(self.roles) != layers.shape[1]:
            self._refuse("roles", f"has {len(self.roles)} entries for {layers.shape[1]} layers; name each layer's role")
        if self.targets_LCHW is not None and self.targets_LCHW.shape != layers.shape[1:]:
            shape, expected = tuple(self.targets_LCHW.shape), tuple(layers.shape[1:])
            self._refuse("targets_LCHW", f"has shape {shape}, the layers need {expected}; resize or reorder the truth")
        for index, image in enumerate(self.inputs):
            if image.ndim != 3 or image.shape[0] != 4:
                self._refuse(f"inputs[{index}]", f"has shape {tuple(image.shape)}; pass RGBA (4, H, W)")
        if len(self.input_roles) != len(self.inputs):
            self._refuse("input_roles", f"has {len(self.input_roles)} entries for {len(self.inputs)} inputs")

    def _refuse(self, field: str, problem: str) -> None:
        raise RewardError(f"reward batch of group {self.group!r}, task {self.task!r}: {field} {problem}")

    def __getstate__(self) -> dict[str, Any]:
        # What was shared is cheaper made again than sent.
        return {name: value for name, value in vars(self).items() if name != "_shared"}

    def shared(self, name: str, make: Callable[[], Shared]) -> Shared:
        """``make()``, called once per group: whichever term asks first for ``name`` pays for all of them.

        For what several terms need of one group, such as its blends. Terms that ask at the same time in several
        threads may both make it. What it returns must not be written to.
        """
        made = vars(self).setdefault("_shared", {})  # frozen is the batch, not what is derived from it
        if name not in made:
            made[name] = make()
        return made[name]

    @property
    def members(self) -> int:
        """G, the number of candidates."""
        return self.layers_GLCHW.shape[0]

    @property
    def foregrounds(self) -> tuple[int, ...]:
        """Indices of the foreground layers."""
        return tuple(index for index, role in enumerate(self.roles) if role == "foreground")

    @property
    def backgrounds(self) -> tuple[int, ...]:
        """Indices of the background layers."""
        return tuple(index for index, role in enumerate(self.roles) if role == "background")


def reward_batch(pixels: GroupPixels, device: torch.device | str = "cpu") -> RewardBatch:
    """A decoded group as scorers see it, on the device that they compute on."""
    task = get_task(pixels.task)

    def there(image: np.ndarray) -> torch.Tensor:
        return torch.tensor(image).to(device)

    return RewardBatch(
        task=pixels.task,
        prompt=pixels.prompt,
        roles=task.targets,
        layers_GLCHW=there(pixels.layers_GLCHW),
        targets_LCHW=there(pixels.targets_LCHW),
        inputs=tuple(there(image) for image in pixels.inputs),
        input_roles=task.inputs,
        group=pixels.name,
    )


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one scorer for one group."""

    name: str
    values_G: np.ndarray
    """float64; NaN where the score is missing."""
    reasons: tuple[str | None, ...]
    """Why a member's score is missing; None where it is present."""
    seconds: float = 0.0
    """Time that the scorer took."""
    cells_GLhw: np.ndarray | None = None
    """What each cell of each layer contributed, where that was asked for and the scorer says it."""


def scorer_needs(scorer: Scorer) -> frozenset[str]:
    """Reads ``scorer.needs`` and checks that the scorer can be called at all.

    Raises:
        RewardError: not callable, or ``needs`` is not a collection of known names.
    """
    if not callable(_entry(scorer)):
        raise RewardError(
            f"{scorer!r} is not a scorer: write a function score(batch) that returns one number per member, "
            "or an object with that method"
        )
    declared = getattr(scorer, "needs", ())
    hint = f"write for example needs = {{'targets'}}, out of {', '.join(sorted(NEEDS))}"
    if not isinstance(declared, (set, frozenset, list, tuple)):
        raise RewardError(f"needs of {scorer!r} is {declared!r}, not a set; {hint}")
    if unknown := [need for need in declared if need not in NEEDS]:
        raise RewardError(f"needs of {scorer!r} names {unknown[0]!r}, which no batch has; {hint}")
    return frozenset(declared)


def describe(scorer: Scorer) -> str | None:
    """What a scorer says of itself beyond its name, such as the network it judges with: its attribute ``describes``."""
    described = getattr(scorer, "describes", None)
    return described if isinstance(described, str) else None


def check_group_size(name: str, scorer: Scorer, members: int) -> None:
    """Refuses a run whose groups are larger than a scorer takes: its attribute ``largest_group``, None for any size.

    Raises:
        ConfigError: names the term and both sizes.
    """
    largest = getattr(scorer, "largest_group", None)
    if isinstance(largest, int) and members > largest:
        raise ConfigError(
            f"rewards: term {name!r} scores groups of at most {largest}, and grpo.group is {members}; lower grpo.group "
            "or change the term's params"
        )


def run_scorer(name: str, scorer: Scorer, batch: RewardBatch, cells: int | None = None) -> Scores:
    """Runs ``scorer`` and turns whatever it does into G scores, each present and finite or missing with a reason.
    With ``cells`` also asks it which part of an image contributed what, on a grid of so many cells.

    An exception, an unmet need, None, a wrong type or a wrong length makes all G scores missing; None or a
    non-finite or non-numeric entry makes that member's score missing.

    Raises:
        RewardError: the object is not a scorer (:func:`scorer_needs`); nothing that a scorer does while scoring.
        UnansweredError: a judge said nothing for as long as the run waits for it.
    """
    present = {"targets": batch.targets_LCHW is not None, "inputs": bool(batch.inputs), "prompt": bool(batch.prompt)}
    if unmet := sorted(need for need in scorer_needs(scorer) if not present[need]):
        reason = f"needs {', '.join(unmet)}, which task {batch.task!r} did not provide"
        return missing_scores(name, batch.members, reason)
    began = time.perf_counter()
    try:
        with torch.no_grad():
            returned = _entry(scorer)(batch)
            credit = cells_of(scorer, batch, cells) if cells else None
    except UnansweredError:
        raise
    except Exception as error:  # a plug-in may raise anything, and none of it may cost the group its other terms
        return missing_scores(name, batch.members, _describe(error), time.perf_counter() - began)
    seconds = time.perf_counter() - began
    values = _entries(returned)
    if values is None:
        reason = f"returned {_shape_of(returned)}, expected a flat sequence of {batch.members} numbers"
        return missing_scores(name, batch.members, reason, seconds)
    if len(values) != batch.members:
        reason = f"returned {len(values)} values for {batch.members} members"
        return missing_scores(name, batch.members, reason, seconds)
    checked = [_check(value) for value in values]
    if credit is not None:
        checked = without_unfit(checked, credit)
    scores_G, reasons = np.array([value for value, _ in checked]), tuple(reason for _, reason in checked)
    return Scores(name, scores_G, reasons, seconds, credit)


def missing_scores(name: str, members: int, reason: str, seconds: float = 0.0) -> Scores:
    """A group that a scorer has no score for."""
    return Scores(name, np.full(members, np.nan), (reason,) * members, seconds)


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator that makes a scorer class or scoring function available to :func:`build` as ``name``.

    Raises:
        ConfigError: the name is taken.
    """

    def add(thing: Factory) -> Factory:
        if name in _registry:
            raise ConfigError(f"a scorer named {name!r} is already registered; choose another name")
        _registry[name] = thing
        return thing

    return add


def registered() -> tuple[str, ...]:
    """Names of all scorers, sorted: registered ones and the entry points of installed packages."""
    unavailable()
    return tuple(sorted({*_registry, *(point.name for point in _entry_points())}))


def unavailable() -> dict[str, str]:
    """Shipped modules that lack something they import, and why; imports all the others."""
    missing = {}
    for module in _SHIPPED:
        try:
            importlib.import_module(module)
        except ImportError as error:  # of an optional dependency; anything else is a bug that has to show
            missing[module] = _import_failure(error)
    return missing


def build(name: str, params: Mapping[str, Any] | None = None) -> Scorer:
    """Makes a scorer from what :func:`find` finds.

    A class is called with ``params``; a function gets ``params`` as keyword arguments beside the batch; an object
    with a ``score`` method is used as it is.

    Raises:
        ConfigError: nothing of that name, code that cannot be imported, params that do not fit, a failing constructor.
        RewardError: what was found is not a scorer.
    """
    thing = find(name)
    keywords = dict(params or {})
    if inspect.isclass(thing):
        _check_params(name, thing, (), keywords)
        try:
            scorer = thing(**keywords)
        except Exception as error:  # whatever a user's constructor raises
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"reward {name!r} cannot be built ({what}); mend its params or its constructor"
            ) from error
    elif not callable(getattr(thing, "score", None)) and callable(thing) and keywords:
        _check_params(name, thing, (None,), keywords)
        # update_wrapper carries `needs` from the function over to the partial.
        scorer = functools.update_wrapper(functools.partial(thing, **keywords), thing)
    elif keywords:
        raise ConfigError(f"reward {name!r} is a ready object and takes no params; remove {', '.join(keywords)}")
    else:
        scorer = thing
    scorer_needs(scorer)
    return scorer


def find(name: str) -> Any:
    """The class, function or object behind a name, in this order: registered name, entry point of an installed
    package, ``module:attribute``, ``path/to/file.py:attribute``. A name with a colon is one of the last two.

    Raises:
        ConfigError: nothing of that name, or code that cannot be imported.
    """
    source, attribute = _split(name)
    if not attribute:
        return _find_name(name)
    module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    try:
        return operator.attrgetter(attribute)(module)
    except AttributeError:
        public = ", ".join(key for key in vars(module) if not key.startswith("_")) or "nothing"
        raise ConfigError(f"reward {name!r}: {source} has no {attribute!r}; it defines: {public}") from None


def is_shipped(name: str) -> bool:
    """Whether a scorer is one of this project's, so that its code is known to behave. Runs nobody else's code."""
    module, separator, _ = name.rpartition(":")
    if separator:
        return module in _SHIPPED
    unavailable()
    return name in _registry


def check_source(name: str) -> None:
    """What can be said of a scorer's source without running its code: its name is known, or its file is there.

    Raises:
        ConfigError: otherwise.
    """
    source, attribute = _split(name)
    if not attribute and name not in registered():
        raise _unknown(name)
    if attribute and source.endswith(".py"):
        _read(Path(source))


def _split(name: str) -> tuple[str, str]:
    """(module or file, attribute); of a plain name the attribute is empty."""
    source, separator, attribute = name.rpartition(":")
    if not separator:
        return name, ""
    if not source or not attribute:
        raise ConfigError(f"reward {name!r} is not of the form module:attribute or path/to/file.py:attribute")
    return source, attribute


def _entry(scorer: Scorer) -> Any:
    return getattr(scorer, "score", scorer)


def _describe(error: Exception) -> str:
    # The frame below run_scorer is the scorer's own; deeper ones are often inside torch and tell its author little.
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[1].filename).name}:{frames[1].lineno}" if len(frames) > 1 else ""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}{place}: {text}"


def _entries(returned: Any) -> Sequence[Any] | None:
    if isinstance(returned, Tensor):
        return returned.detach().cpu().tolist() if returned.ndim == 1 else None
    if isinstance(returned, np.ndarray):
        return returned.tolist() if returned.ndim == 1 else None
    return returned if isinstance(returned, (list, tuple)) else None


def _shape_of(returned: Any) -> str:
    if isinstance(returned, (Tensor, np.ndarray)):
        return f"an array of shape {tuple(returned.shape)}"
    return "None" if returned is None else f"a {type(returned).__name__}"


def _check(value: Any) -> tuple[float, str | None]:
    if value is None:
        return math.nan, "returned None for this member"
    if isinstance(value, Exception):
        return math.nan, str(value) or type(value).__name__
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        return math.nan, f"returned a {type(value).__name__} for this member, not a number"
    return (number, None) if math.isfinite(number) else (math.nan, f"returned {number} for this member")


def _check_params(name: str, thing: Callable[..., Any], leading: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(thing)
    except ValueError:  # some builtins do not tell
        return
    try:
        signature.bind(*leading, **keywords)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[len(leading) :]) or "none"
        raise ConfigError(f"reward {name!r}: params do not fit: {error}; it takes: {known}") from None


def _find_name(name: str) -> Any:
    unavailable()
    if name in _registry:
        return _registry[name]
    # A package that is found twice, as an editable one may be, is no second one.
    if points := {point.value: point for point in _entry_points() if point.name == name}:
        if len(points) > 1:
            raise ConfigError(
                f"reward {name!r} is declared by several installed packages: {', '.join(sorted(points))}; "
                "uninstall one, or name the code you mean in 'scorer'"
            )
        return _load(next(iter(points.values())))
    raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    missing, known = unavailable(), registered()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    absent = "".join(f"; not available here: {module} ({reason})" for module, reason in missing.items())
    return ConfigError(
        f"no reward named {name!r}; {hint}registered: {', '.join(known)}{absent}; "
        "your own: module:attribute or path/to/file.py:attribute"
    )


def _entry_points() -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=ENTRY_POINTS)


def _load(point: importlib.metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # importing runs foreign code, which may raise anything
        package = point.dist.name if point.dist else "of unknown name"
        raise ConfigError(
            f"reward {point.name!r} of the installed package {package} cannot be loaded from {point.value!r} "
            f"({_import_failure(error)}); mend that package or install what it lacks"
        ) from error


def _import_module(source: str) -> Any:
    try:
        return importlib.import_module(source)
    except Exception as error:  # importing runs foreign code, which may raise anything
        raise ConfigError(
            f"reward module {source!r} cannot be imported ({_import_failure(error)}); "
            "install it on this machine, mend it, or give a file as path/to/file.py:attribute"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"reward file {path.absolute()} cannot be read ({error.strerror}); give its path on this machine"
        ) from None


def _import_file(path: Path) -> Any:
    code = _read(path)
    # A private name keeps a user's data.py or rewards.py from shadowing ours. The content is part of it, so that an
    # edited file is loaded anew, and two attributes of one file share one module.
    digest = hashlib.sha256(str(path.resolve()).encode() + code).hexdigest()[:16]
    module_name = f"_omnialpha_reward_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up here while it is being made
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # importing runs foreign code, which may raise anything
        del sys.modules[module_name]
        raise ConfigError(f"reward file {path} fails on import ({_import_failure(error)}); mend it") from error
    return module


def _import_failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
