"""The map from what the network sees to what a caption means, and what it is worth."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from data.records import RecordDataset
from policy.text import TextEncoder
from rewards.base import build
from rewards.prompt import PromptFidelity, class_nearness, see
from rewards.word_fitting import fit_to
from rewards.words import WordMap, fit_words, load_words


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1000))
def test_the_map_minimises_the_penalised_squares(seed, strength):
    rng = np.random.default_rng(seed)
    seen, names = rng.normal(2, 3, (12, 5)), rng.normal(0, 1, (12, 4))
    found = fit_words(torch.tensor(seen), torch.tensor(names), strength)
    # Ridge regression as ordinary least squares on data with one row more for each feature.
    z = (seen - seen.mean(0)) / (seen.std(0, ddof=1) + 1e-3)
    rows = np.vstack([z, np.sqrt(strength) * np.eye(5)])
    wanted = np.linalg.lstsq(rows, np.vstack([names - names.mean(0), np.zeros((5, 4))]), rcond=None)[0]
    np.testing.assert_allclose(found.weights_CD, wanted, rtol=1e-4, atol=1e-6)


def test_nearness_is_the_cosine_between_centred_meanings():
    words = WordMap(torch.zeros(2), torch.ones(2), torch.eye(2), torch.tensor([0.0, 1.0]))
    seen = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    expected = torch.tensor([1.0, 0.0, 0.5**0.5])
    torch.testing.assert_close(words.nearness(seen, torch.tensor([2.0, 1.0])), expected)


def test_a_map_survives_its_file_up_to_half_precision(tmp_path):
    rng = torch.Generator().manual_seed(1)
    found = fit_words(torch.randn(20, 6, generator=rng), torch.randn(20, 3, generator=rng), 1.0)
    found.save(tmp_path / "deep" / "words.safetensors")
    torch.testing.assert_close(
        load_words(tmp_path / "deep" / "words.safetensors").weights_CD, found.weights_CD, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("content", [None, b"no tensors"])
def test_a_file_that_is_no_map_is_one_message(tmp_path, content):
    path = tmp_path / "words.safetensors"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"words\.safetensors: no map from features to words .*fit-words"):
        build("prompt_fidelity", {"weights": str(path)})


def test_a_map_that_is_named_and_left_out_is_a_contradiction(tmp_path):
    with pytest.raises(ConfigError, match="words: false leaves it out"):
        PromptFidelity(weights=tmp_path / "words.safetensors", words=False)


def test_the_score_is_the_mean_of_both_nearnesses(make_batch):
    batch = make_batch(task="referring_matting", roles=("foreground",), prompt="Cut out a striped cat.")
    wanted = TextEncoder().sentence("a striped cat")
    features, classes = see(batch.layers_GLCHW)
    expected = (class_nearness(classes, wanted) + load_words().nearness(features, wanted)) / 2
    torch.testing.assert_close(PromptFidelity().score(batch), expected)
    torch.testing.assert_close(PromptFidelity(words=False).score(batch), class_nearness(classes, wanted))


def test_the_shipped_map_tells_objects_apart_that_it_was_not_fitted_to(shipped_record):
    aucs = {name: row for name, row in shipped_record["aucs"].items() if name.startswith("test ")}
    assert aucs.keys() == {"test text_to_rgba", "test referring_matting"}
    assert all(row["both"] >= 0.7 for row in aucs.values())


@pytest.fixture(scope="module")
def shipped_record():
    from importlib.resources import files

    return json.loads((files("rewards") / "shipped" / "prompt-words.json").read_text())


def test_fitting_takes_each_named_object_once_and_measures_on_the_other_splits(real_dataset):
    splits = [RecordDataset(real_dataset, split) for split in ("train", "val", "test")]
    heard = []
    fitted = fit_to(*splits, 4, lambda done, count: heard.append((done, count)))
    alone = {
        r.object_groups[0]
        for r in (splits[0].cheap(k) for k in range(len(splits[0])))
        if r.caption and len(r.object_groups) == 1
    }
    assert fitted.objects == len(alone) == heard[-1][0] == heard[-1][1]
    assert fitted.aucs.keys() == fitted.trials.keys()
    assert {name.split()[0] for name in fitted.aucs} == {"val", "test"}
    assert all(0 <= value <= 1 for row in fitted.aucs.values() for value in row.values())
    again = fit_to(*splits, 4, lambda done, count: None)
    assert torch.equal(fitted.words.weights_CD, again.words.weights_CD)


def test_the_command_writes_the_map_and_what_it_is_worth(real_dataset, tmp_path):
    command = [sys.executable, "-m", "pipeline.cli", "reward", "fit-words", str(real_dataset)]
    done = subprocess.run([*command, str(tmp_path / "w.safetensors"), "--records", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "AUC on" in done.stdout
    facts = json.loads((tmp_path / "w.json").read_text())
    assert {"objects", "strength", "aucs", "trials", "dataset", "dataset_config"} == facts.keys()
    build("prompt_fidelity", {"weights": str(tmp_path / "w.safetensors")})
    wrong = subprocess.run([*command, str(tmp_path / "w.pt")], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "must end with .safetensors" in wrong.stderr
