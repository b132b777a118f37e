"""What a scorer's process imports first, and what its ``runtime_env`` may hold, without starting one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.packages import check_runtime_env, folders_in_place
from common.errors import ConfigError
from rewards.combine import TermConfig
from rewards.isolation import RuntimeEnvConfig

ROOT = Path(__file__).resolve().parents[3]

PROCESS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("by_value", {scorer!r})  # as the class arrives: not by its import path
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
before = list(sys.path)
module.import_ours_first([{listed!r}])
assert sys.path == before
import data, rewards, theirs, common.errors
print(data.__file__, rewards.__file__, common.errors.__file__, theirs.NAME)
"""


@pytest.mark.parametrize("place", ["unpacked by Ray", "working directory", "in place"])
def test_folders_named_like_ours_in_front_of_the_import_path_are_not_imported(tmp_path, place):
    folder = tmp_path / "runtime_resources" / "package" if place == "unpacked by Ray" else tmp_path / "package"
    for name in ("data", "rewards", "common"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('the user folder was imported')\n")
    (folder / "theirs.py").write_text("NAME = 'theirs'\n")
    source = PROCESS.format(
        scorer=str(ROOT / "actors" / "scorer.py"), listed=str(folder) if place == "in place" else ""
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder if place == "working directory" else tmp_path,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(ROOT / p) for p in ("data/__init__.py", "rewards/__init__.py", "common/errors.py")
    ] + ["theirs"]


def term(**env) -> TermConfig:
    return TermConfig(name="mine", scorer="a:b", runtime_env=RuntimeEnvConfig(**env))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"py_modules": ("/nowhere/at/all",)}, "/nowhere/at/all"),
        ({"working_dir": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"pip": ("a",), "conda": "b"}, "pip.*conda|conda.*pip"),
    ],
)
def test_a_runtime_env_that_ray_cannot_use_is_refused_by_the_name_of_its_term(env, words):
    with pytest.raises(ConfigError, match=rf"^reward term 'mine': its runtime_env cannot be used: .*({words})"):
        check_runtime_env(term(**env))


def test_folders_used_in_place_are_known_by_their_path():
    env = {"py_modules": ("local:///opt/a", "https://x.org/b.zip"), "working_dir": "local:///opt/c"}
    assert folders_in_place(term(**env)) == ["/opt/a", "/opt/c"]
