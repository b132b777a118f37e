"""Stored rollouts and what they say about rewards."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from pipeline.cli import main
from policy.group import GroupPixels
from policy.rollout_files import read_rollouts, write_rollouts
from rewards.combine import RewardConfig, TermConfig
from rewards.groups import build_scorers, rescore, score_group

SIZE = 16


def group(seed: int, members: int = 5, task: str = "automatic_matting") -> GroupPixels:
    """A truth and members of falling quality."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    alpha = np.clip((5 - np.hypot(x - 8, y - 8)) / 2 + 0.5, 0, 1)
    truth = np.stack([*draw.random((3, 1, 1)) * np.ones((3, SIZE, SIZE)), alpha]).astype(np.float32)
    noise = draw.random((members, 4, SIZE, SIZE), dtype=np.float32) - truth
    layers = truth + noise * np.linspace(0.0, 0.8, members, dtype=np.float32)[:, None, None, None]
    image = np.concatenate([truth[:3], np.ones((1, SIZE, SIZE), np.float32)])
    return GroupPixels(f"record-{seed}", task, "Cut it out.", layers[:, None].clip(0, 1), truth[None], (image,))


@pytest.fixture
def stored(tmp_path):
    folder = tmp_path / "rollouts"
    write_rollouts(folder / "step-00010.parquet", 10, ["10.0", "10.1"], [group(0), group(1)])
    write_rollouts(folder / "step-00020.parquet", 20, ["20.0"], [group(2)])
    return folder


def test_stored_groups_come_back_within_eight_bits_and_in_order(stored):
    read = list(read_rollouts(stored))
    assert [(entry.group, entry.step) for entry in read] == [("10.0", 10), ("10.1", 10), ("20.0", 20)]
    for entry, original in zip(read, (group(0), group(1), group(2)), strict=True):
        assert (entry.pixels.name, entry.pixels.task, entry.pixels.prompt) == (
            original.name,
            original.task,
            "Cut it out.",
        )
        np.testing.assert_allclose(entry.pixels.layers_GLCHW, original.layers_GLCHW, atol=1 / 510 + 1e-6)
        np.testing.assert_allclose(entry.pixels.targets_LCHW, original.targets_LCHW, atol=1 / 510 + 1e-6)
        assert len(entry.pixels.inputs) == 1


@pytest.mark.parametrize("damage", ["missing", "foreign", "truncated", "no image"])
def test_what_is_no_stored_rollout_is_one_error_that_names_the_file(tmp_path, damage):
    path = tmp_path / "step-00001.parquet"
    if damage == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    elif damage != "missing":
        write_rollouts(path, 1, ["1.0"], [group(0)])
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "no image":
        table = pq.read_table(path)
        spoilt = [[b"not a PNG"]]
        pq.write_table(table.set_column(table.schema.get_field_index("targets"), table.schema.field("targets"),
                                        pa.array(spoilt, pa.list_(pa.binary()))), path)  # fmt: skip
    with pytest.raises(DataError, match=r"step-00001\.parquet"):
        list(read_rollouts(path))


def test_rescoring_says_how_terms_spread_agree_and_what_they_cost(stored):
    groups = [entry.pixels for entry in read_rollouts(stored)]
    config = RewardConfig(terms=(TermConfig(name="layer"), TermConfig(name="alpha_mad")))
    result = rescore(config, groups)
    scored = [score_group(config, build_scorers(config), entry) for entry in groups]
    layer = np.stack([s.scores_TG[0] for s in scored])
    assert result.terms["layer"].values == pytest.approx(layer.ravel().tolist())
    assert result.terms["layer"].spreads == pytest.approx(layer.std(axis=1).tolist())
    assert result.terms["layer"].samples == 15
    assert result.terms["layer"].seconds > 0
    # Quality falls with the member: both terms rank alike, and with the truth metrics whose sign is turned.
    assert np.mean(result.agreement["layer", "alpha_mad"]) == pytest.approx(1.0)
    assert np.mean(result.agreement["alpha_mad", "metric:alpha_mad"]) == pytest.approx(1.0)
    assert max(result.ranked["layer"])[2] == 0


def test_a_constant_term_agrees_with_nothing_and_missing_scores_are_counted(tmp_path, stored):
    code = tmp_path / "odd.py"
    code.write_text(
        "def flat(batch): return [1.0] * batch.members\ndef half(batch): return [1.0, None, 0.5, None, 0.2]\n"
    )
    terms = tuple(TermConfig(name=name, scorer=f"{code}:{name}") for name in ("flat", "half"))
    result = rescore(RewardConfig(terms=terms), [entry.pixels for entry in read_rollouts(stored)])
    assert not [pair for pair in result.agreement if pair[0] == "flat"]
    assert result.terms["half"].missing == 6
    assert len(result.reasons) == 6
    assert result.terms["flat"].spreads == [0.0] * 3


def test_the_command_prints_tables_and_writes_scores_and_sheets(stored, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["reward", "score", str(stored), "layer", "alpha_gradient", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "rank correlation within groups" in printed
    assert "alpha_gradient" in printed
    summary = json.loads((out / "scores.json").read_text())
    assert summary["terms"]["layer"]["scores"] == 15
    agreement = summary["agreement"]["layer ~ alpha_gradient"]
    assert agreement["groups"] == 3
    assert agreement["low"] <= agreement["mean"] <= agreement["high"]
    assert f"[{agreement['low']:+.3f}, {agreement['high']:+.3f}]" in printed
    assert (out / "best-and-worst-layer.png").read_bytes().startswith(b"\x89PNG")


def test_a_scorer_that_ends_its_process_ends_the_command_with_one_message(stored, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("import os\ndef bad(batch):\n    os._exit(3)\n")
    assert main(["reward", "score", str(stored), f"{tmp_path}/bad.py:bad"]) == 1
    assert capsys.readouterr().err.startswith("omnialpha: bad: ended its process (exit code 3); mend it")


def test_the_command_says_when_the_rewards_judge_none_of_the_tasks(tmp_path, capsys):
    write_rollouts(tmp_path / "r.parquet", 1, ["1.0"], [group(0)])
    assert main(["reward", "score", str(tmp_path / "r.parquet"), "composition"]) == 1
    assert "no stored group has a task that these rewards judge" in capsys.readouterr().err
