"""The paper's two sets of terms, and how a config takes one."""

import json

import pytest

from common.config import validate
from common.errors import ConfigError
from data.tasks import TASKS
from pipeline.config import load_config
from rewards.base import build
from rewards.combine import RewardConfig, active_terms
from rewards.presets import presets

MATTING = ("automatic_matting", "referring_matting", "mask_matting")
UNJUDGED = ("text_to_rgba", "foreground_to_image", "background_to_image")


def active(config: RewardConfig) -> dict[str, list[str]]:
    return {task: [config.terms[k].name for k in active_terms(config, task)] for task in TASKS}


def test_the_papers_text_has_four_equal_terms_by_its_task_table():
    config = RewardConfig(preset="paper")
    assert {term.weight for term in config.terms} == {1.0}
    assert active(config) == {
        **{key: [] for key in UNJUDGED},
        **{key: ["layer", "boundary"] for key in MATTING},
        "object_removal": ["layer", "background"],
        "layer_decomposition": ["layer", "composition", "background", "boundary"],
    }


def test_the_papers_code_has_seven_equal_terms_of_which_each_task_has_its_own():
    config = RewardConfig(preset="paper_code")
    layer, composition = ["layer_ssim", "layer_psnr"], [f"composition_{x}" for x in ("ssim", "psnr", "perceptual")]
    assert [term.name for term in config.terms] == [*layer, *composition, "background", "boundary"]
    assert {term.weight for term in config.terms} == {1.0}
    assert active(config) == {
        **{key: [] for key in UNJUDGED},
        **{key: [*layer, "boundary"] for key in MATTING},
        "object_removal": [*layer, "background"],
        "layer_decomposition": [*layer, *composition, "background", "boundary"],
    }


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_into_a_shipped_run_and_its_scorers_can_be_built(name):
    config = load_config("tiny", [f"rewards.preset={name}", "rewards.terms=[]"]).rewards
    assert [term.name for term in config.terms] == [entry["name"] for entry in presets()[name]]
    for term in config.terms:
        build(term.source, term.params)


@pytest.mark.parametrize("name", presets())
def test_a_resolved_preset_reads_back_as_itself(name):
    config = RewardConfig(preset=name)
    assert validate(RewardConfig, json.loads(config.model_dump_json()), "again") == config
    written_out = validate(RewardConfig, {"terms": presets()[name]}, "test")
    assert written_out.terms == config.terms


def test_own_terms_stand_beside_a_presets_and_replace_those_of_the_same_name():
    own = [
        {"name": "mine", "scorer": "mine.py:score"},
        {"name": "background", "weight": 2.0, "params": {"min_side": 64}},
    ]
    config = validate(RewardConfig, {"preset": "paper", "terms": own}, "test")
    assert [term.name for term in config.terms] == ["layer", "composition", "background", "boundary", "mine"]
    assert (config.terms[2].weight, config.terms[2].params) == (2.0, {"min_side": 64})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preset": "papers"}, "no preset 'papers'; shipped ones: paper, paper_code"),
        ({}, r"terms: there are none; write terms, or name a preset \(paper, paper_code\)"),
        ({"preset": "paper", "terms": [{"name": "mine"}, {"name": "mine"}]}, "'mine' occurs more than once"),
        ({"preset": "paper", "terms": [{"name": "layer", "wieght": 1.0}]}, "did you mean 'weight'"),
        (
            {"preset": "paper_code", "terms": [{"name": "layer"}]},
            "term 'layer' judges by the same scorer as 'layer_ssim' of preset paper_code",
        ),
        (
            {"preset": "paper", "terms": [{"name": entry["name"], "weight": 0.0} for entry in presets()["paper"]]},
            "every term has weight 0",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        validate(RewardConfig, values, "test")


def test_a_term_follows_the_table_by_its_own_name_first_and_then_by_its_scorers():
    terms = [{"name": "halo", "scorer": "boundary"}, {"name": "boundary", "scorer": "mine.py:score"}]
    config = validate(RewardConfig, {"terms": terms}, "test")
    assert active(config)["object_removal"] == []
    assert active(config)["mask_matting"] == ["halo", "boundary"]


def test_paths_of_weights_and_folders_count_from_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    term = "{name: background, params: {network: lpips_vgg, weights: vgg16.pth, min_side: 64}}"
    config = load_config("tiny", ["rewards.preset=paper", f"rewards.terms=[{term}]"])
    params = next(term.params for term in config.rewards.terms if term.name == "background")
    assert params == {"network": "lpips_vgg", "weights": str(tmp_path / "vgg16.pth"), "min_side": 64}
