"""What a scorer may do, and what becomes of it when it does something else."""

import dataclasses
import math
import pickle
import sys

import numpy as np
import pytest
import torch

from common.errors import ConfigError, RewardError
from rewards import base
from rewards.base import RewardBatch, build, register, registered, run_scorer, scorer_needs


def constant(batch: RewardBatch, value: float = 0.5) -> list[float]:
    return [value] * batch.members


def raises(batch: RewardBatch) -> list[float]:
    raise KeyError("no such weight")


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.0, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.int64),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), np.float32(2.0), 3],
    ],
)
def test_lists_tuples_arrays_and_tensors_are_accepted(make_batch, returned):
    scores = run_scorer("mine", lambda batch: returned, make_batch())
    assert scores.values_G.dtype == np.float64
    assert scores.values_G.tolist() == [1.0, 2.0, 3.0]
    assert scores.reasons == (None, None, None)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned None"),
        (0.5, "returned a float"),
        (torch.tensor(0.5), "shape ()"),
        (np.zeros((3, 1)), "shape (3, 1)"),
        ("abc", "returned a str"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned a dict"),
        ([0.1, 0.2], "2 values for 3 members"),
        (torch.zeros(4), "4 values for 3 members"),
        ([], "0 values for 3 members"),
    ],
)
def test_a_wrong_result_makes_every_score_missing_with_the_reason(make_batch, returned, words):
    scores = run_scorer("mine", lambda batch: returned, make_batch())
    assert np.isnan(scores.values_G).all()
    assert scores.values_G.shape == (3,)
    assert all(words in reason for reason in scores.reasons)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "None"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("high", "a str"),
        (10**400, "a int"),
        (torch.zeros(2), "a Tensor"),
    ],
)
def test_a_bad_entry_makes_only_its_member_missing(make_batch, bad, words):
    scores = run_scorer("mine", lambda batch: [0.0, bad, 1.0], make_batch())
    assert scores.values_G[[0, 2]].tolist() == [0.0, 1.0]
    assert math.isnan(scores.values_G[1])
    assert scores.reasons[0] is scores.reasons[2] is None
    assert words in scores.reasons[1]


def test_an_exception_becomes_missing_scores_that_name_type_place_and_message(make_batch):
    scores = run_scorer("mine", raises, make_batch())
    line = raises.__code__.co_firstlineno + 1
    assert np.isnan(scores.values_G).all()
    assert scores.reasons[0] == f"KeyError at test_scorer_contract.py:{line}: 'no such weight'"


