"""Importing OmniAlpha's JSONL and plain folders: what comes in, what is refused, and where it lands."""

import json

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, DataError
from data import importer
from data.import_rows import Source, parse_source
from data.importer import ImportOptions, draw_splits, import_dataset
from data.manifest import read_manifest
from data.records import RecordDataset, content_digest, verify
from data.rgba import over, to_uint8_hwc
from tests.unit.data.import_helpers import SIZE, decomposition, pictures, save, write_jsonl, write_record

TRAIN = ImportOptions(size=SIZE, val_share=0, test_share=0)


@pytest.fixture
def bring(tmp_path):
    """Imports sources to a new folder; sources are paths or :class:`Source`."""

    def run(*sources, options=TRAIN, out="out", **changes):
        given = [source if isinstance(source, Source) else Source(source) for source in sources]
        values = {**{k: getattr(options, k) for k in options.__dataclass_fields__}, **changes}
        return import_dataset(given, tmp_path / out, ImportOptions(**values))

    return run


def test_a_record_of_the_datasets_size_round_trips_without_loss(tmp_path, bring):
    bring(write_jsonl(tmp_path / "in" / "train.jsonl", [decomposition(tmp_path / "in", 3)]))
    assert verify(tmp_path / "out") == []
    record = RecordDataset(tmp_path / "out", "train").record(0)
    assert (record.id, record.task, record.prompt) == ("scene-3", "layer_decomposition", "Decompose the image.")
    sample, drawn = record.decode(), pictures(3)
    assert np.array_equal(to_uint8_hwc(sample.inputs[0]), drawn["image"])
    assert np.array_equal(to_uint8_hwc(sample.targets_LCHW[0]), drawn["background"])
    assert np.array_equal(to_uint8_hwc(sample.targets_LCHW[1]), drawn["foreground"])


def test_the_manifest_describes_the_import_and_names_no_folder_of_the_machine(tmp_path, bring):
    source = write_jsonl(tmp_path / "in" / "train.jsonl", [decomposition(tmp_path / "in", k) for k in range(3)])
    manifest = bring(source, licence="CC0")
    assert read_manifest(tmp_path / "out") == manifest
    assert manifest.content_digest == content_digest(tmp_path / "out")
    assert manifest.counts == {"train": {"layer_decomposition": 3}}
    assert manifest.object_groups == {"train": ["scene-0", "scene-1", "scene-2"]}
    assert [(s.name, s.kind, s.licence) for s in manifest.sources] == [("train", "import-jsonl", "CC0")]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_the_same_input_gives_the_same_content_digest_wherever_it_lies(tmp_path, bring):
    for place in ("here", "there"):
        rows = [decomposition(tmp_path / place, k) for k in range(6)]
        bring(write_jsonl(tmp_path / place / "a.jsonl", rows), out=f"out-{place}", val_share=0.3, test_share=0.2)
    assert content_digest(tmp_path / "out-here") == content_digest(tmp_path / "out-there")
    assert not list(tmp_path.glob("*.tmp"))


def row_of(tmp_path, inputs, outputs, **fields):
    drawn = pictures(1)
    for role in (*inputs, *outputs):
        save(tmp_path / f"{role}.png", drawn[role])
    names = {"input_images": [f"{r}.png" for r in inputs], "output_images": [f"{r}.png" for r in outputs]}
    return {"id": 1, "prompt": "Do it.", **names, **fields}


@pytest.mark.parametrize(
    ("inputs", "outputs", "begins", "task"),
    [
        ([], ["foreground"], False, "text_to_rgba"),
        ([], ["foreground"], None, "text_to_rgba"),
        (["image", "mask"], ["foreground"], False, "mask_matting"),
        (["image", "mask"], ["background"], True, "object_removal"),
        (["image"], ["background", "foreground"], True, "layer_decomposition"),
        (["image"], ["background", "foreground"], None, "layer_decomposition"),
    ],
)
def test_the_task_follows_from_the_roles(tmp_path, bring, inputs, outputs, begins, task):
    row = row_of(tmp_path, inputs, outputs) | ({} if begins is None else {"begin_with_bg": begins})
    assert bring(write_jsonl(tmp_path / "a.jsonl", [row])).counts == {"train": {task: 1}}


