"""The task table, read as the rewards read it."""

import pytest

from common.errors import ConfigError
from data.tasks import TASKS, named_object


@pytest.mark.parametrize("task", TASKS)
def test_the_object_of_an_instruction_is_found_again(task):
    for instruction in TASKS[task].instructions:
        expected = "a red apple (half)" if "{caption}" in instruction else None
        assert named_object(task, instruction.format(caption="a red apple (half)")) == expected


def test_a_prompt_of_ones_own_names_its_object_as_a_whole():
    assert named_object("referring_matting", "the left dog") == "the left dog"
    assert named_object("automatic_matting", "Please cut out the dog.") == "Please cut out the dog."


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="known tasks"):
        named_object("mating", "Cut out a dog.")


@pytest.mark.parametrize("task", TASKS)
def test_terms_of_a_layer_are_active_only_where_the_task_has_it(task):
    entry = TASKS[task]
    assert ("boundary" in entry.rewards) <= bool(entry.foregrounds)
    assert ("background" in entry.rewards) == bool(entry.backgrounds)
    assert ("composition" in entry.rewards) == bool(entry.backgrounds and entry.foregrounds)
