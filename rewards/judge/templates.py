"""Prompt templates: a folder with ``protocols.yaml`` (how is asked) and one file per task (what is judged, and seen).

Two folders are shipped: ``vlm`` for models that read English and look at labelled sheets, ``small`` for the judge that
``omnialpha judge train`` makes. A folder of one's own is given by its path.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from common.config import StrictConfig, load_yaml, validate
from common.errors import ConfigError
from data.tasks import get_task

SHIPPED = Path(__file__).parent / "templates"
PROTOCOLS = "protocols.yaml"
FIELDS = ("prompt", "criteria", "labels", "likeness")
"""What a text may contain in braces."""

ProtocolName = Literal["pointwise", "pairwise", "grid"]

SOURCES = ("input", "mask", "foreground", "background", "all")
LOOKS = ("checker", "black", "white", "alpha")


class ProtocolTemplate(StrictConfig):
    """One way of asking."""

    text: str = Field(min_length=1)
    """The question; ``{prompt}``, ``{criteria}``, ``{labels}`` and ``{likeness}`` (:mod:`rewards.judge.likeness`) are
    filled in."""
    labels: tuple[str, ...] = Field(min_length=2)
    """Answers, each one token of the judge. Pointwise: worst to best. Pairwise: first, second, neither. Grid: one for
    each place."""


class ProtocolsConfig(StrictConfig):
    """``protocols.yaml``."""

    layout: Literal["sheet", "woven"]
    """``sheet``: one labelled picture per question. ``woven``: one picture per candidate, in which the four views take
    turns pixel by pixel (:func:`rewards.judge.pictures.woven`)."""
    side: int = Field(ge=16)
    """Side of a view in pixels."""
    pointwise: ProtocolTemplate
    """One candidate, rated."""
    pairwise: ProtocolTemplate
    """Two candidates, compared."""
    grid: ProtocolTemplate
    """A whole group, the best one named."""


class TaskTemplate(StrictConfig):
    """The file of one task."""

    criteria: str = Field(min_length=1)
    """What makes a result good."""
    views: tuple[str, ...] = Field(min_length=1)
    """What is shown of each candidate: ``SOURCE.LOOK``, as in ``foreground.checker``, or ``blank``."""


@dataclass(frozen=True)
class Templates:
    """A checked folder of templates."""

    folder: Path
    protocols: ProtocolsConfig
    tasks: dict[str, TaskTemplate]

    def task(self, name: str) -> TaskTemplate:
        """The template of a task.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.tasks:
            raise ConfigError(
                f"judge templates {self.folder}: no {name}.yaml; write one, or leave the task out of the judge's tasks"
            )
        return self.tasks[name]

    def protocol(self, name: ProtocolName) -> ProtocolTemplate:
        """How a protocol asks."""
        chosen: ProtocolTemplate = getattr(self.protocols, name)
        return chosen

    def tells_likeness(self, protocol: ProtocolName) -> bool:
        """Whether a protocol's text has the field ``{likeness}``, which somebody has to look for."""
        return any(field == "likeness" for _, field, _, _ in string.Formatter().parse(self.protocol(protocol).text))

    def text(
        self,
        protocol: ProtocolName,
        task: str,
        prompt: str,
        labels: Sequence[str] | None = None,
        likeness: Sequence[str] = ("-",),
    ) -> str:
        """The question's text; ``labels`` replaces the template's where only some of them are open."""
        template = self.protocol(protocol)
        named, alike = ", ".join(labels or template.labels), " ".join(likeness)
        criteria = self.task(task).criteria
        return template.text.format(prompt=prompt, criteria=criteria, labels=named, likeness=alike).strip()

    def check_labels(self, tokens: Callable[[str], int]) -> None:
        """Refuses labels that are not one token of the judge; comes before anything is asked.

        Args:
            tokens: number of tokens that a text has for the judge.

        Raises:
            ConfigError: names the file, the protocol and the label.
        """
        for name in ("pointwise", "pairwise", "grid"):
            for label in getattr(self.protocols, name).labels:
                if (count := tokens(label)) != 1:
                    raise ConfigError(
                        f"{self.folder / PROTOCOLS}: {name}.labels: {label!r} is {count} tokens for this judge, and "
                        "its answer is one; choose labels of one token, such as single digits or letters"
                    )


def load_templates(name: str | Path) -> Templates:
    """Templates that are shipped under ``name``, or those of a folder.

    Raises:
        ConfigError: no such folder, or something in it that does not fit; names the file.
    """
    folder = SHIPPED / name if (SHIPPED / name).is_dir() else Path(name).expanduser()
    if not (folder / PROTOCOLS).is_file():
        shipped = ", ".join(sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()))
        raise ConfigError(
            f"judge templates {str(name)!r}: no {PROTOCOLS} in {folder}; shipped ones: {shipped}; or give a folder"
        )
    protocols = validate(ProtocolsConfig, load_yaml(folder / PROTOCOLS), str(folder / PROTOCOLS))
    _check_protocols(protocols, folder / PROTOCOLS)
    tasks = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name != PROTOCOLS:
            tasks[path.stem] = _task_template(path, protocols)
    return Templates(folder, protocols, tasks)


def anchored(name: str) -> str:
    """A shipped name as it is, a folder by its absolute path: actors work in directories of their own."""
    return name if (SHIPPED / name).is_dir() else str(Path(name).expanduser().resolve())


def _check_protocols(protocols: ProtocolsConfig, path: Path) -> None:
    for name in ("pointwise", "pairwise", "grid"):
        template: ProtocolTemplate = getattr(protocols, name)
        _check_fields(template.text, f"{path}: {name}.text", FIELDS)
        if len(set(template.labels)) < len(template.labels):
            raise ConfigError(f"{path}: {name}.labels: a label occurs twice; answers must differ")
    if len(protocols.pairwise.labels) != 3:
        raise ConfigError(f"{path}: pairwise.labels: three are needed, for the first, the second and neither")


def _task_template(path: Path, protocols: ProtocolsConfig) -> TaskTemplate:
    template = validate(TaskTemplate, load_yaml(path), str(path))
    try:
        task = get_task(path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; the file's name is the task's") from None
    _check_fields(template.criteria, f"{path}: criteria", ())
    if protocols.layout == "woven" and len(template.views) != 4:
        raise ConfigError(f"{path}: views: layout woven takes turns between exactly 4, found {len(template.views)}")
    present = {
        "input": any(role != "mask" for role in task.inputs),
        "mask": "mask" in task.inputs,
        "foreground": bool(task.foregrounds),
        "background": bool(task.backgrounds),
        "all": True,
    }
    for view in template.views:
        source, _, look = view.partition(".")
        if view != "blank" and (source not in SOURCES or look not in LOOKS):
            raise ConfigError(
                f"{path}: views: {view!r} is not SOURCE.LOOK; sources: {', '.join(SOURCES)}; looks: {', '.join(LOOKS)}"
            )
        if view != "blank" and not present[source]:
            raise ConfigError(f"{path}: views: {view!r}: task {task.name} has no {source}")
    return template


def _check_fields(text: str, where: str, known: tuple[str, ...]) -> None:
    try:
        fields: list[Any] = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; a brace of its own is written twice, as in {{{{") from None
    for field in fields:
        if field not in known:
            may = f"known: {', '.join(known)}" if known else "fields are filled in by protocols.yaml alone"
            raise ConfigError(f"{where}: unknown field {{{field}}}; {may}")