def test_an_interrupt_is_not_swallowed(make_batch):
    def interrupted(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_scorer("mine", interrupted, make_batch())


def test_scorers_run_without_building_a_graph(make_batch):
    seen = []
    run_scorer("mine", lambda batch: seen.append(torch.is_grad_enabled()), make_batch())
    assert seen == [False]


@pytest.mark.parametrize(
    ("need", "changes"),
    [
        ("targets", {"targets_LCHW": None}),
        ("inputs", {"inputs": (), "input_roles": ()}),
        ("prompt", {"prompt": ""}),
    ],
)
def test_a_scorer_whose_need_is_not_met_is_not_called(make_batch, need, changes):
    def scorer(batch):
        raise AssertionError("must not be called")

    scorer.needs = {need}
    scores = run_scorer("mine", scorer, make_batch(**changes))
    assert np.isnan(scores.values_G).all()
    assert scores.reasons[0] == f"needs {need}, which task 'layer_decomposition' did not provide"


@pytest.mark.parametrize("needs", ["targets", {"masks"}, 3])
def test_unknown_needs_are_refused_with_the_known_ones(needs):
    def scorer(batch):
        return [0.0]

    scorer.needs = needs
    with pytest.raises(RewardError, match="inputs, prompt, targets"):
        scorer_needs(scorer)


def test_a_number_is_not_a_scorer():
    with pytest.raises(RewardError, match="write a function"):
        scorer_needs(3)


def test_scores_and_batches_travel_between_processes(make_batch):
    scores = run_scorer("mine", constant, make_batch())
    assert pickle.loads(pickle.dumps(scores)).values_G.tolist() == [0.5, 0.5, 0.5]  # noqa: S301 - our own bytes
    batch = make_batch()
    batch.shared("blends", lambda: torch.zeros(10**6))
    assert len(pickle.dumps(batch)) < 10**6  # what was derived from it stays here
    assert torch.equal(pickle.loads(pickle.dumps(batch)).layers_GLCHW, batch.layers_GLCHW)  # noqa: S301


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_GLCHW": torch.zeros(3, 2, 3, 8, 8)}, "layers_GLCHW has shape"),
        ({"layers_GLCHW": torch.zeros(0, 2, 4, 8, 8)}, "layers_GLCHW has shape"),
        (
            {"layers_GLCHW": torch.zeros(3, 2, 4, 8, 8, dtype=torch.bfloat16)},
            "layers_GLCHW is torch.bfloat16; convert the decoded",
        ),
        ({"roles": ("foreground",)}, "roles has 1 entries for 2 layers"),
        ({"targets_LCHW": torch.zeros(1, 4, 24, 20)}, "targets_LCHW has shape"),
        ({"inputs": (torch.zeros(3, 8, 8),)}, r"inputs\[0\] has shape"),
        ({"input_roles": ()}, "input_roles has 0 entries for 1 inputs"),
    ],
)
def test_a_batch_that_breaks_its_contract_names_group_task_and_field(make_batch, changes, words):
    base_fields = vars(make_batch())
    with pytest.raises(RewardError, match=f"group 'group-7', task 'layer_decomposition': {words}"):
        RewardBatch(**(base_fields | changes))


def test_what_terms_share_is_made_once_per_group_and_name(make_batch):
    batch, made = make_batch(), []
    for _ in range(2):
        assert batch.shared("blends", lambda: made.append("blends") or 7) == 7
    assert batch.shared("other", lambda: 8) == 8
    assert make_batch().shared("blends", lambda: 9) == 9
    assert dataclasses.replace(batch, group="copy").shared("blends", lambda: 10) == 10
    assert made == ["blends"]


def test_the_shipped_terms_are_registered():
    assert {"layer", "composition", "background", "boundary", "prompt_fidelity", "clip"} <= set(registered())


def test_the_shipped_scorers_are_imported_on_first_use(make_batch, tmp_path, monkeypatch):
    (tmp_path / "shipped_for_this_test.py").write_text(
        "from rewards.base import register\n@register('late')\ndef late(batch):\n    return [1.0] * batch.members\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_registry", {})
    monkeypatch.setattr(base, "_SHIPPED", ("shipped_for_this_test",))
    assert run_scorer("late", build("late"), make_batch()).values_G.tolist() == [1.0] * 3
    assert registered() == ("late",)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known():
    with pytest.raises(ConfigError, match=r"did you mean 'boundary'\?.*composition.*layer.*path/to/file.py:attribute"):
        build("bondary")


def test_a_name_can_be_registered_once(monkeypatch):
    monkeypatch.setattr(base, "_registry", {})
    register("mine")(constant)
    with pytest.raises(ConfigError, match="already registered"):
        register("mine")(raises)


def test_a_registered_function_takes_params_and_keeps_its_needs(make_batch, monkeypatch):
    def scaled(batch, scale=1.0):
        return [scale] * batch.members

    scaled.needs = {"targets"}
    monkeypatch.setitem(base._registry, "scaled", scaled)
    scorer = build("scaled", {"scale": 3.0})
    assert run_scorer("scaled", scorer, make_batch()).values_G.tolist() == [3.0] * 3
    assert scorer_needs(scorer) == {"targets"}
    with pytest.raises(ConfigError, match=r"params do not fit: .*'skale'; it takes: scale"):
        build("scaled", {"skale": 3.0})