@pytest.mark.parametrize(
    ("inputs", "outputs", "fields", "message"),
    [
        (["image"], ["foreground"], {}, "may be automatic_matting or referring_matting or foreground_to_image or"),
        (["image", "mask"], ["background"], {}, "may be mask_matting or object_removal"),
        (
            ["image"],
            ["background"],
            {"begin_with_bg": True},
            "opaque may be foreground_to_image or background_to_image; say which with --task",
        ),
        (["image"], ["foreground"], {"task": "mask_matting"}, r"needs inputs \['image', 'mask'\]"),
        (["image", "mask"], ["background"], {"task": "object_removal", "begin_with_bg": False}, "needs inputs"),
        (["image"], ["foreground"], {"task": "cutting"}, "unknown task 'cutting'; known tasks: text_to_rgba"),
    ],
)
def test_roles_that_fit_no_task_or_several_are_one_message(tmp_path, bring, inputs, outputs, fields, message):
    source = write_jsonl(tmp_path / "a.jsonl", [row_of(tmp_path, inputs, outputs, **fields)])
    with pytest.raises(DataError, match=rf"a\.jsonl line 1, field task: .*{message}"):
        bring(source)


def test_a_rows_own_task_goes_before_the_one_given_for_its_source(tmp_path, bring):
    rows = [row_of(tmp_path, ["image"], ["foreground"]), row_of(tmp_path, ["image"], ["foreground"])]
    rows[1] |= {"id": "2", "task": "referring_matting"}
    manifest = bring(Source(write_jsonl(tmp_path / "a.jsonl", rows), task="automatic_matting"))
    assert manifest.counts == {"train": {"automatic_matting": 1, "referring_matting": 1}}


def good(tmp_path, **fields):
    return decomposition(tmp_path, 0, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": None}, "field id: missing; every row needs an id"),
        ({"id": True}, "field id: True"),
        ({"id": "\ud800"}, "field id: .* is no valid Unicode"),
        ({"prompt": "  "}, "field prompt: '  '; every row needs an instruction"),
        ({"prompt": 5}, "field prompt: 5"),
        ({"input_images": "a.png"}, "field input_images: 'a.png'; must be a list"),
        ({"input_images": [3]}, r"field input_images: \[3\]"),
        ({"input_images": ["images/no.png"]}, r"field input_images\[0\]: 'images/no.png': no such file in"),
        ({"input_images": ["a\0b"]}, r"field input_images\[0\]: .* is no path"),
        ({"output_images": []}, "field output_images: empty"),
        ({"output_images": None}, "field output_images: empty"),
        ({"begin_with_bg": "yes"}, "field begin_with_bg: 'yes'; must be true or false"),
        ({"task": ""}, "field task: ''; give a text or leave"),
        ({"group": 7}, "field group: 7; give a text or leave"),
    ],
)
def test_a_bad_field_names_file_line_and_field(tmp_path, bring, fields, message):
    source = write_jsonl(tmp_path / "a.jsonl", [good(tmp_path), "", {**good(tmp_path, id="x"), **fields}])
    with pytest.raises(DataError, match=rf"a\.jsonl line 3, {message}"):
        bring(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "not a line of JSON"),
        ("[1, 2]", "list instead of a JSON object"),
        ('{"id": "' + "x" * 2**20 + '"}', "longer than 1048576 bytes"),
    ],
)
def test_a_line_that_is_no_row_is_refused_and_the_next_one_still_read(tmp_path, bring, line, message):
    source = write_jsonl(tmp_path / "a.jsonl", [line, good(tmp_path)])
    with pytest.raises(DataError, match=rf"a\.jsonl line 1: .*{message}"):
        bring(source)
    manifest = bring(source, bad="skip")
    assert manifest.counts == {"train": {"layer_decomposition": 1}}
    assert sum(manifest.skipped_rows.values()) == 1


def test_bad_rows_are_left_out_and_counted_by_reason(tmp_path, bring):
    rows = [decomposition(tmp_path, k) for k in range(7)]
    rows[1]["prompt"] = rows[2]["prompt"] = ""
    (tmp_path / "images" / "3-foreground.png").unlink()
    (tmp_path / "images" / "4-foreground.png").write_bytes(b"not an image")
    save(tmp_path / "images" / "5-foreground.png", pictures(5)["background"])
    manifest = bring(write_jsonl(tmp_path / "a.jsonl", rows), bad="skip")
    assert manifest.counts == {"train": {"layer_decomposition": 2}}
    assert sorted(manifest.skipped_rows.values()) == [1, 1, 1, 2]
    assert any("no alpha" in reason for reason in manifest.skipped_rows)
    assert not any(str(tmp_path) in reason for reason in manifest.skipped_rows)
    assert verify(tmp_path / "out") == []


