"""Which terms get a process of their own, and what is said of settings that do not fit."""

import json

import pytest

from common.config import validate
from common.errors import ConfigError
from rewards.base import check_source, is_shipped
from rewards.combine import RewardConfig, TermConfig


def term(**fields) -> TermConfig:
    return validate(RewardConfig, {"terms": [{"name": "mine", **fields}]}, "test").terms[0]


def refused(**fields) -> str:
    with pytest.raises(ConfigError) as caught:
        term(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({"name": "layer"}, False),
        ({"scorer": "rewards.terms:LayerFidelity"}, False),
        ({"scorer": "my_package.rewards:score"}, True),
        ({"scorer": "/shared/mine.py:score"}, True),
        ({"name": "of_some_package"}, True),
        ({"scorer": "/shared/mine.py:score", "isolated": False}, False),
        ({"name": "layer", "isolated": True}, True),
        ({"name": "layer", "deadline_s": 5}, True),
        ({"name": "layer", "resources": {"actors": 2}}, True),
        ({"name": "layer", "runtime_env": {"env_vars": {"A": "b"}}}, True),
    ],
)
def test_a_users_own_code_and_whoever_asks_for_it_has_a_process_of_its_own(fields, own):
    assert term(**fields).own_process is own


def test_asking_whose_code_it_is_does_not_run_it(tmp_path):
    path = tmp_path / "bomb.py"
    path.write_text("raise RuntimeError('imported')\n")
    assert not is_shipped(f"{path}:score")
    check_source(f"{path}:score")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("boundry", "did you mean 'boundary'"),
        ("/nowhere/mine.py:score", "/nowhere/mine.py cannot be read .No such file"),
        ("mine.py:", "not of the form"),
    ],
)
def test_a_source_that_is_not_there_is_known_without_running_anything(source, words):
    with pytest.raises(ConfigError, match=words):
        check_source(source)


@pytest.mark.parametrize("setting", [{"deadline_s": 5}, {"resources": {}}, {"runtime_env": {"pip": ["a"]}}])
def test_sharing_a_process_excludes_settings_of_a_process_of_its_own(setting):
    (name,) = setting
    message = refused(isolated=False, **setting)
    assert "isolated: false puts term 'mine' into the reward actors' process" in message
    assert f"leave isolated out, or remove {name}" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"deadline_s": 0}, "terms.0.deadline_s: Input should be greater than 0"),
        ({"deadlines": 3}, "terms.0.deadlines: unknown key; did you mean 'deadline_s'?"),
        ({"runtime_env": {"py_module": ["a"]}}, "runtime_env.py_module: unknown key; did you mean 'py_modules'?"),
        ({"runtime_env": {"env_vars": {"A": 1}}}, "runtime_env.env_vars.A: Input should be a valid string"),
        ({"resources": {"gpu": 1}}, "resources.gpu: unknown key; did you mean 'gpus'?"),
        ({"resources": {"gpus": 1.5}}, "resources.gpus: 1.5 GPUs cannot be reserved"),
        ({"resources": {"actors": 0}}, "resources.actors: Input should be greater than or equal to 1"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_with_the_nearest(fields, words):
    assert words in refused(**fields)


def test_ray_gets_the_fields_that_are_set_and_no_others():
    env = {"py_modules": ["a", "b"], "pip": {"packages": ["x"]}, "env_vars": {"A": "b"}}
    assert term(runtime_env=env).runtime_env.options() == env


def test_settings_survive_the_saved_configuration():
    config = RewardConfig(terms=(term(runtime_env={"pip": ["x"]}, resources={"cpus": 2.0}, deadline_s=7),))
    assert validate(RewardConfig, json.loads(config.model_dump_json()), "saved") == config