def test_params_of_a_class_are_checked():
    with pytest.raises(ConfigError, match="it takes: metrics"):
        build("layer", {"metric": ["ssim"]})
    with pytest.raises(ConfigError, match="out of ssim, psnr"):
        build("layer", {"metrics": ["lpips"]})


SCORER_FILE = """
from dataclasses import dataclass

LOADED = []

def brightness(batch):
    return batch.layers_GLCHW.mean(dim=(1, 2, 3, 4))

@dataclass
class Fixed:
    value: float = 1.0
    needs = ("targets",)

    def score(self, batch):
        return [self.value] * batch.members

ready = Fixed(4.0)
number = 3
"""


def test_a_plain_function_in_a_file_is_enough(make_batch, tmp_path):
    path = tmp_path / "my_scorer.py"
    path.write_text(SCORER_FILE)
    batch = make_batch()
    values = run_scorer("b", build(f"{path}:brightness"), batch).values_G
    np.testing.assert_allclose(values, batch.layers_GLCHW.double().mean(dim=(1, 2, 3, 4)).numpy(), rtol=1e-6)
    assert run_scorer("f", build(f"{path}:Fixed", {"value": 2.0}), batch).values_G.tolist() == [2.0] * 3
    assert run_scorer("r", build(f"{path}:ready"), batch).values_G.tolist() == [4.0] * 3
    with pytest.raises(ConfigError, match="takes no params"):
        build(f"{path}:ready", {"value": 2.0})
    with pytest.raises(RewardError, match="3 is not a scorer"):
        build(f"{path}:number")


def test_a_file_with_the_name_of_one_of_our_folders_shadows_nothing(tmp_path, monkeypatch):
    (tmp_path / "data.py").write_text(SCORER_FILE)
    monkeypatch.chdir(tmp_path)
    search_path = list(sys.path)
    build("data.py:brightness")
    assert sys.modules["data"].__file__ != str(tmp_path / "data.py")
    assert sys.path == search_path


def test_an_edited_file_is_loaded_anew_and_two_attributes_share_one_module(make_batch, tmp_path):
    path = tmp_path / "scorer.py"
    path.write_text(SCORER_FILE)
    first, second = build(f"{path}:brightness"), build(f"{path}:Fixed")
    assert first.__module__ == type(second).__module__
    path.write_text("def brightness(batch):\n    return [9.0] * batch.members\n")
    assert run_scorer("b", build(f"{path}:brightness"), make_batch()).values_G.tolist() == [9.0] * 3


def test_a_module_attribute_can_be_a_scorer(make_batch):
    scorer = build("rewards.terms:LayerFidelity", {"metrics": ["psnr"]})
    assert np.isfinite(run_scorer("layer", scorer, make_batch()).values_G).all()


@pytest.mark.parametrize(
    ("content", "attribute", "words"),
    [
        ("def score(:", "score", "fails on import .SyntaxError"),
        ("import not_installed_anywhere", "score", "fails on import .ModuleNotFoundError"),
        ("def skore(batch): return []", "score", "has no 'score'; it defines: skore"),
        (None, "score", "cannot be read .No such file"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, attribute, words):
    path = tmp_path / "broken.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        build(f"{path}:{attribute}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("not_a_package.module:score", "cannot be imported"),
        ("rewards.terms:nothing", "has no 'nothing'"),
        (":score", "not of the form"),
        ("rewards.terms:", "not of the form"),
    ],
)
def test_a_module_that_cannot_be_used_says_why(name, words):
    with pytest.raises(ConfigError, match=words):
        build(name)


class Refuses:
    """A scorer whose constructor wants something that is not there."""

    def __init__(self, path: str) -> None:
        raise FileNotFoundError(path)

    def score(self, batch):
        return [0.0] * batch.members


def test_a_constructor_that_fails_is_one_message_that_names_the_reward():
    with pytest.raises(ConfigError, match=r"cannot be built \(FileNotFoundError: weights.pt\)"):
        build(f"{__name__}:Refuses", {"path": "weights.pt"})
