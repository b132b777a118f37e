"""Prompt templates: what is shipped is whole, what is wrong names its file."""

import shutil

import pytest

from common.errors import ConfigError
from data.tasks import TASKS
from rewards.judge.templates import SHIPPED, load_templates


@pytest.fixture
def own(tmp_path):
    """A copy of the shipped small templates to spoil."""
    return shutil.copytree(SHIPPED / "small", tmp_path / "mine")


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", ["small", "vlm"])
def test_shipped_templates_have_every_task(name):
    assert set(load_templates(name).tasks) == set(TASKS)


@pytest.mark.parametrize("protocol", ["pointwise", "pairwise", "grid"])
def test_a_question_holds_prompt_criteria_and_labels(protocol):
    templates = load_templates("vlm")
    text = templates.text(protocol, "referring_matting", "Cut out a {strange} dog.")
    assert "Cut out a {strange} dog." in text
    assert "the object that the instruction names" in text
    assert "{" not in text.replace("{strange}", "")


def test_a_field_that_there_is_not_names_the_file_and_the_known_ones(own):
    replace(own / "protocols.yaml", "{prompt} = {likeness} grade", "{promt} grade")
    with pytest.raises(ConfigError, match=r"protocols\.yaml: pointwise\.text: unknown field \{promt\}; known: prompt"):
        load_templates(own)


def test_a_key_that_there_is_not_names_the_file_and_the_nearest(own):
    replace(own / "text_to_rgba.yaml", "criteria:", "criterion:")
    with pytest.raises(ConfigError, match=r"text_to_rgba\.yaml: .*criterion: unknown key; did you mean 'criteria'"):
        load_templates(own)


def test_a_view_of_a_layer_that_the_task_does_not_have_is_refused(own):
    replace(own / "text_to_rgba.yaml", "blank,", "input.black,")
    with pytest.raises(ConfigError, match=r"text_to_rgba\.yaml: views: 'input.black': task text_to_rgba has no input"):
        load_templates(own)


def test_a_view_that_is_none_is_refused(own):
    replace(own / "text_to_rgba.yaml", "foreground.alpha", "foreground.pink")
    with pytest.raises(ConfigError, match=r"'foreground\.pink' is not SOURCE\.LOOK"):
        load_templates(own)


def test_woven_views_are_four(own):
    replace(own / "text_to_rgba.yaml", "blank,", "")
    with pytest.raises(ConfigError, match="exactly 4, found 3"):
        load_templates(own)


def test_a_file_that_is_named_after_no_task_is_refused(own):
    (own / "text_to_rgba.yaml").rename(own / "text_to_rgb.yaml")
    with pytest.raises(ConfigError, match="unknown task 'text_to_rgb'"):
        load_templates(own)


def test_a_single_brace_is_explained(own):
    replace(own / "protocols.yaml", "{likeness} best ?", "{likeness} } best ?")
    with pytest.raises(ConfigError, match="a brace of its own is written twice"):
        load_templates(own)


def test_a_task_without_a_file_is_named_when_it_is_asked_about(own):
    (own / "text_to_rgba.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no text_to_rgba\.yaml"):
        load_templates(own).task("text_to_rgba")


def test_a_label_of_two_tokens_is_refused_before_anything_is_asked(own):
    replace(own / "protocols.yaml", '["1", "2", "0"]', '["1", "2", "neither of them"]')
    with pytest.raises(ConfigError, match=r"protocols\.yaml: pairwise\.labels: 'neither of them' is 3 tokens"):
        load_templates(own).check_labels(lambda text: len(text.split()))


def test_a_folder_without_templates_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"no protocols\.yaml in .*shipped ones: small, vlm"):
        load_templates(tmp_path)
