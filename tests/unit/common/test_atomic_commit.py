import contextlib
import errno
import json
import os
from pathlib import Path

import pytest

from common.commit import (
    MANIFEST,
    begin,
    commit,
    file_checksum,
    free_mib,
    latest,
    retain,
    step_folder,
    storage_errors,
    verify,
    write_atomic,
)
from common.errors import CheckpointError, StorageError


class Crash(BaseException):
    """The process dies here."""


def fill(folder: Path, text: str) -> None:
    (folder / "engine").mkdir()
    (folder / "engine" / "rank0.pt").write_text(f"weights of {text}" * 20)
    (folder / "state.json").write_text(text)


def make(root: Path, step: int, text: str = ""):
    final = step_folder(root, step)
    temporary = begin(final)
    fill(temporary, text or f"step {step}")
    return commit(temporary, final, {"step": step, "config": "abc"})


def found(root: Path):
    reasons: list[str] = []
    return latest(root, reasons.append), reasons


def strangers(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


@contextlib.contextmanager
def failing_at_call(monkeypatch, number: int, error: BaseException):
    """Lets the ``number``-th call that changes the file system fail; yields the names of the calls made so far."""
    calls: list[str] = []

    def wrap(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                raise error
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    with monkeypatch.context() as patch:
        wrap(Path, "write_text")
        for name in ("fsync", "rename", "replace"):
            wrap(os, name)
        yield calls


def every_failing_commit(tmp_path, monkeypatch, replace: bool, error: BaseException, expected: type[BaseException]):
    """Commits "new" over or beside "old" once for each call that can fail; yields (folder, what failed)."""
    for number in range(1, 100):
        root = tmp_path / str(number)
        make(root, 2 if replace else 1, "old")
        temporary = begin(step_folder(root, 2))
        fill(temporary, "new")
        with failing_at_call(monkeypatch, number, error) as calls:
            try:
                commit(temporary, step_folder(root, 2), {"step": 2})
            except expected:
                yield root, f"{calls[number - 1]}, call {number} of {calls}"
            else:
                assert len(calls) < number, "the failure was swallowed"
                assert number > 5, "the calls of a commit are not seen any more"
                return


def test_a_commit_is_found_with_its_facts_and_every_file(tmp_path):
    made = make(tmp_path, 7)
    got, reasons = found(tmp_path)
    assert got == made == verify(step_folder(tmp_path, 7))
    assert reasons == []
    assert got.step == 7
    assert got.facts == {"step": 7, "config": "abc"}
    assert (got.path / "state.json").read_text() == "step 7"
    manifest = json.loads((got.path / MANIFEST).read_text())
    assert set(manifest["files"]) == {"state.json", os.path.join("engine", "rank0.pt")}
    assert manifest["files"]["state.json"] == {"bytes": 6, "blake2b": file_checksum(got.path / "state.json")}
    assert strangers(tmp_path) == []


def test_the_newest_commit_is_the_one_found(tmp_path):
    for step in (2, 10, 9):
        make(tmp_path, step)
    assert found(tmp_path)[0].step == 10


def test_no_commit_at_all_is_none_and_not_an_error(tmp_path):
    assert found(tmp_path) == (None, [])
    assert found(tmp_path / "nowhere") == (None, [])


def test_what_an_interrupted_writer_left_is_never_found_and_removed_by_the_next(tmp_path):
    make(tmp_path, 1)
    abandoned = begin(step_folder(tmp_path, 2))
    fill(abandoned, "half")
    assert found(tmp_path)[0].step == 1
    fresh = begin(step_folder(tmp_path, 2))
    assert fresh == abandoned
    assert list(fresh.iterdir()) == []
    fill(fresh, "half again")
    retain(tmp_path, 5)
    assert strangers(tmp_path) == []
    assert found(tmp_path)[0].step == 1


DAMAGES = {
    "truncated": (lambda path: (path / "engine" / "rank0.pt").write_text("weig"), r"rank0\.pt has 4 bytes, not \d+"),
    "missing": (lambda path: (path / "state.json").unlink(), r"state\.json is missing"),
    "altered": (lambda path: (path / "state.json").write_text("step 8"), r"state\.json does not match its checksum"),
    "a folder in a file's place": (
        lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
        r"state\.json is missing",
    ),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), r"no complete commit here \(no manifest\.json\)"),
    "manifest truncated": (lambda path: (path / MANIFEST).write_text('{"format": 1, "fi'), "manifest.json is damaged"),
    "manifest empty": (lambda path: (path / MANIFEST).write_text(""), "manifest.json is damaged"),
    "manifest binary": (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe\x00"), "manifest.json is damaged"),
    "manifest of another shape": (lambda path: (path / MANIFEST).write_text("[]"), "manifest.json is damaged"),
    "manifest without its format": (
        lambda path: (path / MANIFEST).write_text('{"facts": {"step": 7}, "files": {}}'),
        "manifest.json is damaged",
    ),
    "manifest without checksums": (
        lambda path: (path / MANIFEST).write_text('{"format": 1, "facts": {}, "files": {"state.json": {}}}'),
        "manifest.json is damaged",
    ),
    "manifest of another format": (
        lambda path: (path / MANIFEST).write_text('{"format": 99, "facts": {}, "files": {}}'),
        "written in format 99, this version reads 1",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_commit_is_skipped_with_its_reason_and_the_previous_one_is_used(tmp_path, damage, reason):
    make(tmp_path, 6)
    damage(make(tmp_path, 7).path)
    with pytest.raises(CheckpointError, match=reason):
        verify(step_folder(tmp_path, 7))
    got, reasons = found(tmp_path)
    assert got.step == 6
    assert len(reasons) == 1
    assert "step-00000007" in reasons[0]


def test_facts_altered_on_disk_are_not_believed(tmp_path):
    make(tmp_path, 6)
    manifest = make(tmp_path, 7).path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step": 7', '"step": 9'))
    assert found(tmp_path)[0].step == 6


def test_every_damaged_commit_is_named_when_none_is_left(tmp_path):
    for step in (1, 2):
        (make(tmp_path, step).path / "state.json").unlink()
    got, reasons = found(tmp_path)
    assert got is None
    assert len(reasons) == 2


def test_a_stray_file_named_like_a_commit_is_skipped(tmp_path):
    make(tmp_path, 6)
    (tmp_path / "step-00000009").write_text("not a folder")
    assert found(tmp_path)[0].step == 6


def test_a_commit_under_an_existing_name_replaces_it(tmp_path):
    make(tmp_path, 2, "old")
    make(tmp_path, 2, "new")
    assert (found(tmp_path)[0].path / "state.json").read_text() == "new"
    assert strangers(tmp_path) == []


@pytest.mark.parametrize("replace", [False, True], ids=["a new step", "an existing step"])
def test_a_crash_at_any_moment_leaves_the_last_complete_commit(tmp_path, monkeypatch, replace):
    lost = []
    for root, moment in every_failing_commit(tmp_path, monkeypatch, replace, Crash(), Crash):
        retain(root, 2)  # as a run does before it looks
        got, _ = found(root)
        if got is None or (got.path / "state.json").read_text() not in ("old", "new"):
            lost.append(moment)
        make(root, 3)
        retain(root, 1)
        assert [path.name for path in root.iterdir()] == ["step-00000003"]
    assert lost == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_file_system_that_refuses_is_one_message_that_says_what_to_do(tmp_path, monkeypatch, code):
    make(tmp_path, 1)
    temporary = begin(step_folder(tmp_path, 2))
    fill(temporary, "new")
    with (
        failing_at_call(monkeypatch, 1, OSError(code, os.strerror(code))),
        pytest.raises(
            StorageError, match=rf"step-00000002: cannot write \({os.strerror(code)}, \d+ MiB free\); free space"
        ),
    ):
        commit(temporary, step_folder(tmp_path, 2), {"step": 2})
    assert found(tmp_path)[0].step == 1


@pytest.mark.parametrize("replace", [False, True], ids=["a new step", "an existing step"])
def test_a_disk_that_fills_up_at_any_moment_leaves_the_older_commit_intact(tmp_path, monkeypatch, replace):
    full, lost = OSError(errno.ENOSPC, "No space left on device"), []
    for root, moment in every_failing_commit(tmp_path, monkeypatch, replace, full, StorageError):
        got, _ = found(root)
        if got is None or (got.path / "state.json").read_text() not in ("old", "new"):
            lost.append(moment)
    assert lost == []


def test_a_full_disk_at_the_start_of_a_commit_is_the_same_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    make(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(StorageError, match="No space left on device"):
            begin(step_folder(tmp_path, 2))
    assert found(tmp_path)[0].step == 1


def test_other_errors_of_the_file_system_pass_through_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(StorageError, match="as it was"), storage_errors(tmp_path):
        raise StorageError("as it was")


@contextlib.contextmanager
def failing_removal(monkeypatch, number: int, error: BaseException):
    """Lets the ``number``-th removal of a file or folder fail."""
    calls = 0

    def wrap(name):
        original = getattr(os, name)

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return original(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, wrap(name))
        yield


def test_free_space_is_known_for_a_path_that_does_not_exist_yet(tmp_path):
    assert free_mib(tmp_path / "a" / "b") == pytest.approx(free_mib(tmp_path), abs=64)


def test_retention_keeps_the_newest_and_removes_what_was_abandoned(tmp_path):
    for step in (3, 1, 20, 100):
        make(tmp_path, step)
    begin(step_folder(tmp_path, 101))
    (tmp_path / ".old-step-00000100").mkdir()
    (tmp_path / "final").mkdir()
    retain(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "step-00000020", "step-00000100"]
    retain(tmp_path, 5)
    assert found(tmp_path)[0].step == 100


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def test_retention_keeps_every_kth_step_beside_the_newest(tmp_path):
    for step in (5, 10, 15, 20, 25, 30, 32, 34):
        make(tmp_path, step)
    retain(tmp_path, 2, every=10)
    assert steps_in(tmp_path) == [10, 20, 30, 32, 34]
    retain(tmp_path, 2)
    assert steps_in(tmp_path) == [32, 34]


def test_death_at_any_moment_of_retention_loses_no_commit_that_is_to_stay(tmp_path, monkeypatch):
    """From just after the commit to just after the last removal; the next retention finishes the work."""
    deaths = 0
    for number in range(1, 50):
        root = tmp_path / str(number)
        for step in (10, 15, 20, 25, 30):
            make(root, step)
        begin(step_folder(root, 35))
        died = False
        with failing_removal(monkeypatch, number, Crash()):
            try:
                retain(root, 1, every=20)
            except Crash:
                died = True
        got, _ = found(root)
        assert got is not None
        assert got.step == 30
        verify(step_folder(root, 20))
        retain(root, 1, every=20)
        assert steps_in(root) == [20, 30]
        assert strangers(root) == []
        if not died:
            break
        deaths += 1
    assert deaths >= 4  # three old commits and an abandoned folder, file by file


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_never_removes_the_commit_that_a_resume_would_use(tmp_path, keep):
    for step in (30, 40):
        (make(tmp_path, step).path / "state.json").unlink()
    make(tmp_path, 10)  # the run went on from the start and has just committed
    retain(tmp_path, keep)
    got, _ = found(tmp_path)
    assert got is not None
    assert got.step == 10


def test_a_small_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "identity.json"
    write_atomic(path, "old")
    with failing_at_call(monkeypatch, 2, Crash()), pytest.raises(Crash):  # after the text, before it is durable
        write_atomic(path, "new, and longer")
    assert path.read_text() == "old"
    full = OSError(errno.ENOSPC, "No space left on device")
    with failing_at_call(monkeypatch, 1, full), pytest.raises(StorageError, match=r"identity\.json: cannot write"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["identity.json"]
