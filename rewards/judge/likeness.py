"""What a judge that cannot tell a cat from a car is told beside the pictures: how near they are to the object named.

A template asks for it by the field ``{likeness}``: one digit per candidate, 0 to 9, in the order shown, from the
nearness of what EfficientNet-Lite0 sees to the words of the prompt (:class:`rewards.prompt.PromptFidelity` with the map
that comes with the package); ``-`` where the prompt names no object.
"""

from dataclasses import replace

import numpy as np

from data.seeding import seed_for
from data.tasks import get_task, named_object
from rewards.base import RewardBatch
from rewards.prompt import load_fidelity, nearness
from rewards.words import load_words

STEP = 0.04
"""Nearness from one digit to the next; held-out objects reach .1 to .35 under their own name, 0 to .2 under another."""
NOTHING_NAMED = "-"

# The shipped map flatters the objects that it was fitted to: nearness to the own name has mean .36 and deviation .09 on
# them, .21 and .08 on others; to another object's name .09 and .07, against .11 and .08 (80 records each of
# text-to-RGBA and referring matting). This line and this noise take the first two to the second two. How much of the
# noise members share is a guess.
SHRINK, SHIFT = 0.37, 0.077
NOISE_OF_RECORD, NOISE_OF_MEMBER = 0.067, 0.03


def prepare() -> None:
    """Loads what :func:`likeness` looks with.

    Raises:
        ConfigError: something of it is missing.
    """
    load_fidelity()
    load_words()


def likeness(batch: RewardBatch) -> tuple[str, ...]:
    """A digit, or :data:`NOTHING_NAMED`, for each of the G members."""

    def look() -> tuple[str, ...]:
        if (wanted := _wanted(batch)) is None:
            return (NOTHING_NAMED,) * batch.members
        return tuple(map(digit, nearness(batch, wanted, load_words()).tolist()))

    return batch.shared("likeness to the named object", look)


def simulated_likeness(batch: RewardBatch, seed: int) -> tuple[str, ...]:
    """For training on the objects that the shipped map was fitted to: digits as whole objects have that are new to it.

    Only the truth is looked at, once for all members. That damage lowers a likeness is left out: what damage looks
    like the judge sees.
    """
    if (wanted := _wanted(batch)) is None:
        return (NOTHING_NAMED,) * batch.members
    assert batch.targets_LCHW is not None
    truth = replace(batch, layers_GLCHW=batch.targets_LCHW[None])
    rng = np.random.Generator(np.random.PCG64(seed_for(seed, "likeness")))
    near = float(nearness(truth, wanted, load_words())) * SHRINK + SHIFT + NOISE_OF_RECORD * rng.standard_normal()
    return tuple(map(digit, near + NOISE_OF_MEMBER * rng.standard_normal(batch.members)))


def digit(near: float) -> str:
    """Of a nearness in [−1, 1]."""
    return str(int(np.clip(near / STEP, 0, 9)))


def _wanted(batch: RewardBatch) -> str | None:
    """The object that the prompt names. Of a task whose instructions name none, no prompt does: it says what to do."""
    return named_object(batch.task, batch.prompt) if get_task(batch.task).names_object else None
