"""The task table: adding a task to the system touches this file alone.

A task says which roles its inputs and targets play, how its instruction is phrased, and which reward terms
judge it (Table 1 of arXiv 2511.20211 v2; mask-conditioned matting and the two completions are from v1). Targets are
listed back to front.
"""

import re
from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigError

TargetRole = Literal["background", "foreground", "image"]
InputRole = Literal["image", "mask", "background", "foreground"]


@dataclass(frozen=True)
class Task:
    """One transparency task."""

    name: str
    inputs: tuple[InputRole, ...]
    """Role of each input image, in order."""
    targets: tuple[TargetRole, ...]
    """Role of each output layer, back to front."""
    instructions: tuple[str, ...]
    """Paraphrases of the instruction; ``{caption}`` is replaced by the object's name where it occurs."""
    rewards: tuple[str, ...]
    """Reward terms active for the task; empty where no unique truth exists."""

    @property
    def foregrounds(self) -> tuple[int, ...]:
        """Indices of the foreground layers."""
        return tuple(i for i, role in enumerate(self.targets) if role == "foreground")

    @property
    def backgrounds(self) -> tuple[int, ...]:
        """Indices of the background layers."""
        return tuple(i for i, role in enumerate(self.targets) if role == "background")

    @property
    def names_object(self) -> bool:
        """Whether instructions say which object is meant."""
        return any("{caption}" in instruction for instruction in self.instructions)

    @property
    def images(self) -> int:
        """Number of images in the sequence: targets and inputs."""
        return len(self.inputs) + len(self.targets)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "text_to_rgba",
            (),
            ("foreground",),
            ("Draw {caption} on a transparent background.", "A transparent RGBA image of {caption}."),
            (),
        ),
        Task(
            "automatic_matting",
            ("image",),
            ("foreground",),
            ("Cut out the foreground with an accurate alpha channel.", "Matte this image and keep the foreground."),
            ("layer", "boundary"),
        ),
        Task(
            "referring_matting",
            ("image",),
            ("foreground",),
            ("Cut out {caption}.", "Extract {caption} with its transparency."),
            ("layer", "boundary"),
        ),
        Task(
            "mask_matting",
            ("image", "mask"),
            ("foreground",),
            ("Cut out the object that the mask marks.", "Matte the masked object."),
            ("layer", "boundary"),
        ),
        Task(
            "object_removal",
            ("image", "mask"),
            ("background",),
            ("Remove the masked object and restore the scene behind it.", "Erase what the mask covers."),
            ("layer", "background"),
        ),
        Task(
            "layer_decomposition",
            ("image",),
            ("background", "foreground"),
            ("Split this image into a complete background and its foreground.", "Decompose the image into layers."),
            ("layer", "composition", "background", "boundary"),
        ),
        Task(
            "foreground_to_image",
            ("foreground",),
            ("image",),
            ("Complete the picture round {caption}.", "Paint a scene behind {caption}."),
            (),
        ),
        Task(
            "background_to_image",
            ("background",),
            ("image",),
            ("Add {caption} to this scene.", "Complete this background with {caption}."),
            (),
        ),
    )
}


def get_task(name: str) -> Task:
    """Looks a task up.

    Raises:
        ConfigError: the name is unknown; the message lists the known ones.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}") from None


def named_object(task: str, prompt: str) -> str | None:
    """What a prompt calls the object: the part of it that stands for ``{caption}`` in an instruction of the task.

    Returns:
        The caption; None where the prompt is an instruction of the task without one; the whole prompt where it is
        none of the task's instructions, as a person's own may be.

    Raises:
        ConfigError: no such task.
    """
    for instruction in get_task(task).instructions:
        before, caption, after = instruction.partition("{caption}")
        if match := re.fullmatch(re.escape(before) + ("(.+)" if caption else "") + re.escape(after), prompt.strip()):
            return match[1] if caption else None
    return prompt
