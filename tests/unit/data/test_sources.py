import base64
import dataclasses
import errno
import hashlib
import io
import tarfile
import threading
import zipfile

import pytest

from common.errors import SourceError, StorageError
from data import sources
from data.sources import MARKER, SOURCES, Source, default_cache, fetch, locked


def tar_bytes(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return buffer.getvalue()


ARCHIVE = tar_bytes(["package/assets/1.webp", "package/other.txt"])
SUM = "sha512:" + base64.b64encode(hashlib.sha512(ARCHIVE).digest()).decode()
OBJECTS = Source("objects", "foreground", "npm", "objects", "1.0", SUM, "package/assets", "MIT")
PHOTOS = Source("photos", "photo", "npm", "photos", "1.0", SUM, "package/assets", "MIT")


def serve(source, folder):
    path = folder / f"{source.name}.tgz"
    path.write_bytes(ARCHIVE)
    return path


def forbid(source, folder):
    raise AssertionError("downloaded again")


def test_sources_are_fetched_once_and_then_come_from_the_cache(tmp_path):
    first = fetch(tmp_path, sources=[OBJECTS, PHOTOS], download=serve)
    assert [(s.name, (s.folder / "1.webp").read_bytes()) for s in first.sources] == [
        ("objects", b"abc"),
        ("photos", b"abc"),
    ]
    assert not (tmp_path / "objects" / "other.txt").exists()
    assert fetch(tmp_path, sources=[OBJECTS, PHOTOS], download=forbid) == first


def test_a_changed_pin_is_downloaded_again(tmp_path):
    fetch(tmp_path, sources=[OBJECTS, PHOTOS], download=serve)
    (tmp_path / "objects" / MARKER).write_text("sha512:older")
    lines = []
    fetch(tmp_path, lines.append, sources=[OBJECTS, PHOTOS], download=serve)
    assert lines == ["source objects: downloading objects 1.0", "source photos: in the cache"]


def test_the_leftover_of_a_killed_download_is_removed_and_redone(tmp_path):
    half = tmp_path / ".tmp-objects-abc"
    half.mkdir()
    (half / "half").write_bytes(b"x")
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "1.webp").write_bytes(b"torn")  # no marker: extraction never ended
    fetched = fetch(tmp_path, sources=[OBJECTS, PHOTOS], download=serve)
    assert not half.exists()
    assert (fetched.sources[0].folder / "1.webp").read_bytes() == b"abc"


def test_an_interrupted_download_leaves_no_trace(tmp_path):
    def interrupt(source, folder):
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, sources=[OBJECTS, PHOTOS], download=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_wrong_checksum_is_never_used(tmp_path):
    bad = dataclasses.replace(OBJECTS, name="bad", checksum="sha256:" + "0" * 64)
    fetched = fetch(tmp_path, sources=[bad, OBJECTS, PHOTOS], download=serve)
    assert [source.name for source in fetched.sources] == ["objects", "photos"]
    assert fetched.skipped["bad"].startswith("checksum of bad.tgz is ")
    assert not (tmp_path / "bad").exists()


def test_an_unreachable_source_is_skipped_with_its_reason(tmp_path):
    def download(source, folder):
        if source.name == "gone":
            raise SourceError("no route to host")
        return serve(source, folder)

    gone, lines = dataclasses.replace(OBJECTS, name="gone"), []
    dependent = dataclasses.replace(OBJECTS, name="dependent", needs="gone")
    fetched = fetch(tmp_path, lines.append, sources=[gone, dependent, OBJECTS, PHOTOS], download=download)
    assert fetched.skipped == {"gone": "no route to host", "dependent": "needs gone, which was skipped"}
    assert "source gone: skipped, no route to host" in lines


@pytest.mark.parametrize(("left", "kind"), [([OBJECTS], "photo"), ([PHOTOS], "foreground")])
def test_only_a_lack_of_objects_or_photos_is_an_error(tmp_path, left, kind):
    with pytest.raises(SourceError, match=f"no {kind} source could be fetched"):
        fetch(tmp_path, sources=left, download=serve)


