"""Sources that only training draws on: furniture and wallpapers."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.build import build_dataset
from data.config import DataConfig
from data.library import collect_more
from data.records import RecordDataset
from data.sources import MORE_SOURCES, SOURCES, Fetched, FetchedSource, Source, fetch
from tests.unit.data.library_helpers import SMALL, make_sources, shape
from tests.unit.data.test_sources import OBJECTS, PHOTOS, serve

CATALOGUE = """\
id=maker
name#1=Arm chair (red)
icon#1=/maker/chair.png
category#1=Living room
name#2=Drum
icon#2=/maker/drum.png
category#2=Miscellaneous
name#3=Thimble
icon#3=/maker/small.png
category#3=Miscellaneous
name#4=Lost
icon#4=/maker/lost.png
category#4=Miscellaneous
"""


def write_furniture(folder: Path) -> Path:
    maker = folder / "maker"
    maker.mkdir(parents=True)
    (folder / "PluginFurnitureCatalog.properties").write_text(CATALOGUE, encoding="latin-1")
    Image.fromarray(shape(1)).save(maker / "chair.png")
    Image.fromarray(shape(2)).save(maker / "drum.png")
    Image.fromarray(shape(3, 40, 40)).save(maker / "small.png")
    return folder


def write_wallpapers(folder: Path) -> Path:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))
    for name, size in {
        "hills/images/480x400.jpg": (480, 400),
        "hills/images/640x480.jpg": (640, 480),
        "hills/screenshot.jpg": (480, 400),
        "sea.png": (500, 420),
        "icon.png": (64, 64),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise.resize(size).save(path)
    return folder


@pytest.fixture
def both(tmp_path) -> tuple[Fetched, Fetched]:
    """The tiny library without and with more sources."""
    plain = make_sources(tmp_path / "plain")
    furniture = write_furniture(tmp_path / "furniture" / "Maker")
    papers = write_wallpapers(tmp_path / "papers")
    more = (
        FetchedSource("furniture", "more foreground", "1", "CC-BY", furniture.parent, "sha256:e"),
        FetchedSource("papers", "more photo", "1", "CC-BY", papers, "sha256:f"),
    )
    return plain, dataclasses.replace(plain, sources=(*plain.sources, *more))


def test_furniture_has_names_and_a_wallpaper_is_taken_once_in_its_largest_size(both):
    plain, wide = both
    assert collect_more(plain) == type(collect_more(plain))((), ())
    more = collect_more(wide)
    assert [item.name for item in more.foregrounds] == ["an arm chair red", "a drum"]
    assert {item.category for item in more.foregrounds} == {"furniture/living room", "furniture/miscellaneous"}
    assert [photo.key for photo in more.photos] == ["papers:hills/images", "papers:sea.png"]
    assert more.photos[0].path.name == "640x480.jpg"


def test_more_sources_change_training_alone_and_bring_nothing_that_is_held_out(both, tmp_path):
    asked = []

    def build(fetched: Fetched, name: str, config: DataConfig):
        def fetcher(cache, progress, sources):
            asked.append(sources)
            return fetched

        return build_dataset(config, tmp_path / name, tmp_path / "cache", fetcher=fetcher)

    narrow = build(both[0], "narrow", SMALL)
    wide = build(both[1], "wide", SMALL.model_copy(update={"more_sources": True, "train_scenes": 40}))
    assert asked == [SOURCES, (*SOURCES, *MORE_SOURCES)]
    for split in ("val", "test"):
        assert narrow.object_groups[split] == wide.object_groups[split]
        ours, theirs = (RecordDataset(tmp_path / name, split) for name in ("narrow", "wide"))
        assert [ours.record(k).targets for k in range(len(ours))] == [
            theirs.record(k).targets for k in range(len(ours))
        ]
    added = set(wide.object_groups["train"]) - set(narrow.object_groups["train"])
    assert len(added) == 1  # the arm chair; drums are for testing
    assert set(wide.photo_groups["train"]) - set(narrow.photo_groups["train"]) == {
        "papers:hills/images",
        "papers:sea.png",
    }
    used = {RecordDataset(tmp_path / "wide", "train").cheap(k).photo_group for k in range(80)}
    assert used & {"papers:hills/images", "papers:sea.png"}


def test_a_dataset_from_before_there_were_more_sources_is_equal_to_one_without_them():
    assert "more_sources" not in SMALL.identity()
    assert SMALL.model_copy(update={"more_sources": True}).identity()["more_sources"] is True


def test_nested_catalogues_are_unpacked_and_a_torn_one_skips_the_source(tmp_path):
    def archive(folder: Path, content: bytes) -> Path:
        path = folder / "f-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("f/Maker.sh3f", content)
        return path

    write_furniture(tmp_path / "loose")
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as inner:
        for path in (tmp_path / "loose").rglob("*.*"):
            inner.write(path, path.relative_to(tmp_path / "loose"))
        inner.writestr("maker/model.obj", "no picture")
    for name, content in {"good": (tmp_path / "inner.zip").read_bytes(), "torn": b"torn"}.items():
        files = {"f/Maker.sh3f": hashlib.sha256(content).hexdigest()}
        source = Source(name, "more foreground", "pip", "f", "1", "", "f", "MIT", nested="*.sh3f", files=files)

        def download(wanted, folder, content=content):
            return archive(folder, content) if wanted.client == "pip" else serve(wanted, folder)

        fetched = fetch(tmp_path / name, sources=[source, OBJECTS, PHOTOS], download=download)
        if name == "torn":
            assert "Maker.sh3f in f-1-py3-none-any.whl cannot be unpacked" in fetched.skipped["torn"]
        else:
            kept = {path.name for path in (tmp_path / name / name / "Maker").rglob("*") if path.is_file()}
            assert kept == {"PluginFurnitureCatalog.properties", "chair.png", "drum.png", "small.png"}
            assert [item.name for item in collect_more(fetched).foregrounds] == ["an arm chair red", "a drum"]
