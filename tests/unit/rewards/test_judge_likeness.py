"""What a judge is told of the object beside the pictures: digits of a classifier's nearness, in the order shown."""

from dataclasses import replace

import numpy as np
import pytest

from data.records import RecordDataset
from rewards.judge.examples import Examples, Spoilt
from rewards.judge.likeness import STEP, as_of_new_objects, likeness
from rewards.judge.protocols import question
from rewards.judge.templates import load_templates
from rewards.prompt import PromptFidelity


@pytest.fixture
def group(real_dataset):
    """A named object, whole, faded and gone."""
    examples = Examples(RecordDataset(real_dataset, "train"))
    index = next(int(k) for k in examples.data.positions("referring_matting") if examples.names_object(int(k)))
    return examples.group(index, [Spoilt("blank_layer", grade, 0) for grade in (0, 2, 4)], seed=0)


def test_each_candidate_has_the_digit_of_its_own_nearness(group):
    expected = [str(int(np.clip(score / STEP, 0, 9))) for score in PromptFidelity().score(group).tolist()]
    assert list(likeness(group)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("protocol", ["pairwise", "grid"])
def test_the_digits_of_a_question_stand_in_the_order_of_its_pictures(group, protocol):
    templates, digits = load_templates("small"), likeness(group)
    for order in ((0, 2), (2, 0)):
        assert f"= {digits[order[0]]} {digits[order[1]]} " in question(templates, protocol, group, order).text


@pytest.mark.parametrize("prompt", ["Matte this image and keep the foreground.", "in a person's own words"])
def test_a_prompt_that_names_nothing_has_no_likeness(group, prompt):
    unnamed = replace(group, task="automatic_matting", prompt=prompt)
    assert likeness(unnamed) == ("-", "-", "-")
    assert "= - grade" in question(load_templates("small"), "pointwise", unnamed, [0]).text


def test_templates_that_do_not_tell_a_likeness_do_not_look_for_one(group):
    question(load_templates("vlm"), "pointwise", group, [0])
    assert not vars(group).get("_shared")


def test_likeness_in_training_follows_from_the_seed_and_varies_as_that_of_new_objects(group):
    def told(seed):
        return likeness(as_of_new_objects(replace(group), seed))

    assert told(1) == told(1)
    digits = np.array([[int(digit) for digit in told(seed)] for seed in range(200)])
    fitted = float(PromptFidelity().score(group)[0])
    assert 1 < digits[:, 0].std() < 2.5  # a deviation of .08 in steps of .04, cut off at both ends
    assert digits.mean() < fitted / STEP  # an object that the map was fitted to seems nearer than new ones do
