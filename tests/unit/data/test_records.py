import dataclasses
import errno
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from common.errors import ConfigError, DataError, StorageError
from data.records import RecordDataset, content_digest, verify
from data.schema import LayerImage, record_from_row, write_shard
from data.tasks import TASKS
from tests.unit.data.helpers import disc, make_record, write_dataset


def test_every_task_is_written_and_read_back_alike(tmp_path):
    records = [make_record(task, k) for k, task in enumerate(TASKS)]
    dataset = RecordDataset(write_dataset(tmp_path / "d", records), "train")
    assert len(dataset) == len(TASKS)
    assert set(dataset.tasks) == set(TASKS)
    for k, record in enumerate(records):
        assert dataset.record(k) == record
        assert dataset.prompt(k) == record.prompt
        assert dataset.digests(k) == tuple(image.digest for image in record.inputs + record.targets)
        sample = dataset.record(k).decode()
        assert sample.targets_LCHW.shape == (len(TASKS[record.task].targets), 4, 16, 16)
        assert [tuple(image.shape) for image in sample.inputs] == [(4, 16, 16)] * len(TASKS[record.task].inputs)


def test_records_are_found_over_shards_row_groups_and_a_small_cache(tmp_path):
    records = [make_record(number=k) for k in range(90)]
    dataset = RecordDataset(write_dataset(tmp_path / "d", records, shards=2), "train")
    order = records[0::2] + records[1::2]
    for k in np.random.default_rng(0).permutation(90):
        assert dataset.record(int(k)) == order[k]
    assert dataset.positions("automatic_matting").tolist() == list(range(90))


def test_a_dataset_survives_pickling(tmp_path):
    dataset = RecordDataset(write_dataset(tmp_path / "d", [make_record(number=k) for k in range(5)]), "train")
    dataset.record(0)
    assert pickle.loads(pickle.dumps(dataset)).record(3) == dataset.record(3)  # noqa: S301


def test_pixels_survive_storage_to_half_a_level():
    image = disc(32)
    record = dataclasses.replace(make_record(size=32), targets=(LayerImage.encode("foreground", image),))
    assert (record.decode().targets_LCHW[0] - image).abs().max() <= 0.5 / 255 + 1e-6


def opaque_record(number=7):
    flat = torch.full((4, 16, 16), 0.5)
    flat[3] = 1
    record = make_record(number=number)
    return dataclasses.replace(record, targets=(LayerImage.encode("foreground", flat),))


def test_a_foreground_without_alpha_is_refused_with_its_row(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record(number=0), opaque_record()])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet row 1, field target_images\[0\].*no alpha"):
        RecordDataset(folder, "train").record(1).decode()


def test_an_rgb_foreground_is_refused_too(tmp_path):
    rgb = LayerImage.encode("foreground", np.full((16, 16, 3), 90, np.uint8))
    record = dataclasses.replace(make_record(), targets=(rgb,))
    with pytest.raises(DataError, match="target_images"):
        record.decode()


def undecodable_record(number=9):
    record = make_record(number=number)
    return dataclasses.replace(record, inputs=(dataclasses.replace(record.inputs[0], png=b"not an image"),))


def test_undecodable_bytes_name_file_row_and_field(tmp_path):
    folder = write_dataset(tmp_path / "d", [undecodable_record()])
    with pytest.raises(DataError, match=r"parquet row 0, field input_images\[0\]: cannot be decoded"):
        RecordDataset(folder, "train").record(0).decode()


def test_pixels_that_do_not_match_their_digest_are_refused():
    record = make_record()
    wrong = dataclasses.replace(record.targets[0], digest="0" * 32)
    with pytest.raises(DataError, match="stored digest"):
        dataclasses.replace(record, targets=(wrong,)).decode()


def test_images_of_unequal_size_are_refused():
    record = dataclasses.replace(make_record(), targets=(LayerImage.encode("foreground", disc(8)),))
    with pytest.raises(DataError, match="differ in size"):
        record.decode()


def test_skip_counts_bad_rows_by_reason_and_keeps_a_deterministic_index(tmp_path):
    records = [make_record(number=0), opaque_record(1), undecodable_record(2), make_record(number=3), opaque_record(4)]
    folder = write_dataset(tmp_path / "d", records)
    first, second = (RecordDataset(folder, "train", on_bad_row="skip") for _ in range(2))
    assert [first.record(k).id for k in range(len(first))] == [records[0].id, records[3].id]
    assert sorted(first.skipped.values()) == [1, 2]
    assert any("no alpha" in reason for reason in first.skipped)
    assert first.skipped == second.skipped


def test_a_split_without_any_usable_row_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable record"):
        RecordDataset(write_dataset(tmp_path / "d", [opaque_record()]), "train", on_bad_row="skip")


def test_an_unknown_row_policy_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'fail' or 'skip'"):
        RecordDataset(tmp_path, "train", on_bad_row="ignore")


