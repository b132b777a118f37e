import errno
import shutil

import numpy as np
import pytest
import torch

from common.errors import ConfigError, DataError, StorageError
from data.build import MANIFEST, build_dataset, read_manifest
from data.inspect import contact_sheet
from data.library import assign_splits, collect_foregrounds, collect_photos, split_library
from data.records import SPLITS, RecordDataset, content_digest, verify
from data.rgba import over
from data.tasks import TASKS
from tests.unit.data.library_helpers import SMALL, make_sources


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def build(fetched, cache):
    return lambda out, **changes: build_dataset(
        SMALL.model_copy(update=changes), out, cache, fetcher=lambda *_: fetched
    )


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    return out, build(out)


def records_of(folder, task):
    for split in SPLITS:
        dataset = RecordDataset(folder, split)
        if task in dataset.tasks:
            for index in dataset.positions(task):
                yield dataset.record(int(index))


def test_a_built_dataset_is_sound_and_described_by_its_manifest(built):
    folder, manifest = built
    assert verify(folder) == []
    assert read_manifest(folder) == manifest
    assert manifest.content_digest == content_digest(folder)
    assert manifest.skipped_sources == {"mate-photos": "not reachable"}
    assert set(manifest.shards) == {path.name for path in folder.glob("*.parquet")}
    assert {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet"} <= set(manifest.shards)
    for split in SPLITS:
        dataset = RecordDataset(folder, split)
        assert manifest.counts[split] == {task: len(dataset.positions(task)) for task in dataset.tasks}
    assert set().union(*manifest.counts.values()) == set(TASKS)


def test_stored_layers_recompose_to_the_stored_image(built):
    folder, _ = built
    count = 0
    for record in records_of(folder, "layer_decomposition"):
        sample = record.decode()
        assert (over(sample.targets_LCHW) - sample.inputs[0]).abs().max() <= 1.5 / 255
        assert (sample.targets_LCHW[0, 3] == 1).all()
        count += 1
    assert count > 3


def test_the_tasks_of_a_scene_share_its_layers(built):
    folder, _ = built
    by_scene = {}
    for task in set(TASKS) - {"text_to_rgba", "referring_matting"}:
        for record in records_of(folder, task):
            by_scene.setdefault(record.id.removesuffix(f"-{task}"), {})[task] = record
    for records in by_scene.values():
        layers = records["layer_decomposition"].targets
        assert records["automatic_matting"].targets == records["mask_matting"].targets == layers[1:]
        assert records["object_removal"].targets == layers[:1]
        assert records["foreground_to_image"].inputs == layers[1:]
        assert records["background_to_image"].inputs == layers[:1]
        whole = records["layer_decomposition"].inputs
        assert records["foreground_to_image"].targets == records["background_to_image"].targets == whole


def test_a_removal_mask_covers_all_that_the_object_changed(built):
    folder, _ = built
    for record in records_of(folder, "object_removal"):
        sample = record.decode()
        changed = (sample.inputs[0] - sample.targets_LCHW[0]).abs().amax(0) > 6 / 255
        assert not (changed & (sample.inputs[1][0] == 0)).any()
        assert set(sample.inputs[1][:3].unique().tolist()) <= {0.0, 1.0}


def test_a_referred_layer_is_what_the_image_shows_of_it(built):
    folder, _ = built
    count = 0
    for record in records_of(folder, "referring_matting"):
        sample = record.decode()
        layer, image = sample.targets_LCHW[0], sample.inputs[0]
        solid = layer[3] == 1
        assert (layer[:3, solid] - image[:3, solid]).abs().max() <= 1.5 / 255
        assert len(set(record.object_groups)) == 2
        assert record.caption in record.prompt
        count += 1
    assert count > 0


def test_a_drawn_object_is_centred_and_alone(built):
    folder, _ = built
    for record in records_of(folder, "text_to_rgba"):
        alpha = record.decode().targets_LCHW[0, 3]
        rows, columns = torch.nonzero(alpha.amax(1)).flatten(), torch.nonzero(alpha.amax(0)).flatten()
        assert abs(int(rows[0]) - (31 - int(rows[-1]))) <= 2
        assert abs(int(columns[0]) - (31 - int(columns[-1]))) <= 2
        assert (record.photo_group, record.inputs) == ("", ())


def test_transparent_pixels_carry_the_objects_colour(built):
    folder, _ = built
    for record in records_of(folder, "text_to_rgba"):
        layer = record.decode().targets_LCHW[0]
        hidden, visible = layer[:3, layer[3] == 0].mean(1), layer[:3, layer[3] == 1].mean(1)
        assert (hidden - visible).abs().max() < 0.05  # the sources hold black there


def test_no_group_crosses_splits_and_held_out_categories_are_tested_alone(built):
    _, manifest = built
    for groups in (manifest.object_groups, manifest.photo_groups):
        listed = [group for split in SPLITS for group in groups[split]]
        assert len(listed) == len(set(listed))
    assert {"drum", "violin"} <= set(manifest.object_groups["test"])


def test_records_use_only_groups_of_their_split(built):
    folder, manifest = built
    for split in SPLITS:
        dataset = RecordDataset(folder, split)
        for index in range(len(dataset)):
            record = dataset.cheap(index)
            assert set(record.object_groups) <= set(manifest.object_groups[split])
            assert {record.photo_group} - {""} <= set(manifest.photo_groups[split])


def test_an_equal_seed_gives_equal_content_and_another_seed_does_not(built, build, tmp_path):
    _, manifest = built
    assert build(tmp_path / "again").content_digest == manifest.content_digest
    assert build(tmp_path / "other", seed=1).content_digest != manifest.content_digest


def test_workers_do_not_change_the_content(built, build, tmp_path):
    _, manifest = built
    assert build(tmp_path / "parallel", workers=2).content_digest == manifest.content_digest


def test_an_equal_dataset_is_reused_and_another_configuration_is_refused(built, build):
    folder, manifest = built
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build(folder, workers=2) == manifest
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ConfigError, match=r"another configuration \(size: 32 there, 48 asked for\); name another"):
        build(folder, size=48)


