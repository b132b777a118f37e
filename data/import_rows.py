"""What is written about the examples of other people's data, before any pixel is read: JSONL lines and plain folders.

Both become :class:`Row`. A row at fault raises one :class:`DataError` that names file, row and field and says what to
do; the importer (:mod:`data.importer`) decides whether that ends the import.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError
from data.tasks import TASKS, Task

LONGEST_LINE = 2**20
"""Bytes of the longest JSONL line that is read; such a file is not OmniAlpha's."""
TEXT_FIELDS = ("task", "caption", "group", "licence")
USED_FIELDS = ("id", "prompt", "input_images", "output_images", "begin_with_bg", *TEXT_FIELDS)
ROLES = ("image", "mask", "background", "foreground")
"""Names of the image files in a record's folder; each says the file's role."""
LAYOUT = "a source folder holds one folder per record with prompt.txt and image, mask, background, foreground as PNG"

_SPEC_KEYS = ("task", "split")


@dataclass(frozen=True)
class Source:
    """A JSONL file or a folder of records, and what holds for all of its rows."""

    path: Path
    task: str | None = None
    """Task of rows that do not name theirs; None infers it from the roles."""
    split: str | None = None
    """Split of all rows; None draws it by group."""

    @property
    def kind(self) -> str:
        """``jsonl`` or ``folder``."""
        return "folder" if self.path.is_dir() else "jsonl"


@dataclass(frozen=True)
class Row:
    """One example as its source describes it; its images are not read yet."""

    where: str
    """File and line, or the record's folder."""
    id: str
    prompt: str
    task: Task
    images: tuple[tuple[str, Path], ...]
    """Field and file of every input, then of every target, in the order of the task's roles."""
    caption: str
    group: str | None
    """Rows of a group stay in one split; None groups rows that share an image file."""
    licence: str | None


def parse_source(text: str, task: str | None = None, split: str | None = None) -> Source:
    """Reads ``PATH[,task=NAME][,split=NAME]``; what the text leaves out is as given.

    Raises:
        ConfigError: no such path, neither a .jsonl file nor a folder, or an unknown task or split.
    """
    settings: dict[str, str | None] = {"task": task, "split": split}
    path = text
    while not Path(path).exists() and "," in path:
        path, _, setting = path.rpartition(",")
        key, equals, value = setting.partition("=")
        if key not in _SPEC_KEYS or not equals:
            raise ConfigError(f"source {text!r}: no such file, and {setting!r} is none of ,task=NAME ,split=NAME")
        settings[key] = value
    if settings["task"] is not None and settings["task"] not in TASKS:
        raise ConfigError(f"source {text!r}: unknown task {settings['task']!r}; known tasks: {', '.join(TASKS)}")
    if settings["split"] not in (None, "train", "val", "test"):
        raise ConfigError(f"source {text!r}: unknown split {settings['split']!r}; splits are train, val and test")
    if not Path(path).exists():
        raise ConfigError(f"{path}: no such file or folder; name a .jsonl file or a folder of records")
    if not Path(path).is_dir() and Path(path).suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigError(
            f"{path}: not a .jsonl file; name a file with one JSON object per line, or a folder: {LAYOUT}"
        )
    return Source(Path(path), settings["task"], settings["split"])


def entries(source: Source) -> Iterator[tuple[str, bytes | Path]]:
    """Where each row of a source stands, and its line or folder; lines in their order, folders by name.

    Raises:
        DataError: the source cannot be read, or holds no rows.
    """
    found = False
    try:
        for entry in _folders(source.path) if source.kind == "folder" else _lines(source.path):
            found = True
            yield entry
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror or error}); check the path") from None
    if not found:
        raise DataError(f"{source.path}: holds no rows; {LAYOUT}, a .jsonl file one JSON object per line")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as handle:
        number = 0
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            whole = line
            while len(whole) > LONGEST_LINE and not whole.endswith(b"\n"):
                whole = handle.readline(LONGEST_LINE + 1)  # the rest of a line that is not kept
            if line.strip():
                yield f"{path} line {number}", line


def _folders(path: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            yield str(folder), folder


def parse_line(where: str, line: bytes, source: Source, begin_with_bg: bool | None, allow_outside: bool) -> Row:
    """A row of OmniAlpha's JSONL: id, prompt, input_images, output_images, and optionally begin_with_bg.

    Our own optional fields are task, caption, group and licence; other fields are ignored.

    Args:
        begin_with_bg: whether the first output is the background, for rows that do not say.
        allow_outside: whether image paths may leave the folder of the JSONL file.

    Raises:
        DataError: a fault of the row.
    """
    if len(line) > LONGEST_LINE:
        raise DataError(f"{where}: longer than {LONGEST_LINE} bytes; one line holds one row of texts and paths")
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}); one line holds one JSON object in UTF-8") from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: {type(values).__name__} instead of a JSON object; write one {{…}} per line")
    name = values.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        raise DataError(f"{where}, field id: {_shown(name)}; every row needs an id, a text or a whole number")
    _storable({"id": name, **{field: values.get(field) for field in ("prompt", *TEXT_FIELDS)}}, where)
    prompt = values.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}, field prompt: {_shown(prompt)}; every row needs an instruction as text")
    texts = {}
    for field in TEXT_FIELDS:
        texts[field] = values.get(field)
        if not isinstance(texts[field], str | None) or texts[field] == "":
            raise DataError(f"{where}, field {field}: {_shown(texts[field])}; give a text or leave the field out")
    flag = values.get("begin_with_bg")
    if not isinstance(flag, bool | None):
        raise DataError(f"{where}, field begin_with_bg: {_shown(flag)}; must be true or false")
    folder = source.path.parent
    inputs = _paths(values.get("input_images", []), f"{where}, field input_images", folder, allow_outside)
    targets = _paths(values.get("output_images"), f"{where}, field output_images", folder, allow_outside)
    if not targets:
        raise DataError(f"{where}, field output_images: empty; every row needs at least one target image")
    flag = begin_with_bg if flag is None else flag
    task = _task_by_counts(texts["task"] or source.task, len(inputs), len(targets), flag, where)
    images = [(f"input_images[{k}]", path) for k, path in enumerate(inputs)]
    images += [(f"output_images[{k}]", path) for k, path in enumerate(targets)]
    return Row(where, str(name), prompt, task, tuple(images), texts["caption"] or "", texts["group"], texts["licence"])


