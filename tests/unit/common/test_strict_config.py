from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator

from common.config import StrictConfig, load_yaml, validate
from common.errors import ConfigError
from pipeline.config import RunConfig, load_config


class Window(StrictConfig):
    size: int = Field(4, ge=1)
    """Number of steps."""
    movement: str = "random"
    """How it moves."""


class Stage(StrictConfig):
    """A stage."""

    steps: int
    """Steps."""
    rate: float = 0.5
    """Rate."""
    window: Window = Window()
    """Window."""
    extras: tuple[Window, ...] = ()
    """More windows."""
    named: dict[str, Window] = Field(default_factory=dict)
    """Windows by name."""
    folder: Path | None = None
    """A folder."""
    flag: bool = False
    """A switch."""

    @model_validator(mode="after")
    def _fits(self) -> "Stage":
        if self.window.size > self.steps:
            raise ValueError(f"window.size {self.window.size} is more than steps {self.steps}")
        return self


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def problem(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Stage, values, "run.yaml")
    message = str(caught.value)
    assert message.startswith("run.yaml: ")
    return message


def test_values_become_a_typed_model_with_defaults():
    config = validate(Stage, {"steps": 9, "extras": [{"size": 2}], "folder": "a/b"}, "run.yaml")
    assert config == Stage(steps=9, extras=(Window(size=2),), folder=Path("a/b"))
    assert config.rate == 0.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"steps": 9, "stepz": 1}, "stepz: unknown key; did you mean 'steps'?"),
        ({"steps": 9, "window": {"siz": 1}}, "window.siz: unknown key; did you mean 'size'?"),
        ({"steps": 9, "extras": [{}, {"movment": "x"}]}, "extras.1.movment: unknown key; did you mean 'movement'?"),
        ({"steps": 9, "named": {"a": {"sise": 1}}}, "named.a.sise: unknown key; did you mean 'size'?"),
        ({"steps": 9, "window": {"qqq": 1}}, "window.qqq: unknown key; known keys here: size, movement"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_known_key(values, expected):
    assert expected in problem(values)


@pytest.mark.parametrize(
    ("values", "place", "got"),
    [
        ({"steps": "9"}, "steps", "'9'"),
        ({"steps": 9.0}, "steps", "9.0"),
        ({"steps": True}, "steps", "True"),
        ({"steps": 9, "rate": "fast"}, "rate", "'fast'"),
        ({"steps": 9, "window": 3}, "window", "3"),
        ({"steps": 9, "window": {"size": 0}}, "window.size", "0"),
        ({"steps": 9, "extras": 3}, "extras", "3"),
        ({"steps": 9, "flag": 1}, "flag", "1"),
        ({"steps": None}, "steps", "None"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_place_and_itself(values, place, got):
    message = problem(values)
    assert f"{place}: " in message
    assert f"(got {got})" in message


def test_a_missing_key_and_a_contradiction_say_what_is_wrong():
    assert "steps: missing, it has no default" in problem({})
    assert problem({"steps": 2}) == "run.yaml: (root): window.size 4 is more than steps 2"


def test_all_problems_are_told_at_once():
    message = problem({"stepz": 9, "rate": "x", "window": {"size": "y"}})
    assert all(part in message for part in ("stepz: unknown key", "steps: missing", "rate: ", "window.size: "))


def test_an_integer_is_fine_where_a_float_is_wanted():
    assert validate(Stage, {"steps": 9, "rate": 1}, "run.yaml").rate == 1.0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(number):
    assert "rate" in problem({"steps": 9, "rate": number})


def test_a_model_is_frozen():
    config = Stage(steps=9)
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 10


def test_overrides_change_what_the_file_says(write):
    path = write("steps: 9\nwindow: {size: 2}\nextras: [{size: 1}]")
    values = load_yaml(path, ["window.size=3", "rate=1e-3", "extras=[{size: 5}]", "folder=null"])
    assert values == {"steps": 9, "window": {"size": 3}, "rate": 1e-3, "extras": [{"size": 5}], "folder": None}
    assert load_yaml(path) == {"steps": 9, "window": {"size": 2}, "extras": [{"size": 1}]}


def test_an_override_may_hold_equals_signs_and_interpolations(write):
    assert load_yaml(write("a: 1"), ["b=x=y", "c=${a}"]) == {"a": 1, "b": "x=y", "c": 1}


@pytest.mark.parametrize("override", ["steps", "=3", "", "--steps", "steps:3"])
def test_an_override_that_is_not_key_equals_value_is_shown_with_an_example(write, override):
    with pytest.raises(ConfigError, match=r"is not of the form key=value, for example grpo\.steps=20") as caught:
        load_yaml(write("steps: 9"), [override])
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize("override", ["steps=[1", "steps={", "steps=:: :", "steps=${nowhere}"])
def test_an_override_that_cannot_be_read_is_a_configuration_error(write, override):
    with pytest.raises(ConfigError, match="mend the file or the override"):
        load_yaml(write("steps: 9"), [override])


@pytest.mark.parametrize("override", ["extras.0.size=2", "extras.0=3", "[=1"])
def test_an_override_that_does_not_fit_the_files_structure_is_a_configuration_error(write, override):
    with pytest.raises(ConfigError):
        load_yaml(write("steps: 9\nextras: [{size: 1}]"), [override])


def test_a_missing_file_is_named_with_what_to_give_instead(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file; name a shipped one \(demo, tiny\)"):
        load_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "text",
    ["a: b: c", "a: [1", "- 1\n- 2", "5", "a: 1\na: 2", "a: ${missing}", "a: ???"],
    ids=["nested colon", "open bracket", "a list", "a number", "key twice", "interpolation", "mandatory"],
)
def test_a_file_that_is_not_a_readable_mapping_is_a_configuration_error_that_names_it(write, text):
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        load_yaml(write(text))


def test_bytes_that_are_no_text_and_folders_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00a")
    for path in (tmp_path / "run.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read as YAML text"):
            load_yaml(path)


def test_an_empty_file_is_an_empty_mapping(write):
    assert load_yaml(write("")) == {}


def test_a_file_overrides_its_base_key_by_key_along_the_chain(write):
    write("a: 1\nb: {x: 1, y: 1}\nc: [1, 2]", "base/root.yaml")
    write("base: base/root.yaml\na: 2\nb: {y: 2}", "middle.yaml")
    leaf = write("base: ../middle.yaml\nb: {z: 3}\nc: [9]", "leaf/leaf.yaml")
    assert load_yaml(leaf, ["b.x=7"]) == {"a": 2, "b": {"x": 7, "y": 2, "z": 3}, "c": [9]}


def test_interpolations_see_the_composed_tree(write):
    write("steps: 5\ndouble: ${steps}", "root.yaml")
    assert load_yaml(write("base: root.yaml\nsteps: 6")) == {"steps": 6, "double": 6}


def test_a_base_that_leads_back_to_itself_is_refused(write):
    write("base: b.yaml", "a.yaml")
    path = write("base: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match="'base' leads back to itself through"):
        load_yaml(path)
    with pytest.raises(ConfigError, match="'base' leads back to itself"):
        load_yaml(write("base: self.yaml", "self.yaml"))


def test_a_missing_base_is_named(write):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such config file"):
        load_yaml(write("base: gone.yaml"))


@pytest.mark.parametrize("base", ["5", "[a.yaml, b.yaml]", "{a: 1}"])
def test_a_base_that_is_no_file_name_is_a_configuration_error(write, base):
    with pytest.raises(ConfigError, match="base"):
        load_yaml(write(f"base: {base}"))


def models_of(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return set().union(*(models_of(argument) for argument in get_args(annotation)))


def reachable(root: type[BaseModel]) -> set[type[BaseModel]]:
    found, waiting = set(), {root}
    while waiting:
        model = waiting.pop()
        found.add(model)
        waiting |= set().union(*(models_of(f.annotation) for f in model.model_fields.values())) - found
    return found


@pytest.mark.parametrize("model", sorted(reachable(RunConfig), key=lambda model: model.__name__))
def test_every_config_class_is_strict_and_describes_itself_and_every_field(model):
    assert issubclass(model, StrictConfig)
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]
    assert (vars(model).get("__doc__") or "").strip()
    assert [name for name, field in model.model_fields.items() if not (field.description or "").strip()] == []


def test_the_config_tree_reaches_every_component():
    modules = {model.__module__.partition(".")[0] for model in reachable(RunConfig)}
    assert modules == {"pipeline", "actors", "rewards", "policy", "data"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.sampling.window.sise=2", "grpo.sampling.window.sise: unknown key; did you mean 'size'?"),
        ("grpo.kernel.name=flow", "grpo.kernel.name: "),
        ("seeed=1", "seeed: unknown key; did you mean 'seed'?"),
        ("sft.optimiser.lr=fast", "sft.optimiser.lr: "),
    ],
)
def test_mistakes_in_a_real_run_are_found_at_their_place(override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert expected in str(caught.value)


def test_an_unknown_config_name_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"no config 'dmeo'; shipped ones: .*demo.*tiny"):
        load_config("dmeo")