def test_a_reused_dataset_with_a_missing_shard_says_so(build, built, tmp_path):
    folder, _ = built
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "val-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"val-00000-of-00001\.parquet: no such file; remove"):
        build(copy)


def test_a_folder_that_is_no_dataset_is_left_alone(build, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        build(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_damaged_manifest_is_named(build, built, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        build(tmp_path / "set")


def test_the_leftover_of_an_interrupted_build_is_replaced(built, build, tmp_path):
    _, manifest = built
    (tmp_path / "set.tmp").mkdir()
    (tmp_path / "set.tmp" / "train-00007-of-00009.parquet").write_bytes(b"half")
    assert build(tmp_path / "set").shards.keys() == manifest.shards.keys()
    assert not (tmp_path / "set.tmp").exists()


def test_a_full_disk_is_a_storage_error_and_leaves_no_dataset(build, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.schema.pq.write_table", refuse)
    with pytest.raises(StorageError, match="no space left; free space"):
        build(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_tasks_can_be_chosen(build, tmp_path):
    manifest = build(tmp_path / "set", tasks=("referring_matting",))
    assert manifest.counts["train"] == {"referring_matting": 6}


def test_the_library_leaves_out_mirrors_symbols_small_and_opaque_pictures(fetched):
    objects = collect_foregrounds(fetched, 1000)
    keys = {item.key for item in objects}
    assert {"tuxpaint-stamps:fruit/apple.png", "fluent-emoji:1f34c", "fluent-emoji:1f40e"} <= keys
    assert len(keys) == 14
    assert {item.name for item in objects} >= {"a red apple", "a plum", "a bee", "a banana", "an otter"}
    assert len({item.group for item in objects if "cow" in item.key}) == 1
    assert len(collect_photos(fetched)) == 6


def test_a_limit_takes_an_even_and_deterministic_share_of_each_source(fetched):
    few = collect_foregrounds(fetched, 4)
    assert few == collect_foregrounds(fetched, 4)
    assert [item.source for item in few] == ["tuxpaint-stamps"] * 4 + ["fluent-emoji"] * 2
    assert len({item.category for item in few if item.source == "tuxpaint-stamps"}) > 2


def test_a_library_too_small_to_split_is_an_error_with_a_remedy(fetched):
    photos = collect_photos(fetched)
    with pytest.raises(DataError, match="are too few; raise"):
        split_library(collect_foregrounds(fetched, 1000), photos[:1], SMALL)


def test_splits_do_not_depend_on_the_order_of_groups():
    groups = [f"g{k:02d}" for k in range(20)]
    splits = assign_splits(groups, 0.1, 0.2)
    assert splits == assign_splits(reversed(groups), 0.1, 0.2)
    assert [list(splits.values()).count(name) for name in ("train", "val", "test")] == [14, 2, 4]


def test_a_contact_sheet_shows_every_task(built, tmp_path):
    folder, _ = built
    out = contact_sheet(folder, "train", tmp_path / "sheet.png", rows=2)
    assert out.is_file()
    with pytest.raises(ConfigError, match="rows=0"):
        contact_sheet(folder, "train", out, rows=0)


def test_config_refuses_unknown_and_repeated_tasks():
    with pytest.raises(ValueError, match="unknown task 'x'"):
        type(SMALL)(tasks=("x",))
    with pytest.raises(ValueError, match="listed twice"):
        type(SMALL)(tasks=("text_to_rgba", "text_to_rgba"))


def test_digests_are_strings_of_numbers_not_of_memory(built):
    folder, _ = built
    dataset = RecordDataset(folder, "train")
    assert np.unique([len(digest) for k in range(len(dataset)) for digest in dataset.digests(k)]).tolist() == [32]