def parse_folder(where: str, folder: Path, source: Source) -> Row:
    """A record's folder: images named by their role, ``prompt.txt``, and optionally caption, group and licence as .txt.

    The folder's name is the id. Other files are ignored.

    Raises:
        DataError: a fault of the record.
    """
    files: dict[str, Path] = {}
    texts: dict[str, str | None] = dict.fromkeys(("prompt", *TEXT_FIELDS))
    try:
        present = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        for path in present:
            if path.suffix.lower() == ".txt":
                if path.stem in texts:
                    texts[path.stem] = path.read_bytes()[:LONGEST_LINE].decode("utf-8-sig").strip()
            elif path.stem in files:
                raise DataError(
                    f"{where}, file {path.name}: the role {path.stem} is there twice, also as {files[path.stem].name}; "
                    "keep one of them"
                )
            elif path.stem in ROLES:
                files[path.stem] = path
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: a text file is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror or error}); check its permissions") from None
    _storable({"id": folder.name}, where)
    if not texts["prompt"]:
        raise DataError(f"{where}, file prompt.txt: missing or empty; write the record's instruction to it")
    named = texts["task"] or source.task
    fitting = [task for task in TASKS.values() if set(task.inputs + task.targets) == set(files)]
    task = _chosen(named, fitting, where, f"images {list(files) or 'of no role'}", "file task.txt")
    images = tuple((f"file {files[role].name}", files[role]) for role in task.inputs + task.targets)
    return Row(
        where, folder.name, texts["prompt"], task, images, texts["caption"] or "", texts["group"], texts["licence"]
    )


def _task_by_counts(named: str | None, inputs: int, targets: int, begins: bool | None, where: str) -> Task:
    fitting = [
        task
        for task in TASKS.values()
        if (len(task.inputs), len(task.targets)) == (inputs, targets)
        and (begins is None or begins == (task.targets[0] != "foreground"))
    ]
    first = {None: "", True: ", the first output opaque", False: ", the first output a foreground"}[begins]
    return _chosen(named, fitting, where, f"{inputs} inputs and {targets} outputs{first}", "field task")


def _chosen(named: str | None, fitting: list[Task], where: str, found: str, field: str) -> Task:
    """The named task if it fits, or the only one that does."""
    if named is not None:
        if named not in TASKS:
            raise DataError(f"{where}, {field}: unknown task {named!r}; known tasks: {', '.join(TASKS)}")
        task = TASKS[named]
        if task not in fitting:
            raise DataError(
                f"{where}, {field}: task {named} needs inputs {list(task.inputs)} and targets {list(task.targets)}, "
                f"found {found}; correct the row or name another task"
            )
        return task
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " or ".join(task.name for task in fitting)
        raise DataError(f"{where}, {field}: {found} may be {names}; say which with --task, or in the row's task")
    known = "; ".join(f"{t.name}: {[*t.inputs]} to {[*t.targets]}" for t in TASKS.values())
    raise DataError(f"{where}, {field}: no task has {found}; there are {known}")


def _paths(value: Any, where: str, folder: Path, allow_outside: bool) -> list[Path]:
    """Files of a list of paths; relative ones start at the folder of the JSONL file."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise DataError(f"{where}: {_shown(value)}; must be a list of file paths")
    paths, home = [], folder.resolve()
    for k, item in enumerate(value):
        try:
            path = (folder / item).resolve()
            there = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a ring
            raise DataError(f"{where}[{k}]: {_shown(item)} is no path ({error}); name an image file") from None
        if not allow_outside and not path.is_relative_to(home):
            raise DataError(
                f"{where}[{k}]: {_shown(item)} lies outside the folder of the JSONL file; "
                "move the image there, or pass --allow-outside if you trust this file"
            )
        if not there:
            raise DataError(f"{where}[{k}]: {_shown(item)}: no such file in {folder}; correct the path")
        paths.append(path)
    return paths


def _storable(texts: dict[str, Any], where: str) -> None:
    """Refuses half characters, which JSON and file names may hold and UTF-8 may not."""
    for field, text in texts.items():
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError(f"{where}, field {field}: {ascii(text)[:80]} is no valid Unicode; write it in UTF-8")


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
