"""Actors on a node with other code than the driver's are refused before they work."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.crew import Crew
from actors.origin import PACKAGES, source_digest, versions
from actors.processes import admit
from common.errors import ClusterError
from tests.faults import worker
from tests.faults.worker import Worker

ray.cloudpickle.register_pickle_by_value(worker)  # actors cannot import the tests

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def other_code(tmp_path) -> Path:
    """A copy of this package's sources in which one line differs."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
        )
    changed = tmp_path / "rewards" / "combine.py"
    changed.write_text(changed.read_text() + "# another line\n")
    return tmp_path


def crew_of(environment: dict[str, Any] | None) -> Crew:
    actor = ray.remote(num_cpus=0.1)(Worker).options(runtime_env=environment)
    return Crew("reward", actor.remote, 1, replacements=0, deadline_s=240.0)


def test_an_actor_that_runs_a_copy_with_one_changed_line_is_refused_with_its_node_and_both_digests(other_code):
    crew = crew_of({"env_vars": {"PYTHONPATH": str(other_code)}})
    theirs, ours = source_digest(other_code), source_digest(ROOT)
    assert theirs != ours
    try:
        with pytest.raises(ClusterError) as refused:
            crew.begin()
    finally:
        ray.kill(crew.actors[0])
    address = ray.util.get_node_ip_address()
    assert str(refused.value).startswith(
        f"node {address} does not run what the driver runs: reward-0 has code {theirs}"
    )
    assert f"(the driver: {ours})" in str(refused.value)
    assert "torch" not in str(refused.value), "only what differs is named"
    assert "--working-dir" in str(refused.value)


def test_an_actor_that_runs_the_drivers_code_is_taken_in():
    crew = crew_of(None)
    try:
        crew.begin()
    finally:
        ray.kill(crew.actors[0])


@pytest.mark.parametrize("what", ["omnialpha", "python", "torch", "ray"])
def test_another_version_is_refused_by_name(what):
    said = {"name": "learner-1", "address": "10.0.0.7", "versions": versions() | {what: "0.0.1"}}
    with pytest.raises(ClusterError, match=rf"^node 10.0.0.7 .* learner-1 has {what} 0.0.1 \(the driver: "):
        admit(said)


def test_the_digest_follows_names_and_contents_of_sources_and_nothing_else(tmp_path):
    package = tmp_path / "rewards"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    first = source_digest(tmp_path)
    (package / "a.pyc").write_bytes(b"compiled")
    (tmp_path / "elsewhere.py").write_text("x = 1\n")
    assert source_digest(tmp_path) == first
    (package / "a.py").rename(package / "b.py")
    renamed = source_digest(tmp_path)
    (package / "b.py").write_text("x = 2\n")
    assert len({first, renamed, source_digest(tmp_path)}) == 3
