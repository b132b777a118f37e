"""The shipped contract finds each way of breaking it, one at a time, and nothing in what keeps it."""

import dataclasses
import math
import threading

import pytest
import torch

from common.errors import ConfigError, RewardError
from data.tasks import TASKS
from rewards.contract import MEMBERS, check_scorer, example_group, judged_tasks
from rewards.terms import LayerFidelity


def opacity(batch):
    return batch.layers_GLCHW[:, :, 3].mean(dim=(1, 2, 3))


def raises(batch):
    raise KeyError("no such weight")


def returns_none(batch):
    return None


def returns_nan(batch):
    return [math.nan, *opacity(batch).tolist()[1:]]


def returns_too_few(batch):
    return opacity(batch)[:3] if batch.members == MEMBERS else opacity(batch)


def by_position(batch):
    return list(range(batch.members))


class DoesNotAddUp:
    def score(self, batch):
        return opacity(batch)

    def contributions(self, batch):
        return 2 * batch.layers_GLCHW[:, :, 3]


class CannotSayWhere(DoesNotAddUp):
    def contributions(self, batch):
        return 1 / 0


class AddsUp(DoesNotAddUp):
    def contributions(self, batch):
        return batch.layers_GLCHW[:, :, 3]


def throws_dice(batch):
    return torch.rand(batch.members)


class Counts:
    calls = 0

    def score(self, batch):
        self.calls += 1
        return opacity(batch) + self.calls


def writes_layers(batch):
    return opacity(dataclasses.replace(batch, layers_GLCHW=batch.layers_GLCHW.mul_(0.5)))


def writes_inputs(batch):
    batch.inputs[0].zero_()
    return opacity(batch)


writes_inputs.needs = {"inputs"}


def reads_truth(batch):
    return -(batch.layers_GLCHW - batch.targets_LCHW).abs().mean(dim=(1, 2, 3, 4))


def reads_prompt_and_inputs(batch):
    return opacity(batch) * len(batch.prompt) * len(batch.inputs)


reads_prompt_and_inputs.needs = {"inputs"}


def reads_truth_unseen(batch):
    return -(batch.layers_GLCHW - vars(batch)["targets_LCHW"]).abs().mean(dim=(1, 2, 3, 4))


def likes_prompts_unseen(batch):
    return opacity(batch) + (0.5 if vars(batch)["prompt"] else 0.0)


def divides_by_alpha(batch):
    red, alpha = batch.layers_GLCHW[:, :, 0], batch.layers_GLCHW[:, :, 3]
    return (red * alpha).sum(dim=(1, 2, 3)) / alpha.sum(dim=(1, 2, 3))


def needs_two_pixels(batch):
    for layers in batch.layers_GLCHW:
        if int((layers[-1, 3] > 0).sum()) == 1:
            raise ValueError("a hull needs two points")
    return opacity(batch)


def needs_company(batch):
    if batch.members < 2:
        raise ValueError("nobody to compare with")
    return opacity(batch)


def constant(batch):
    return [0.5] * batch.members


def upside_down(batch):
    return (batch.layers_GLCHW - batch.targets_LCHW).abs().mean(dim=(1, 2, 3, 4))


upside_down.needs = {"targets"}


class HoldsALock:
    def __init__(self):
        self.lock = threading.Lock()

    def score(self, batch):
        return opacity(batch)


def declines_removal(batch):
    if not batch.foregrounds:
        raise RewardError("no foreground here")
    return opacity(batch)


def declines_everything(batch):
    raise RewardError("not today")


class FailsToStart:
    def __init__(self, weights="none"):
        raise FileNotFoundError(weights)

    def score(self, batch):
        return opacity(batch)


def wants_masks(batch):
    return opacity(batch)


wants_masks.needs = {"masks"}

NOT_A_SCORER = 3


def halves(batch):
    """A well-behaved scorer that hands a changed copy to another one."""
    half = dataclasses.replace(
        batch, layers_GLCHW=batch.layers_GLCHW[..., ::2, ::2], targets_LCHW=batch.targets_LCHW[..., ::2, ::2]
    )
    return LayerFidelity(["psnr"]).score(half)


halves.needs = {"targets"}


def complaints(name, **options):
    """Findings that are not ok, by check."""
    findings = check_scorer(f"{__name__}:{name}", **({"tasks": ["layer_decomposition"], "size": 16} | options))
    return {finding.what: finding for finding in findings if finding.status != "ok"}


