"""Nodes prove that they see the run folder and the dataset, each through a Ray task of its own."""

import secrets
from pathlib import Path

import pytest
import ray

from actors.origin import look
from actors.shared_storage import check_shared_storage, judge_look, top_files
from common.errors import ClusterError


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Run folder and dataset."""
    for name in ("run", "dataset"):
        (tmp_path / name).mkdir()
    (tmp_path / "dataset" / "manifest.json").write_text('{"records": 3}')
    return tmp_path / "run", tmp_path / "dataset"


def looked(here: tuple[Path, Path], there: tuple[Path, Path]) -> None:
    """The probe where the driver's folders are ``here`` and the node has those of ``there`` in their place."""
    token, name = secrets.token_hex(8), "node"
    (here[0] / "question").write_text(token)
    digests = top_files(here[1])
    found = look(there[0] / "question", there[0] / name, there[1], list(digests))
    judge_look("10.0.0.7", token, here[0] / name, here[1], digests, found)


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_shares_both_folders_is_taken_and_nothing_is_left_behind(folders):
    check_shared_storage(*folders, deadline_s=120.0)
    assert list(folders[0].iterdir()) == []
    assert [path.name for path in folders[1].iterdir()] == ["manifest.json"]


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_reads_another_folder_is_refused_by_a_real_task(folders, monkeypatch):
    """The task is given a path that does not exist where it runs, as on a node without the mount."""

    def elsewhere(question, answer, dataset, names):
        from actors.origin import look

        gone = question.parent.with_name("not-mounted")
        return look(gone / question.name, gone / answer.name, dataset, names)

    monkeypatch.setattr("actors.shared_storage.look", elsewhere)
    with pytest.raises(ClusterError) as refused:
        check_shared_storage(*folders, deadline_s=120.0)
    address = ray.util.get_node_ip_address()
    assert str(refused.value).startswith(f"node {address} does not share {folders[0]} with the driver (No such file")
    assert "set run_dir to it" in str(refused.value)
    assert list(folders[0].iterdir()) == []


def test_folders_that_are_shared_pass(folders):
    looked(folders, folders)


def test_a_copy_in_which_answers_do_not_arrive_is_refused(folders, tmp_path):
    """The node sees the question, as on storage that is mirrored one way, and writes its answer elsewhere."""
    token = secrets.token_hex(8)
    (folders[0] / "question").write_text(token)
    (tmp_path / "mirror").mkdir()
    found = look(folders[0] / "question", tmp_path / "mirror" / "node", folders[1], ["manifest.json"])
    with pytest.raises(ClusterError, match=r"node 10.0.0.7 does not share .*run with the driver \(what the node wrote"):
        judge_look("10.0.0.7", token, folders[0] / "node", folders[1], top_files(folders[1]), found)


@pytest.mark.parametrize("content", [None, '{"records": 4}'])
def test_a_dataset_that_is_missing_or_another_one_on_a_node_is_refused_with_node_and_path(folders, tmp_path, content):
    other = tmp_path / "other"
    other.mkdir()
    if content:
        (other / "manifest.json").write_text(content)
    with pytest.raises(ClusterError) as refused:
        looked(folders, (folders[0], other))
    assert str(refused.value).startswith(f"node 10.0.0.7 does not see the driver's dataset {folders[1]} (manifest.json")
    assert "set dataset to it" in str(refused.value)
