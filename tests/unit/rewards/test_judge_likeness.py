"""What a judge is told of the object beside the pictures: digits of a classifier's nearness, in the order shown."""

from dataclasses import replace

import numpy as np
import pytest

from data.records import RecordDataset
from rewards.judge.examples import Examples, Spoilt, draw_examples
from rewards.judge.likeness import (
    NOISE_OF_MEMBER,
    NOISE_OF_RECORD,
    SHIFT,
    SHRINK,
    STEP,
    digit,
    likeness,
    simulated_likeness,
)
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
    assert list(likeness(group)) == [digit(score) for score in PromptFidelity().score(group).tolist()]


def test_digits_count_steps_of_nearness_and_end_at_nine():
    assert [digit(near) for near in (-1, 0.039, 0.041, 0.359, 0.361, 1)] == ["0", "0", "1", "8", "9", "9"]


@pytest.mark.parametrize("protocol", ["pairwise", "grid"])
def test_the_digits_of_a_question_stand_in_the_order_of_its_pictures(group, protocol):
    templates, digits = load_templates("small"), likeness(group)
    assert digits[0] != digits[2]
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


def test_in_training_the_likeness_is_that_of_an_object_that_the_map_has_not_seen(group):
    assert simulated_likeness(group, 1) == simulated_likeness(group, 1)
    fitted = float(PromptFidelity().score(group)[0])
    digits = np.array([[int(d) for d in simulated_likeness(group, seed)] for seed in range(400)])
    expected = (fitted * SHRINK + SHIFT) / STEP - 0.5  # digits are rounded down
    assert 3 < expected < 6, "far from both ends, where digits are cut off"
    assert np.abs(digits.mean(axis=0) - expected).max() < 0.35
    assert digits[:, 0].std() == pytest.approx(np.hypot(NOISE_OF_RECORD, NOISE_OF_MEMBER) / STEP, rel=0.15)


def test_what_is_told_in_training_is_simulated(real_dataset):
    examples, templates = Examples(RecordDataset(real_dataset, "train")), load_templates("small")
    index = next(int(k) for k in examples.data.positions("text_to_rgba") if examples.names_object(int(k)))
    told, real = set(), set()
    for seed in range(8):
        for example in draw_examples(examples, templates, "pairwise", index, seed):
            told.add(example.question.text.split("= ")[1][:3])
            group = examples.group(index, [Spoilt("blank_layer", 0, 0)], seed=0)
            real.add(" ".join(likeness(group) * 2))
    assert len(real) == 1
    assert len(told) > 2, "what is simulated varies with the seed, what is seen of an undamaged object does not"
