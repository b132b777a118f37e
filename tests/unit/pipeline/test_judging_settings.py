"""What ``judging`` in a run's configuration allows and refuses, and what the plan and the run folder know of it."""

from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError
from pipeline.cli import main
from pipeline.config import RunConfig, load_config
from pipeline.stages import run_stages

TERM = {"name": "judge", "tasks": ["text_to_rgba"], "params": {"templates": "small"}}
SERVER = {"server": {"model": "models/judge"}}
EXTERNAL = {"external": {"url": "http://127.0.0.1:9", "model": "judge", "key_env": "JUDGE_KEY"}}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the tiny config with a ``judging`` section and a judge among its terms."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "judge").mkdir(parents=True)

    def made(judging: dict | None, *overrides: str, params: dict | None = None, terms: tuple[dict, ...] = (TERM,)):
        chosen = [term | {"params": term["params"] | (params or {})} for term in terms]
        tree = {"base": "tiny", "rewards": {"terms": [{"name": "layer"}, *chosen]}, "judging": judging}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
        return load_config("mine.yaml", overrides)

    return made


def refusal(load, *arguments, **terms) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **terms)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths_are_absolute_and_an_interpreter_stays_in_its_environment(load, tmp_path):
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to("/bin/sh")
    server = load(SERVER, "judging.server.python=env/python").judging.server
    assert server.model == str(tmp_path / "models" / "judge")
    assert server.python == tmp_path / "env" / "python"


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "judge"])
def test_a_name_on_the_hub_stays_a_name(load, name):
    assert load({"server": {"model": name}}).judging.server.model == name


@pytest.mark.parametrize("path", ["./judge", "../judge", "runs/judge/final/model", "/judge"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(load, path):
    assert load({"server": {"model": path}}).judging.server.model == str(Path(path).resolve())


def test_a_run_without_a_judge_has_the_identity_that_it_had(load):
    assert load_config("tiny").judging is None
    assert "judging" not in load_config("tiny").identity()


def test_a_run_belongs_to_the_judges_model_and_not_to_where_and_how_it_is_served(load):
    identity = load(SERVER).identity_hash()
    same = (
        "judging.server.replicas=2",
        "judging.server.port=9000",
        "judging.client.patience_s=5",
        "judging.missing=drop",
    )
    for override in same:
        assert load(SERVER, override).identity_hash() == identity
    assert load(SERVER, "judging.server.model=other/judge").identity_hash() != identity


@pytest.mark.parametrize(
    ("judging", "terms", "words"),
    [
        (None, {}, ["term 'judge' has nobody to ask", "params.folder"]),
        (SERVER, {"terms": ()}, ["judging: no reward term asks"]),
        (SERVER, {"params": {"folder": "models/judge"}}, ["judging: no reward term asks"]),
        ({}, {}, ["judging: give either server", "or external"]),
        (SERVER | EXTERNAL, {}, ["judging: give either server", "or external"]),
        (SERVER | {"missing": "ignore"}, {}, ["judging.missing", "'drop', 'wait' or 'fail'"]),
        (SERVER | {"clinet": {}}, {}, ["judging.clinet", "did you mean 'client'?"]),
        ({"server": {"model": "m", "tensor_paralel": 2}}, {}, ["did you mean 'tensor_parallel'?"]),
        ({"external": {"url": "http://me:secret@host", "model": "m"}}, {}, ["a key belongs in key_env's variable"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:40],
)
def test_a_judge_that_cannot_work_is_refused_in_one_message(load, judging, terms, words):
    message = refusal(load, judging, **terms)
    for part in words:
        assert part in message, message


def test_the_plan_counts_the_judges_servers(load, capsys):
    load(SERVER)
    assert main(["plan", "mine.yaml", "judging.server.replicas=2", "cluster.cpus=8"]) == 0
    assert "  judge   2 processes, 2 CPUs\n" in capsys.readouterr().out
    assert main(["plan", "mine.yaml", "judging.server.cpus=4", "cluster.cpus=2"]) == 1
    message = capsys.readouterr().err
    assert "judge 1 × 4 CPU" in message
    assert "or judging.server" in message


def grpo_alone(config: RunConfig, dataset: Path, policy: Path) -> RunConfig:
    grpo = config.grpo.model_copy(update={"start": policy})
    tracking = config.tracking.model_copy(update={"wandb": "disabled"})
    return config.model_copy(update={"dataset": dataset, "grpo": grpo, "tracking": tracking})


def broken_templates(folder: Path) -> None:
    from rewards.judge.templates import SHIPPED

    folder.mkdir()
    for path in (SHIPPED / "small").iterdir():
        (folder / path.name).write_text(path.read_text())
    protocols = (folder / "protocols.yaml").read_text()
    (folder / "protocols.yaml").write_text(protocols.replace("{prompt}", "{promt}", 1))


@pytest.mark.parametrize(
    ("judging", "params", "message"),
    [
        ({"server": {"model": "./nowhere"}}, {}, "nowhere: no such folder; .*omnialpha judge train"),
        (EXTERNAL, {}, "environment variable JUDGE_KEY is not set"),
        (SERVER, {"templates": "mine"}, r"protocols.yaml: .*unknown field \{promt\}; known: prompt"),
        (SERVER, {"protocol": "sorted"}, "protocol 'sorted' is no reward"),
        (SERVER, {"colour": "red"}, "params do not fit"),
    ],
    ids=["no folder", "no key", "unknown field", "unknown protocol", "unknown param"],
)
def test_what_is_wrong_with_a_judge_is_said_before_any_actor_starts(
    load, tmp_path, real_dataset, monkeypatch, judging, params, message
):
    from tests.integration.policies import write_policy

    monkeypatch.delenv("JUDGE_KEY", raising=False)
    broken_templates(tmp_path / "mine")
    config = grpo_alone(load(judging, params=params), real_dataset, write_policy(tmp_path / "policy"))
    with pytest.raises(ConfigError, match=message):
        run_stages(config, ("grpo",))


def test_groups_larger_than_the_grid_has_labels_are_refused_before_any_actor_starts(load, tmp_path, real_dataset):
    from tests.integration.policies import write_policy

    judged = load(SERVER, "grpo.group=9", params={"protocol": "grid"})
    config = grpo_alone(judged, real_dataset, write_policy(tmp_path / "policy"))
    with pytest.raises(ConfigError, match=r"term 'judge' scores groups of at most 8, and grpo\.group is 9"):
        run_stages(config, ("grpo",))


def test_the_demo_with_a_judge_fits_two_cores_and_takes_another_model_by_override(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "demo-judge", "cluster.cpus=2"]) == 0
    config = load_config("demo-judge", [f"judging.server.model={tmp_path}"])
    assert config.judging.server.model == str(tmp_path)
    assert config.grpo.tasks["text_to_rgba"] > 0
    assert [term.weight for term in config.rewards.terms if term.name == "judge"] == [1.0]
    assert {term.name for term in load_config("demo").rewards.terms} < {term.name for term in config.rewards.terms}