def test_nothing_is_left_behind_when_an_import_fails_or_finds_no_usable_row(tmp_path, bring):
    source = write_jsonl(tmp_path / "a.jsonl", [good(tmp_path, prompt="")])
    for bad, message in (("fail", "leave bad rows out with --bad skip"), ("skip", "no usable row")):
        with pytest.raises(DataError, match=message):
            bring(source, bad=bad)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_an_id_that_occurs_twice_names_both_lines(tmp_path, bring):
    source = write_jsonl(tmp_path / "a.jsonl", [good(tmp_path), good(tmp_path)])
    with pytest.raises(DataError, match=r"line 2, field id: 'scene-0' is also the id of .*a\.jsonl line 1"):
        bring(source)


@pytest.mark.parametrize("way", ["absolute", "upwards", "link"])
def test_images_outside_the_files_folder_need_the_option(tmp_path, bring, way):
    row = decomposition(tmp_path / "elsewhere", 0)
    (tmp_path / "in").mkdir()
    if way == "link":
        (tmp_path / "in" / "images").symlink_to(tmp_path / "elsewhere" / "images")
    else:
        start = f"{tmp_path}/elsewhere/" if way == "absolute" else "../elsewhere/"
        for field in ("input_images", "output_images"):
            row[field] = [start + name for name in row[field]]
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"input_images\[0\]: .* lies outside .*--allow-outside"):
        bring(source)
    assert bring(source, allow_outside=True).counts == {"train": {"layer_decomposition": 1}}


def test_images_of_mixed_sizes_are_refused_with_all_of_them_named(tmp_path, bring):
    row = good(tmp_path)
    save(tmp_path / "images" / "0-background.png", pictures(0, 20, 24)["background"])
    source = write_jsonl(tmp_path / "a.jsonl", [row])
    message = r"line 1: images differ in size \(input_images\[0\] 16x16, output_images\[0\] 24x20.*to one size"
    with pytest.raises(DataError, match=message):
        bring(source)