def test_a_missing_folder_and_a_missing_split_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="omnialpha data build"):
        RecordDataset(tmp_path / "nowhere", "train")
    folder = write_dataset(tmp_path / "d", [make_record()])
    with pytest.raises(DataError, match=r"no shard of split 'val' \(splits present: train\)"):
        RecordDataset(folder, "val")


def test_a_missing_shard_is_named(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record(number=k) for k in range(6)], shards=3)
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="shard 1 of 3"):
        RecordDataset(folder, "train")


@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_a_corrupt_shard_is_named(tmp_path, damage):
    folder = write_dataset(tmp_path / "d", [make_record()])
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(b"hello" if damage == "text" else path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet: not a readable parquet file.*data build"):
        RecordDataset(folder, "train")


def rewrite(folder, change):
    path = folder / "train-00000-of-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def test_another_schema_version_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record()])
    rewrite(folder, lambda table: table.replace_schema_metadata({"omnialpha.schema_version": "99"}))
    with pytest.raises(DataError, match="schema version 99, this program reads 1"):
        RecordDataset(folder, "train")


def test_a_missing_column_is_named(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record()])
    rewrite(folder, lambda table: table.drop_columns(["licence"]))
    with pytest.raises(DataError, match="field licence"):
        RecordDataset(folder, "train")


def test_roles_that_do_not_fit_the_task_are_named_with_their_row(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record(number=k) for k in range(2)])

    def change(table):
        roles = pa.array([["foreground"], ["background"]], type=pa.list_(pa.string()))
        return table.set_column(table.schema.get_field_index("target_roles"), table.schema.field("target_roles"), roles)

    rewrite(folder, change)
    with pytest.raises(DataError, match=r"row 1, field target_roles: task automatic_matting needs \['foreground'\]"):
        RecordDataset(folder, "train")


def test_a_wrong_number_of_digests_is_named():
    row = {f"{side}_{part}": ["x"] for side in ("input", "target") for part in ("roles", "digests", "images")}
    row["target_digests"] = []
    with pytest.raises(DataError, match="f row 3, field target_digests: 0 digests for 1 roles"):
        record_from_row(row, "f row 3")


def test_an_unknown_task_is_not_written(tmp_path):
    with pytest.raises(DataError, match="unknown task 'sorcery'"):
        write_shard(tmp_path / "x.parquet", [dataclasses.replace(make_record(), task="sorcery")])


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"row 1, field id: .* occurs twice"):
        RecordDataset(write_dataset(tmp_path / "d", [make_record(), make_record()]), "train")


def test_a_full_disk_is_a_storage_error_and_leaves_no_shard(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.schema.pq.write_table", refuse)
    with pytest.raises(StorageError, match=r"x\.parquet: no space left; free space"):
        write_shard(tmp_path / "x.parquet", [make_record()])
    assert not (tmp_path / "x.parquet").exists()


def test_the_content_digest_sees_pixels_and_prompts_but_not_compression(tmp_path):
    records = [make_record(number=k) for k in range(3)]
    folder = write_dataset(tmp_path / "a", records)
    before = content_digest(folder)
    rewrite(folder, lambda table: table)  # same rows, default compression and other row groups
    assert content_digest(folder) == before
    other = [*records[:2], dataclasses.replace(records[2], prompt="Matte it.")]
    assert content_digest(write_dataset(tmp_path / "b", other)) != before
    changed = [*records[:2], dataclasses.replace(records[2], targets=make_record(number=30).targets)]
    assert content_digest(write_dataset(tmp_path / "c", changed)) != before


def test_verify_lists_every_problem_and_is_silent_on_a_sound_dataset(tmp_path):
    assert verify(write_dataset(tmp_path / "good", [make_record()])) == []
    bad = write_dataset(tmp_path / "bad", [opaque_record(0), make_record(number=1), undecodable_record(2)])
    problems = verify(bad)
    assert len(problems) == 2
    assert "row 0" in problems[0]
    assert "row 2" in problems[1]
    assert len(verify(tmp_path / "nowhere")) == 1


def test_records_know_their_size_without_being_decoded(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record(number=k, size=size) for k, size in enumerate((16, 32, 16))])
    data = RecordDataset(folder, "train")
    assert data.sizes == [(16, 16), (32, 32), (16, 16)]
    assert data.record(1).decode().targets_LCHW.shape[-2:] == (32, 32)


def test_shards_from_before_sizes_were_stored_can_still_be_read(tmp_path):
    folder = write_dataset(tmp_path / "d", [make_record(number=k) for k in range(3)])
    rewrite(folder, lambda table: table.drop_columns(["size"]))
    data = RecordDataset(folder, "train")
    assert data.sizes == [None] * 3
    assert data.record(2).decode().targets_LCHW.shape[-2:] == (16, 16)
    assert verify(folder) == []
