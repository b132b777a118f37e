"""Degradations: graded, nested, repeatable, and only where they can be seen."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from common.errors import DataError
from data.degradations import GRADES, KINDS, WRONG_OBJECT, degrade, kinds_for
from data.tasks import TASKS

SIDE = 64


@pytest.fixture
def scene():
    """A soft-edged disc before coloured noise, as (foreground, background, input)."""
    generator = torch.Generator().manual_seed(0)
    background = torch.cat([torch.rand((3, SIDE, SIDE), generator=generator), torch.ones(1, SIDE, SIDE)])
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    alpha = (16 - ((rows - 32.0) ** 2 + (columns - 32.0) ** 2).sqrt()).clamp(0, 1)
    foreground = torch.cat([torch.tensor([0.9, 0.4, 0.1])[:, None, None].expand(3, SIDE, SIDE), alpha[None]])
    image = foreground * alpha + background * (1 - alpha)
    image[3] = 1
    return foreground, background, image


def layers_of(task, scene):
    foreground, background, _ = scene
    return torch.stack([foreground if role == "foreground" else background for role in TASKS[task].targets])


def visual(task):
    return [kind for kind in kinds_for(task) if kind != WRONG_OBJECT]


CASES = [(task, kind) for task in TASKS for kind in visual(task)]


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_each_grade_is_further_from_the_truth_than_the_one_before(task, kind, scene):
    truth = layers_of(task, scene)
    errors = []
    for grade in range(GRADES + 1):
        spoilt = degrade(kind, grade, task, truth, scene[2], seed=3)
        premultiplied = torch.cat([spoilt[:, :3] * spoilt[:, 3:], spoilt[:, 3:]], dim=1)
        true = torch.cat([truth[:, :3] * truth[:, 3:], truth[:, 3:]], dim=1)
        errors.append(float((premultiplied - true).abs().mean()))
    assert errors[0] == 0
    assert errors[1] > 0
    # Two places of a textured background differ as much however far they lie apart: there only the way is graded.
    if kind == "misplaced_layer" and set(TASKS[task].targets) != {"foreground"}:
        return
    assert stats.spearmanr(errors, range(GRADES + 1)).statistic == pytest.approx(1)


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_what_comes_out_keeps_the_contract_of_layers(task, kind, scene):
    truth = layers_of(task, scene)
    untouched = truth.clone()
    for grade in range(GRADES + 1):
        spoilt = degrade(kind, grade, task, truth, scene[2], seed=5)
        assert spoilt.shape == truth.shape
        assert spoilt.dtype == torch.float32
        assert float(spoilt.min()) >= 0
        assert float(spoilt.max()) <= 1
    assert torch.equal(truth, untouched)


def test_equal_seeds_spoil_alike_and_other_seeds_otherwise(scene):
    truth = layers_of("automatic_matting", scene)
    holes = [degrade("holed_alpha", 3, "automatic_matting", truth, scene[2], seed) for seed in (1, 1, 2)]
    assert torch.equal(holes[0], holes[1])
    assert not torch.equal(holes[0], holes[2])


def test_holes_of_a_higher_grade_contain_those_of_a_lower_one(scene):
    truth = layers_of("automatic_matting", scene)
    gone = [degrade("holed_alpha", g, "automatic_matting", truth, scene[2], 1)[0, 3] == 0 for g in range(GRADES + 1)]
    for smaller, larger in pairwise(gone):
        assert bool((larger | ~smaller).all())
        assert int(larger.sum()) > int(smaller.sum())


def test_a_wrong_object_leaves_the_pixels_alone(scene):
    truth = layers_of("text_to_rgba", scene)
    assert torch.equal(degrade(WRONG_OBJECT, GRADES, "text_to_rgba", truth, scene[2], 0), truth)


def test_kinds_that_need_the_input_are_not_asked_of_tasks_without_one():
    assert {"colour_shift", "misplaced_layer"} & set(kinds_for("text_to_rgba")) == set()
    assert WRONG_OBJECT in kinds_for("referring_matting")
    assert WRONG_OBJECT not in kinds_for("automatic_matting")
    assert {kind for task in TASKS for kind in kinds_for(task)} == set(KINDS)


def test_an_object_that_was_not_removed_shows_more_with_each_grade(scene):
    truth = layers_of("object_removal", scene)
    left = [degrade("leftover_background", g, "object_removal", truth, scene[2], 0) for g in range(GRADES + 1)]
    towards_input = [float((layer[0, :3] - scene[2][:3]).abs().mean()) for layer in left]
    assert np.all(np.diff(towards_input) < 0)


def test_an_object_that_is_hardly_added_leaves_the_scene_as_it_was(scene):
    background, image = scene[1], scene[2]
    added = [degrade("missing_object", g, "background_to_image", image[None], background, 0) for g in (0, 2, GRADES)]
    assert torch.equal(added[0][0], image)
    assert float((added[1][0] - image).abs().max()) > 0.1
    assert torch.equal(added[2][0], background)


def test_a_swollen_shape_is_larger_and_has_the_objects_colours(scene):
    truth = layers_of("text_to_rgba", scene)
    areas = []
    for grade in range(GRADES + 1):
        swollen = degrade("swollen_shape", grade, "text_to_rgba", truth, scene[2], 0)[0]
        areas.append(float((swollen[3] > 0.5).sum()))
        assert torch.allclose(swollen[:3][:, swollen[3] > 0], truth[0, :3, :1, 0], atol=1e-6)
    assert areas == sorted(set(areas))
    assert areas[-1] > 2 * areas[0]


def test_a_layer_without_an_object_cannot_swell(scene):
    nothing = torch.zeros(1, 4, SIDE, SIDE)
    assert torch.equal(degrade("swollen_shape", GRADES, "text_to_rgba", nothing, scene[2], 0), nothing)


def test_a_grade_or_kind_that_there_is_not_is_named(scene):
    truth = layers_of("text_to_rgba", scene)
    with pytest.raises(DataError, match="grades 0 to 4, not 5"):
        degrade("holed_alpha", 5, "text_to_rgba", truth, scene[2], 0)
    with pytest.raises(DataError, match="'colour_shift' does not fit task 'text_to_rgba'"):
        degrade("colour_shift", 1, "text_to_rgba", truth, scene[2], 0)