def test_a_bomb_and_a_sliver_are_refused_with_field_and_remedy(tmp_path, bring, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [good(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr("data.images.MAX_PIXELS", 100)
        with pytest.raises(DataError, match=r"line 1, field input_images\[0\]: image of 16x16, more than the 100"):
            bring(source)
    save(tmp_path / "images" / "0-image.png", np.zeros((4, 400, 4), np.uint8))
    with pytest.raises(DataError, match=r"line 1, field input_images\[0\]: 400x4 pixels"):
        bring(source)


def test_a_mask_that_marks_nothing_is_refused(tmp_path, bring):
    row = row_of(tmp_path, ["image", "mask"], ["background"], begin_with_bg=True)
    save(tmp_path / "mask.png", pictures(0)["mask"] // 3)
    with pytest.raises(DataError, match=r"field input_images\[1\]: the mask marks nothing"):
        bring(write_jsonl(tmp_path / "a.jsonl", [row]))


def test_wide_pictures_are_letterboxed_and_their_layers_still_compose_to_the_image(tmp_path, bring):
    drawn = pictures(2, 48, 96)
    for role in ("image", "background", "foreground"):
        save(tmp_path / "r" / "wide" / f"{role}.png", drawn[role])
    (tmp_path / "r" / "wide" / "prompt.txt").write_text("Decompose.")
    bring(tmp_path / "r", size=32)
    sample = RecordDataset(tmp_path / "out", "train").record(0).decode()
    assert sample.inputs[0].shape == (4, 32, 32)
    assert (over(sample.targets_LCHW) - sample.inputs[0]).abs().max() < 6 / 255
    assert (sample.inputs[0][:, :8] == sample.inputs[0][:, 8:9]).all()  # borders repeat the edge
    layer = sample.targets_LCHW[1]
    level = drawn["foreground"][24, 48, 0] / 255
    assert (layer[:3, layer[3] > 0.5] - level).abs().max() < 3 / 255  # no dark fringe


def test_a_photo_is_turned_as_its_exif_data_says_and_grey_images_are_read(tmp_path, bring):
    row = row_of(tmp_path, ["image", "mask"], ["foreground"], begin_with_bg=False)
    upright = Image.fromarray(pictures(1)["image"]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(pictures(1)["mask"]).convert("L").save(tmp_path / "mask.png")
    bring(write_jsonl(tmp_path / "a.jsonl", [row]))
    sample = RecordDataset(tmp_path / "out", "train").record(0).decode()
    assert np.array_equal(to_uint8_hwc(sample.inputs[0]), pictures(1)["image"])
    assert np.array_equal(to_uint8_hwc(sample.inputs[1]), pictures(1)["mask"])


def test_rows_that_share_an_image_or_name_one_group_never_cross_splits(tmp_path, bring):
    rows = [decomposition(tmp_path, k) for k in range(12)]
    for k in range(0, 6, 2):  # pairs share their background
        rows[k + 1]["output_images"][0] = rows[k]["output_images"][0]
    for k in range(6, 12):
        rows[k]["group"] = f"pair {k // 2}"
    bring(write_jsonl(tmp_path / "a.jsonl", rows), val_share=0.3, test_share=0.3)
    split_of = {}
    for split in ("train", "val", "test"):
        dataset = RecordDataset(tmp_path / "out", split)
        assert len(dataset) == 4
        split_of |= {dataset.cheap(k).id: (split, dataset.cheap(k).object_groups) for k in range(len(dataset))}
    for k in range(0, 12, 2):
        assert split_of[f"scene-{k}"] == split_of[f"scene-{k + 1}"]


def test_files_of_omnialphas_splits_come_into_one_dataset_with_ids_that_name_their_file(tmp_path, bring):
    sources = []
    for number, split in enumerate(("train", "val", "test")):
        path = write_jsonl(tmp_path / f"{split}.jsonl", [decomposition(tmp_path, number, id="0")])
        sources.append(parse_source(f"{path},split={split}"))
    manifest = bring(*sources)
    assert manifest.counts == {split: {"layer_decomposition": 1} for split in ("train", "val", "test")}
    assert RecordDataset(tmp_path / "out", "val").cheap(0).id == "val/0"


def test_two_splits_that_share_an_image_are_refused(tmp_path, bring):
    row = good(tmp_path)
    sources = [Source(write_jsonl(tmp_path / f"{s}.jsonl", [row]), split=s) for s in ("train", "val")]
    with pytest.raises(DataError, match=r"val\.jsonl line 1 is in split val and .*train\.jsonl line 1 in split train"):
        bring(*sources)


def test_a_plain_folder_names_roles_by_its_files(tmp_path, bring):
    write_record(tmp_path / "r" / "one", ("image", "mask", "foreground"), 1)
    write_record(tmp_path / "r" / "two", ("image", "foreground"), 2, prompt="Cut out a disc.")
    (tmp_path / "r" / "two" / "task.txt").write_text("referring_matting\n")
    (tmp_path / "r" / "two" / "caption.txt").write_text("a disc\n")
    (tmp_path / "r" / ".hidden").mkdir()
    manifest = bring(tmp_path / "r")
    assert manifest.counts == {"train": {"mask_matting": 1, "referring_matting": 1}}
    record = RecordDataset(tmp_path / "out", "train").record(1)
    assert (record.id, record.prompt, record.caption) == ("two", "Cut out a disc.", "a disc")
    assert np.array_equal(to_uint8_hwc(record.decode().targets_LCHW[0]), pictures(2)["foreground"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "prompt.txt").unlink(), r"one, file prompt\.txt: missing or empty"),
        (lambda f: (f / "prompt.txt").write_bytes(b"\xff\xfe"), "one: a text file is not UTF-8"),
        (lambda f: save(f / "image.bmp", pictures(0)["image"]), r"file image\.png: the role image is there twice"),
        (lambda f: (f / "mask.png").rename(f / "msak.png"), "may be automatic_matting or referring_matting"),
        (lambda f: (f / "foreground.png").unlink(), r"no task has images \['image', 'mask'\]; there are text_to_rgba"),
        (lambda f: (f / "image.png").write_bytes(b"no"), r"one, file image\.png: not an image in a known format"),
    ],
)
def test_a_bad_record_folder_is_one_message(tmp_path, bring, spoil, message):
    spoil(write_record(tmp_path / "r" / "one", ("image", "mask", "foreground")))
    with pytest.raises(DataError, match=message):
        bring(tmp_path / "r")


def test_an_empty_source_says_what_a_source_looks_like(tmp_path, bring):
    (tmp_path / "r").mkdir()
    for source in (tmp_path / "r", write_jsonl(tmp_path / "a.jsonl", [])):
        with pytest.raises(DataError, match=r"holds no rows; a source folder holds one folder per record"):
            bring(source)


def test_an_existing_folder_is_not_touched(tmp_path, bring):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists; name another folder"):
        bring(write_jsonl(tmp_path / "a.jsonl", [good(tmp_path)]))


def test_shards_are_bounded_in_rows_and_in_bytes(tmp_path, bring, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", [decomposition(tmp_path, k) for k in range(7)])
    by_rows = bring(source, shard_rows=3)
    assert list(by_rows.shards) == [f"train-0000{k}-of-00003.parquet" for k in range(3)]
    monkeypatch.setattr(importer, "SHARD_BYTES", 1)
    by_bytes = bring(source, out="other")
    assert len(by_bytes.shards) == 7
    assert by_bytes.content_digest == by_rows.content_digest


def test_long_imports_say_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "PROGRESS_S", 0)
    source = write_jsonl(tmp_path / "a.jsonl", [decomposition(tmp_path, k) for k in range(2)])
    lines = []
    import_dataset([Source(source)], tmp_path / "out", TRAIN, lines.append)
    assert "import: 1 of 2 rows read" in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": 8}, "size 8"), ({"val_share": 0.9}, "val_share 0.9"), ({"shard_rows": 0}, "least 1")],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ImportOptions(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.jsonl", "no such file or folder"),
        ("nowhere.jsonl,colour=red", "'colour=red' is none of ,task=NAME"),
        ("{file},task=cutting", "unknown task 'cutting'"),
        ("{file},split=dev", "unknown split 'dev'"),
        ("{folder}/a.csv", r"not a \.jsonl file"),
    ],
)
def test_an_unusable_source_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError, match=message):
        parse_source(text.format(file=tmp_path / "a.jsonl", folder=tmp_path))


