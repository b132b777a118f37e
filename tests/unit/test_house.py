"""Rules of the house that no single component can keep alone."""

import ast
import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# pytest has put this file's folder on the path, where data/ and rewards/ are folders of tests that hide the packages.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT / "tests" / "unit"]

CHAIN = ("pipeline", "actors", "rewards", "policy", "data", "common")
"""Whoever is named earlier may import whoever is named later, never the other way round."""
PLAIN = ("rewards", "policy", "data", "common")
"""What runs and is tested in one plain process."""
HEAVY = {"ray", "deepspeed", "vllm"}
LONGEST = 500

SOURCES = [path for folder in CHAIN for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; write the full name"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {name.partition(".")[0] for name in names}


def forbidden(folder: str) -> set[str]:
    """What stands above a folder in the chain, and what only the top may use."""
    above = set(CHAIN[: CHAIN.index(folder)])
    return above | {"tests", "benchmarks"} | (set() if folder == "pipeline" else {"configs"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_the_chain(path):
    assert imported(path) & forbidden(path.relative_to(ROOT).parts[0]) == set()


@pytest.mark.parametrize("folder", PLAIN)
def test_everything_below_the_actors_is_free_of_ray_deepspeed_and_vllm(folder):
    offenders = {str(p.relative_to(ROOT)): imported(p) & HEAVY for p in SOURCES if p.is_relative_to(ROOT / folder)}
    assert {path: names for path, names in offenders.items() if names} == {}


def test_no_source_file_is_longer_than_one_can_read():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def shipped() -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs").rglob("*.yaml"))


def test_the_shipped_configs_are_the_files_in_the_configs_folder():
    from pipeline.config import shipped_configs

    assert sorted(shipped_configs()) == shipped()
    assert {"demo", "tiny"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_loads_and_its_plan_can_be_shown(name):
    from pipeline.config import RunConfig, load_config
    from pipeline.plan import render_plan

    config = load_config(name)
    assert config.name == name
    plan = render_plan(config)
    resolved, _, rest = plan.partition("\n\nactors:\n")
    assert RunConfig.model_validate_json(json.dumps(yaml.safe_load(resolved))) == config
    assert config.identity_hash() in rest
    assert str(config.folder) in rest
    assert f"{config.grpo.steps} steps of {config.grpo.prompts} groups × {config.grpo.group}" in rest


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_config_is_the_same_by_name_and_by_path(name):
    from pipeline.config import load_config

    (path,) = (ROOT / "configs").rglob(f"{name}.yaml")
    assert load_config(str(path)) == load_config(name)