@pytest.mark.parametrize(
    ("name", "what", "status", "words"),
    [
        ("raises", "scores", "failed", "KeyError at test_contract.py:"),
        ("returns_none", "scores", "failed", "returned None, expected a flat sequence of 4 numbers"),
        ("returns_nan", "scores", "failed", "returned nan for this member; return one finite number for each of the 4"),
        ("returns_too_few", "scores", "failed", "returned 3 values for 4 members"),
        ("declines_everything", "scores", "failed", "not today"),
        ("by_position", "order", "failed", "not by its position"),
        ("DoesNotAddUp", "contributions", "failed", "their mean over layers and pixels must be the score"),
        ("CannotSayWhere", "contributions", "failed", "raised ZeroDivisionError"),
        ("throws_dice", "repeatable", "failed", "draw random numbers from a fixed seed"),
        ("Counts", "repeatable", "failed", "scores differently by up to "),
        ("writes_layers", "read-only", "failed", "writes to batch.layers_GLCHW"),
        ("writes_inputs", "read-only", "failed", "writes to batch.inputs[0]"),
        ("reads_truth", "reads", "failed", 'reads batch.targets_LCHW without declaring it; write needs = {"targets"}'),
        (
            "reads_prompt_and_inputs",
            "reads",
            "failed",
            'reads batch.prompt without declaring it; write needs = {"inputs", ',
        ),
        ("reads_truth_unseen", "reads", "failed", "has no score (TypeError"),
        ("likes_prompts_unseen", "reads", "failed", "scores differently where inputs, prompt, targets"),
        ("divides_by_alpha", "empty layers", "failed", "fully transparent layers have no score (returned nan"),
        ("needs_two_pixels", "empty layers", "failed", "single-pixel layers have no score (ValueError"),
        ("needs_company", "single", "warning", "evaluation cannot report this term"),
        ("constant", "spread", "warning", "all 4 qualities score 0.5"),
        ("upside_down", "spread", "warning", "higher must be better"),
        ("HoldsALock", "pickle", "warning", "cannot be pickled (TypeError"),
    ],
)
def test_each_way_of_breaking_the_contract_is_found_and_nothing_else_is_blamed(name, what, status, words):
    found = complaints(name)
    assert list(found) == [what]
    assert found[what].status == status
    assert words in found[what].detail


@pytest.mark.parametrize(
    ("name", "what", "words"),
    [
        ("nothing_of_that_name", "loads", "has no 'nothing_of_that_name'"),
        ("FailsToStart", "loads", "cannot be built (FileNotFoundError: none); mend its params or its constructor"),
        ("wants_masks", "declares", "names 'masks', which no batch has"),
        ("NOT_A_SCORER", "declares", "3 is not a scorer"),
    ],
)
def test_what_cannot_be_built_or_declares_nonsense_is_not_tried(name, what, words):
    findings = check_scorer(f"{__name__}:{name}")
    assert findings[-1].what == what
    assert findings[-1].status == "failed"
    assert words in findings[-1].detail
    assert "scores" not in {finding.what for finding in findings}


@pytest.mark.parametrize("name", ["layer", "composition", "background", "boundary"])
def test_the_shipped_terms_pass_for_every_task_they_judge(name):
    findings = check_scorer(name, size=32)
    assert [finding for finding in findings if finding.status != "ok"] == []
    tasks = {task for task, entry in TASKS.items() if name in entry.rewards}
    assert set(judged_tasks(name)) == tasks
    scored = next(finding.detail for finding in findings if finding.what == "scores")
    assert set(scored.partition(": ")[2].split(", ")) == tasks


def test_a_scorer_that_keeps_the_contract_is_told_its_speed_and_nothing_to_mend():
    findings = check_scorer(f"{__name__}:opacity", size=16)
    assert {finding.status for finding in findings} == {"ok"}
    assert "ms per sample of 16 × 12 pixels" in {finding.what: finding for finding in findings}["speed"].detail


def test_handing_a_changed_copy_to_another_scorer_is_not_a_read():
    assert complaints("halves", size=32) == {}


def test_a_task_that_a_scorer_declines_is_a_warning_that_names_the_task():
    found = complaints("declines_removal", tasks=None)
    assert list(found) == ["scores"]
    assert found["scores"].status == "warning"
    assert found["scores"].detail.startswith("object_removal: declines the task")
    assert "no foreground here" in found["scores"].detail


def test_a_fault_in_some_tasks_names_them_and_one_in_all_says_so():
    assert complaints("raises", tasks=None)["scores"].detail.startswith("every task: KeyError")
    found = complaints("reads_truth", tasks=["mask_matting", "object_removal"])
    assert found["reads"].detail.startswith("every task: reads")
    assert complaints("constant", tasks=["mask_matting"])["spread"].detail.startswith("mask_matting: all 4")


def test_a_need_that_no_chosen_task_meets_leaves_nothing_to_score():
    found = complaints("writes_inputs", tasks=["text_to_rgba"])
    assert list(found) == ["scores"]
    assert "no task gives what it needs" in found["scores"].detail


def test_params_reach_the_scorer_and_wrong_ones_are_a_finding():
    assert check_scorer("layer", {"metrics": ["psnr"]}, ["object_removal"], 16)[-1].status == "ok"
    (finding,) = check_scorer("layer", {"metric": ["psnr"]})
    assert (finding.what, finding.status) == ("loads", "failed")
    assert "it takes: metrics" in finding.detail


def test_an_unknown_task_and_a_tiny_size_are_the_callers_error():
    with pytest.raises(ConfigError, match="known tasks"):
        check_scorer("layer", tasks=["mating"])
    with pytest.raises(ConfigError, match="at least 16"):
        check_scorer("layer", size=8)


@pytest.mark.parametrize("task", TASKS)
def test_example_groups_are_fixed_and_get_worse_from_the_truth_on(task):
    batch, same = example_group(task), example_group(task)
    assert torch.equal(batch.layers_GLCHW, same.layers_GLCHW)
    assert torch.equal(batch.layers_GLCHW[0], batch.targets_LCHW)
    assert batch.roles == TASKS[task].targets
    assert batch.input_roles == TASKS[task].inputs
    for image in (batch.layers_GLCHW, *batch.inputs):
        assert image.min() >= 0
        assert image.max() <= 1
    for metric in ("ssim", "psnr"):
        scores = LayerFidelity([metric]).score(batch)
        assert (scores.diff() < -0.02).all()
