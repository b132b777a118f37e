"""The judge that comes with the package."""

import json

import pytest

from common.commit import verify
from data.build import build_dataset
from data.records import RecordDataset
from data.sources import default_cache
from pipeline.config import load_config
from rewards.judge.checking import check_judge
from rewards.judge.model import ModelJudge
from rewards.judge.shipped import named_judge, shipped_judges
from rewards.judge.templates import load_templates
from tests.conftest import TINY_DATA


def test_it_is_whole_small_enough_for_the_repository_and_says_how_it_was_trained():
    folder = shipped_judges()["judge-small"]
    verify(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    record = json.loads((folder / "training.json").read_text())
    assert record["stage"] == "judge"
    assert record["data"]["content_digest"]
    assert record["log"]["judge"][-1]["step"] == record["config"]["judge"]["steps"]


def test_its_name_stands_for_its_folder_in_a_run_and_in_a_term(tmp_path):
    folder = str(named_judge("judge-small"))
    assert load_config("demo-judge").judging.model == folder
    assert named_judge(tmp_path) == tmp_path
    terms = "rewards.terms=[{name: judge, params: {folder: judge-small}}]"
    assert load_config("tiny", [terms]).rewards.terms[0].params["folder"] == folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> RecordDataset:
    """Records of the size that it was trained on."""
    folder = tmp_path_factory.mktemp("scenes") / "dataset"
    build_dataset(
        TINY_DATA.model_copy(update={"size": 64, "train_scenes": 4, "val_scenes": 4}), folder, default_cache()
    )
    return RecordDataset(folder, "test")


def test_it_tells_degrees_of_degradation_apart_on_objects_and_photos_it_has_not_seen(scenes):
    templates, judge = load_templates("small"), ModelJudge(named_judge("judge-small"))
    templates.check_labels(judge.reader.tokens)
    found = check_judge(judge, templates, scenes, records=4, seed=0)
    trained = json.loads((named_judge("judge-small") / "training.json").read_text())["config"]["judge"]["tasks"]
    assert min(found.spearman_by_task[task] for task in trained) > 0.6
    assert found.pair_accuracy_both[0] > 0.8
    assert not found.missing
