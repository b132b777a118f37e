"""What the plan and the run folder know of reward terms in processes of their own."""

from pathlib import Path

import pytest

from actors.cluster import PlacementRow, check_placement
from common.errors import PlacementError
from pipeline.cli import main
from pipeline.config import load_config
from rewards.combine import TermConfig


def config_with(folder: Path, *terms: str) -> str:
    path = folder / "mine.yaml"
    path.write_text("base: tiny\nrewards:\n  terms:\n    - {name: layer}\n" + "".join(f"    - {t}\n" for t in terms))
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("raise RuntimeError('the driver ran a plug-in')\n")
    return tmp_path


def test_the_plan_counts_the_processes_of_isolated_terms(here, capsys):
    path = config_with(
        here,
        "{name: mine, scorer: 'mine.py:score'}",
        "{name: big, scorer: 'a.b:c', resources: {actors: 2, cpus: 0.1, gpus: 0.5}}",
    )
    assert main(["plan", path, "cluster.cpus=3"]) == 1  # shown, although this machine has no GPU
    shown, message = capsys.readouterr()
    assert "the configured actors need 1 GPUs (scorer big 2 × 0.5 GPU)" in message
    assert "  scorer mine 1 processes, 0.05 CPUs\n" in shown
    assert "  scorer big  2 processes, 0.2 CPUs, 1 GPUs\n" in shown
    assert "  total       2.05 CPUs, 1 GPUs\n" in shown


def test_the_demo_leaves_room_for_four_scorers_on_two_cores(here):
    own = [f"{{name: s{k}, scorer: 'mine.py:score'}}" for k in range(4)]
    assert main(["plan", config_with(here, *own), "cluster.cpus=2"]) == 0


def test_too_few_resources_name_the_term_and_its_key(here, capsys):
    path = config_with(here, "{name: mine, scorer: 'mine.py:score', resources: {cpus: 4}}")
    assert main(["plan", path, "cluster.cpus=2"]) == 1
    message = capsys.readouterr().err
    assert "scorer mine 1 × 4 CPU" in message
    assert "or the resources of rewards.terms" in message


def test_gpus_are_compared_where_the_cluster_tells_how_many_there_are():
    rows = [PlacementRow("learner", 2, 1.0), PlacementRow("scorer big", 2, 0.1, 1.0)]
    check_placement(rows, cpus=2)
    check_placement(rows, cpus=2, gpus=1)
    with pytest.raises(PlacementError, match=r"need 1 GPUs \(scorer big 2 × 0.5 GPU\) but the cluster offers 0;"):
        check_placement(rows, cpus=2, gpus=0)


def test_a_runtime_env_that_cannot_be_used_is_refused_by_the_plan(here, capsys):
    path = config_with(here, "{name: mine, scorer: 'a:b', runtime_env: {py_modules: [nowhere]}}")
    assert main(["plan", path, "cluster.cpus=2"]) == 2
    message = capsys.readouterr().err
    assert "reward term 'mine': its runtime_env cannot be used" in message
    assert str(here / "nowhere") in message


def test_relative_paths_of_a_runtime_env_are_those_of_the_working_directory(here):
    env = "{py_modules: [mine.py, 'https://x.org/a.zip'], env_vars: {A: b}}"
    path = config_with(
        here,
        f"{{name: one, scorer: 'mine:score', runtime_env: {env}}}",
        "{name: two, scorer: 'inside.py:score', runtime_env: {working_dir: .}}",
    )
    one, two = load_config(path).rewards.terms[1:]
    assert one.runtime_env.py_modules == (str(here / "mine.py"), "https://x.org/a.zip")
    assert two.runtime_env.working_dir == str(here)
    assert two.scorer == "inside.py:score"  # a file in the working_dir, wherever that will lie


def test_where_a_term_runs_is_no_part_of_what_a_run_folder_belongs_to(here):
    plain = load_config(config_with(here, "{name: mine, scorer: 'mine.py:score'}"))
    moved = load_config(
        config_with(
            here, "{name: mine, scorer: 'mine.py:score', isolated: true, deadline_s: 9, resources: {actors: 2}}"
        )
    )
    assert moved.identity() == plain.identity()
    assert set(plain.identity()["rewards"]["terms"][0]) == {"name", "scorer", "weight", "params", "tasks"}
    other = load_config(
        config_with(here, "{name: mine, scorer: 'mine.py:score', runtime_env: {env_vars: {MODEL: large}}}")
    )
    assert other.identity() != plain.identity()


def test_a_missing_scorer_file_is_named_before_actors_start_and_no_plug_in_runs_in_the_driver(
    here, real_dataset, capsys
):
    path = config_with(here, "{name: mine, scorer: 'mine.py:score'}", "{name: other, scorer: 'nowhere.py:score'}")
    folders = [f"run_dir={here / 'run'}", f"dataset={real_dataset}", "tracking.wandb=disabled"]
    assert main(["run", path, *folders]) == 2
    assert f"reward file {here / 'nowhere.py'} cannot be read" in capsys.readouterr().err


def test_a_term_knows_its_deadline():
    assert TermConfig(name="mine", scorer="a:b").deadline == 60
    assert TermConfig(name="mine", scorer="a:b", deadline_s=0.5).deadline == 0.5