def test_an_archive_that_is_none_or_lacks_the_folder_is_skipped(tmp_path):
    def download(source, folder):
        if source.name != "torn":
            return serve(source, folder)
        path = folder / "torn.tgz"
        path.write_bytes(b"not a tar")
        return path

    pin = "sha256:" + hashlib.sha256(b"not a tar").hexdigest()
    torn = dataclasses.replace(OBJECTS, name="torn", checksum=pin)
    empty = dataclasses.replace(OBJECTS, name="empty", keep="package/nothing")
    skipped = fetch(tmp_path, sources=[torn, empty, OBJECTS, PHOTOS], download=download).skipped
    assert "cannot be unpacked" in skipped["torn"]
    assert skipped["empty"] == "empty.tgz holds no package/nothing"


@pytest.mark.parametrize("tampered", [False, True])
def test_a_wheel_is_checked_file_by_file(tmp_path, tampered):
    def download(source, folder):
        if source.client != "pip":
            return serve(source, folder)
        path = folder / "x-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("x/a.jpg", b"evil" if tampered else b"good")
            wheel.writestr("x/code.py", b"")
        return path

    files = {"x/a.jpg": hashlib.sha256(b"good").hexdigest()}
    wheel = Source("wheel", "photo", "pip", "x", "1", "", "x", "MIT", files=files)
    fetched = fetch(tmp_path, sources=[wheel, OBJECTS, PHOTOS], download=download)
    assert ("wheel" in fetched.skipped) == tampered
    if tampered:
        assert fetched.skipped["wheel"].startswith("checksum of x/a.jpg in x-1")
    else:
        assert sorted(path.name for path in (tmp_path / "wheel").iterdir()) == [MARKER, "a.jpg"]


def test_a_client_that_is_missing_fails_or_hangs_gives_one_line(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="no-such-client is not installed"):
        sources._run(["no-such-client"], tmp_path)
    with pytest.raises(SourceError, match="`sh -c echo one >&2; echo two >&2; exit 3` failed: two"):
        sources._run(["sh", "-c", "echo one >&2; echo two >&2; exit 3"], tmp_path)
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.1)
    with pytest.raises(SourceError, match=r"no answer within 0\.1 s"):
        sources._run(["sleep", "5"], tmp_path)


def test_package_lists_are_updated_once_and_only_by_root(tmp_path, monkeypatch):
    calls = []

    def run(command, folder):
        calls.append(command[1])
        if calls == ["download"]:
            raise SourceError("unable to locate package")
        (folder / "x.deb").write_bytes(b"")

    source = dataclasses.replace(OBJECTS, client="apt")
    monkeypatch.setattr(sources, "_run", run)
    monkeypatch.setattr(sources.os, "geteuid", lambda: 0)
    sources._download(source, tmp_path)
    assert calls == ["download", "update", "download"]
    calls.clear()
    monkeypatch.setattr(sources.os, "geteuid", lambda: 1000)
    with pytest.raises(SourceError, match="unable to locate"):
        sources._download(source, tmp_path)
    assert calls == ["download"]


def test_a_full_disk_stops_the_fetch_as_a_storage_error(tmp_path):
    def download(source, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="no space left"):
        fetch(tmp_path, sources=[OBJECTS, PHOTOS], download=download)


def test_concurrent_builders_wait_for_each_other(tmp_path):
    lines, entered = [], threading.Event()

    def second():
        with locked(tmp_path / "lock", lines.append):
            entered.set()

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(5)
    assert entered.is_set()
    assert "waiting for another process" in lines[0]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OMNIALPHA_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("OMNIALPHA_CACHE")
    assert default_cache().parts[-3:] == (".cache", "omnialpha", "sources")


def test_every_pinned_source_has_a_checksum_and_a_licence():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    for source in SOURCES:
        assert source.identity.startswith(("sha256:", "sha512:"))
        assert source.licence
        assert bool(source.checksum) != bool(source.files)
