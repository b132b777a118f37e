"""``omnialpha data import`` on the command line."""

import pytest

from common.errors import ConfigError
from data.records import RecordDataset
from data.sampler import TaskSampler
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.stages import ensure_dataset
from tests.unit.data.import_helpers import SIZE, decomposition, write_jsonl, write_record


def test_an_imported_dataset_verifies_and_gives_the_sampler_its_tasks(tmp_path, capsys):
    rows = [decomposition(tmp_path / "in", k) for k in range(6)]
    source = write_jsonl(tmp_path / "in" / "rows.jsonl", rows)
    for number in range(6):
        write_record(tmp_path / "folders" / f"r{number}", ("image", "mask", "background"), 20 + number)
    out = str(tmp_path / "out")
    command = ["data", "import", str(source), str(tmp_path / "folders"), "--out", out, "--size", str(SIZE)]
    assert main([*command, "--val-share", "0.2", "--test-share", "0.2", "--licence", "CC0"]) == 0
    assert main(["data", "verify", out]) == 0
    assert "every record decodes and matches its digests" in capsys.readouterr().out
    assert [len(RecordDataset(out, split)) for split in ("train", "val", "test")] == [8, 2, 2]
    train = RecordDataset(out, "train")
    sampler = TaskSampler(train.task_positions, dict.fromkeys(train.tasks, 1.0), 0)
    drawn = {sampler.draw(position, 1).task for position in range(4)}
    assert drawn == {"layer_decomposition", "object_removal"}


def test_a_bad_row_is_one_message_and_an_exit_code(tmp_path, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", [decomposition(tmp_path, 0, prompt="")])
    assert main(["data", "import", str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"omnialpha: {source} line 1, field prompt: ''; every row needs an instruction")
    assert error.count("\n") == 1


def test_sources_and_options_that_cannot_be_used_end_as_configuration_errors(tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "rows.jsonl", [decomposition(tmp_path, 0)]))
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "import", str(tmp_path / "nothing"), *out]) == 2
    assert main(["data", "import", source, *out, "--size", "4"]) == 2
    assert main(["data", "import", source, *out, "--task", "cutting"]) == 2
    assert capsys.readouterr().err.count("omnialpha: ") == 3


def test_a_split_that_a_run_needs_and_nobody_filled_is_said(tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "rows.jsonl", [decomposition(tmp_path, 0)]))
    assert main(["data", "import", source, "--out", str(tmp_path / "out"), "--split", "train", "--size", "16"]) == 0
    assert "no record is in test" in capsys.readouterr().out


def test_a_run_on_an_imported_dataset_must_know_its_size(tmp_path):
    rows = [decomposition(tmp_path, k) for k in range(3)]
    source = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert main(["data", "import", source, "--out", str(tmp_path / "out"), "--size", "16"]) == 0
    places = [f"dataset={tmp_path / 'out'}", f"run_dir={tmp_path / 'run'}"]
    ensure_dataset(load_config("tiny", [*places, "data.size=16"]))
    with pytest.raises(ConfigError, match=r"have a side of 16 pixels, data\.size says 32; set data\.size=16"):
        ensure_dataset(load_config("tiny", places))
