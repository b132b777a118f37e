"""Scorers of installed packages: found by the entry point's name, blamed by the package's name."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from rewards import base
from rewards.base import build, find, registered, run_scorer, unavailable

SCORERS = """
class Scaled:
    "Scales."
    def __init__(self, scale=1.0):
        self.scale = scale

    def score(self, batch):
        return [self.scale] * batch.members
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution with one module on the import path, as an installer leaves it."""

    def add(name: str, points: str, code: str = SCORERS) -> Path:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[omnialpha.rewards]\n{points}\n")
        (site / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        return site

    return add


def test_a_name_of_an_installed_package_is_built_with_params_and_listed(make_batch, install):
    install("tiny_reward_a", "scaled = tiny_reward_a:Scaled")
    assert "scaled" in registered()
    assert run_scorer("scaled", build("scaled", {"scale": 3.0}), make_batch()).values_G.tolist() == [3.0] * 3
    with pytest.raises(ConfigError, match=r"reward 'scaled': params do not fit: .*it takes: scale"):
        build("scaled", {"skale": 3.0})


def test_entry_points_of_other_groups_are_none_of_ours(install):
    site = install("tiny_reward_b", "mine = tiny_reward_b:Scaled")
    (site / "tiny_reward_b-1.0.dist-info" / "entry_points.txt").write_text("[console_scripts]\nmine = a:b\n")
    assert "mine" not in registered()


def test_a_registered_name_comes_before_an_entry_point(make_batch, install):
    install("tiny_reward_c", "boundary = tiny_reward_c:Scaled")
    assert find("boundary").__module__ == "rewards.terms"
    assert registered().count("boundary") == 1


def test_an_entry_point_comes_before_nothing_that_has_a_colon(make_batch, install):
    install("tiny_reward_d", "scaled = tiny_reward_d:Scaled")
    scorer = build("rewards.terms:LayerFidelity", {"metrics": ["psnr"]})
    assert np.isfinite(run_scorer("layer", scorer, make_batch()).values_G).all()


def test_an_unknown_name_is_answered_with_the_entry_points_among_the_rest(install):
    install("tiny_reward_e", "sharpness = tiny_reward_e:Scaled")
    with pytest.raises(ConfigError, match=r"did you mean 'sharpness'\? registered: .*layer.*, sharpness; your own"):
        build("sharpnes")


@pytest.mark.parametrize(
    ("name", "attribute", "code", "words"),
    [
        ("tiny_reward_f", "Scaled", "import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_inst"),
        ("tiny_reward_g", "Skaled", SCORERS, "AttributeError: .*Skaled"),
        ("tiny_reward_h", "Scaled", "raise RuntimeError('no licence')", "RuntimeError: no licence"),
    ],
)
def test_an_entry_point_that_cannot_be_loaded_names_its_package_and_hinders_no_other(
    install, name, attribute, code, words
):
    install(name, f"broken = {name}:{attribute}", code)
    with pytest.raises(ConfigError, match=f"reward 'broken' of the installed package {name} .*{words}"):
        build("broken")
    assert find("layer").__module__ == "rewards.terms"
    assert "broken" in registered()


def test_two_packages_with_one_name_are_refused_and_both_named(install):
    install("tiny_reward_i", "twin = tiny_reward_i:Scaled")
    install("tiny_reward_j", "twin = tiny_reward_j:Scaled")
    with pytest.raises(ConfigError, match=r"tiny_reward_i:Scaled, tiny_reward_j:Scaled.*uninstall one, or name"):
        build("twin")


def test_a_shipped_module_without_its_dependency_is_said_to_be_missing_and_hinders_no_other(tmp_path, monkeypatch):
    (tmp_path / "needs_an_extra_for_this_test.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_SHIPPED", ("needs_an_extra_for_this_test", *base._SHIPPED))
    reason = "ModuleNotFoundError: No module named 'not_installed_anywhere'"
    assert unavailable() == {"needs_an_extra_for_this_test": reason}
    assert build("layer") is not None
    with pytest.raises(ConfigError, match=f"not available here: needs_an_extra_for_this_test \\({reason}\\)"):
        build("oracle")


def test_a_shipped_module_that_is_broken_is_not_taken_for_a_missing_extra(tmp_path, monkeypatch):
    (tmp_path / "broken_for_this_test.py").write_text("raise RuntimeError('a bug')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_SHIPPED", ("broken_for_this_test",))
    with pytest.raises(RuntimeError, match="a bug"):
        registered()