def test_a_source_may_have_commas_in_its_name(tmp_path):
    (tmp_path / "a,b.jsonl").touch()
    source = parse_source(f"{tmp_path}/a,b.jsonl,task=object_removal,split=val", task="mask_matting")
    assert (source.path.name, source.task, source.split) == ("a,b.jsonl", "object_removal", "val")


def test_draws_of_splits_hold_the_shares_and_depend_on_the_set_of_groups_alone():
    names = [f"g{k}" for k in range(40)]
    splits = draw_splits(names, 0.1, 0.25, 0)
    counts = [list(splits.values()).count(split) for split in ("train", "val", "test")]
    assert counts == [26, 4, 10]
    assert draw_splits(names[::-1], 0.1, 0.25, 0) == splits
    assert draw_splits(names, 0.1, 0.25, 1) != splits
    assert sorted(draw_splits(names[:3], 0.1, 0.1, 0).values()) == ["test", "train", "val"]
    assert draw_splits(["a"], 0.5, 0.5, 0) == {"a": "train"}


def test_json_may_name_fields_that_nobody_uses(tmp_path, bring):
    source = tmp_path / "a.jsonl"
    source.write_text("\ufeff" + json.dumps(good(tmp_path, width=1024)))
    assert bring(source).counts == {"train": {"layer_decomposition": 1}}


def test_a_pixel_budget_keeps_proportions_and_the_dataset_knows_its_sizes(tmp_path, bring):
    for number, (height, width) in enumerate(((40, 80), (80, 40), (64, 64))):
        drawn = pictures(number, height, width)
        for role in ("image", "background", "foreground"):
            save(tmp_path / "r" / str(number) / f"{role}.png", drawn[role])
        (tmp_path / "r" / str(number) / "prompt.txt").write_text("Decompose the image.")
    manifest = bring(tmp_path / "r", pixels=3 * 64 * 64)
    data = RecordDataset(tmp_path / "out", "train")
    assert data.sizes == [(32, 64), (64, 32), (64, 64)]
    assert verify(tmp_path / "out") == []
    assert [tuple(data.record(k).decode().targets_LCHW.shape) for k in range(3)] == [
        (2, 4, *size) for size in data.sizes
    ]
    # What fits the budget as it is keeps its pixels.
    assert np.array_equal(to_uint8_hwc(data.record(2).decode().targets_LCHW[1]), pictures(2, 64, 64)["foreground"])
    assert manifest.config["pixels"] == 3 * 64 * 64
    assert "size" not in manifest.config


def test_a_picture_too_narrow_for_the_pixel_budget_is_named(tmp_path, bring):
    drawn = pictures(0, 16, 400)
    for role in ("image", "foreground"):
        save(tmp_path / "r" / "thin" / f"{role}.png", drawn[role])
    (tmp_path / "r" / "thin" / "prompt.txt").write_text("Cut out.")
    (tmp_path / "r" / "thin" / "task.txt").write_text("automatic_matting")
    with pytest.raises(DataError, match=r"thin, file image.png: 400x16 pixels have a side below 32"):
        bring(tmp_path / "r", pixels=8192)
