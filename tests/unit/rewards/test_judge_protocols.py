"""Protocols: what is asked, how answers become scores, and what a missing answer does."""

import math

import numpy as np
import pytest
import torch

from common.errors import RewardError
from data.rgba import blend
from rewards.base import run_scorer
from rewards.judge.asking import ask_all, checked
from rewards.judge.pictures import pictures, unwoven, view_3HW
from rewards.judge.protocols import Verdict, compare, grid, grid_order, pointwise, question, tally
from rewards.judge.templates import load_templates
from rewards.judge.term import JudgeScorer


class AlphaLover:
    """A judge with a known taste: it likes alpha, and leans towards the first place by ``bias``."""

    def __init__(self, bias=0.0, broken=()):
        self.concurrency, self.bias, self.broken, self.asked = 3, bias, broken, []

    def ask(self, text, images, labels):
        self.asked.append(text)
        alphas = np.array([float(unwoven(image)[3].mean()) for image in images])
        if any(abs(alphas[0] - level) < 0.01 for level in self.broken):
            raise RewardError("the server answered 503")
        if len(images) == 1:
            places = np.linspace(0, 1, len(labels))
            return dict(zip(labels, softmax(-((places - alphas[0]) ** 2) * 50), strict=True))
        likes = 5 * alphas
        likes[0] += self.bias
        neither = [likes.max() - 3] if len(labels) > len(images) else []
        return dict(zip(labels, softmax(np.array([*likes, *neither])), strict=True))


def softmax(values):
    shares = np.exp(values - values.max())
    return (shares / shares.sum()).tolist()


@pytest.fixture
def templates():
    return load_templates("small")


@pytest.fixture
def batch(make_batch):
    """Members of text_to_rgba whose alpha is 0.9, 0.1, 0.5, 0.3 all over."""
    made = make_batch(
        members=4,
        roles=("foreground",),
        size=(64, 64),
        task="text_to_rgba",
        inputs=(),
        input_roles=(),
        prompt="Draw x.",
    )
    layers = made.layers_GLCHW.clone()
    for member, level in enumerate((0.9, 0.1, 0.5, 0.3)):
        layers[member, :, 3] = level
    return type(made)(**{**vars(made), "layers_GLCHW": layers})


def test_pointwise_scores_follow_what_the_judge_likes_and_stay_in_range(templates, batch):
    scores = pointwise(AlphaLover(), templates, batch)
    assert np.argsort(scores).tolist() == [1, 3, 2, 0]
    assert all(0 <= score <= 1 for score in scores)


def test_grid_scores_are_mapped_back_from_the_shuffled_order(templates, batch):
    order = grid_order(batch, seed=5, turn=0)
    assert sorted(order) == [0, 1, 2, 3]
    assert order != [0, 1, 2, 3]
    scores = grid(AlphaLover(), templates, batch, seed=5)
    assert np.argsort(scores).tolist() == [1, 3, 2, 0]
    # Log-shares of an unbiased judge do not depend on the order.
    assert scores == pytest.approx(grid(AlphaLover(), templates, batch, seed=6), abs=1e-6)


def test_orders_of_a_grid_follow_from_seed_and_group(batch):
    assert grid_order(batch, 1, 0) == grid_order(batch, 1, 0)
    assert len({tuple(grid_order(batch, seed, 0)) for seed in range(8)}) > 1


def test_more_orders_take_a_place_out_of_the_scores(templates, batch):
    fair = np.array(grid(AlphaLover(), templates, batch, seed=0))

    def off(orders):
        biased = np.array(grid(AlphaLover(bias=2.0), templates, batch, seed=0, orders=orders))
        return np.abs((biased - biased.mean()) - (fair - fair.mean())).max()

    assert off(32) < off(1) / 2


def test_a_grid_larger_than_its_labels_is_refused(templates, batch):
    large = type(batch)(**{**vars(batch), "layers_GLCHW": batch.layers_GLCHW.repeat(3, 1, 1, 1, 1)})
    with pytest.raises(RewardError, match="labels for 8 members, group 'group-7' has 12"):
        grid(AlphaLover(), templates, large, seed=0)


def test_both_orders_cancel_what_the_place_did(templates, batch):
    (verdict,) = compare(AlphaLover(bias=3.0), templates, batch, [(2, 3)])
    (fair,) = compare(AlphaLover(), templates, batch, [(2, 3)])
    assert verdict.position_bias > 0.1
    assert fair.position_bias == pytest.approx(0, abs=1e-9)
    assert verdict.outcome == fair.outcome == "win"
    (mirrored,) = compare(AlphaLover(bias=3.0), templates, batch, [(3, 2)])
    assert mirrored.preference == pytest.approx(-verdict.preference)
    assert mirrored.outcome == "loss"


def test_orders_that_contradict_each_other_are_a_tie():
    assert Verdict((0.9, 0.1, 0.0), (0.1, 0.9, 0.0)).outcome == "tie"
    assert Verdict((0.2, 0.1, 0.7), (0.2, 0.1, 0.7)).outcome == "tie"


def test_the_tally_counts_outcomes_with_intervals():
    verdicts = [Verdict((0.8, 0.1, 0.1), (0.7, 0.2, 0.1))] * 3 + [Verdict((0.1, 0.8, 0.1), (0.1, 0.8, 0.1))]
    found = tally(verdicts, [None] * 4, ["a", "b", "c", "d"], draws=200)
    assert (found.win[0], found.tie[0], found.loss[0]) == (0.75, 0.0, 0.25)
    assert found.win[1] < 0.75 < found.win[2] + 1e-9
    assert found.position_bias[0] == pytest.approx(0.75 * 0.1)


def test_one_question_without_an_answer_costs_one_member_its_score(templates, batch):
    scores = run_scorer("judge", JudgeScorer(AlphaLover(broken=(0.5,)), templates), batch)
    assert scores.reasons == (None, None, "the server answered 503", None)
    assert math.isnan(scores.values_G[2])
    assert np.isfinite(scores.values_G[[0, 1, 3]]).all()


def test_a_single_sample_of_a_grids_term_is_rated_pointwise(templates, batch):
    single = type(batch)(**{**vars(batch), "layers_GLCHW": batch.layers_GLCHW[2:3]})
    scores = run_scorer("judge", JudgeScorer(AlphaLover(), templates, "grid"), single)
    assert scores.reasons == (None,)
    assert scores.values_G[0] == pytest.approx(pointwise(AlphaLover(), templates, batch)[2])


def test_a_grid_without_an_answer_costs_the_group_its_scores(templates, batch):
    scores = run_scorer("judge", JudgeScorer(AlphaLover(broken=(0.1, 0.3, 0.5, 0.9)), templates, "grid"), batch)
    assert scores.reasons == ("the server answered 503",) * 4


@pytest.mark.parametrize(
    "answer", [{}, {"1": 0.5}, {"1": 2.0, "2": -1.0}, {"1": math.nan, "2": 0.5}, {"1": 1e-9, "2": 1e-9}]
)
def test_an_answer_that_is_no_probability_is_refused(answer):
    with pytest.raises(RewardError, match="where probabilities of 1, 2 were asked for"):
        checked(answer, ("1", "2"))


def test_answers_keep_the_order_of_their_questions(templates, batch):
    asked = [question(templates, "pointwise", batch, [member]) for member in (0, 1, 2, 3) * 4]
    answers = ask_all(AlphaLover(), asked)
    assert answers[:4] == answers[4:8] == answers[12:]
    assert answers[0] != answers[1]


def test_woven_views_come_back_pixel_by_pixel(templates, batch):
    (picture,) = pictures(templates, batch, [2], lettered=False)
    assert picture.size == (128, 128)
    views = unwoven(picture)
    layer = batch.layers_GLCHW[2, 0]
    assert torch.allclose(views[0], torch.full((3, 64, 64), 0.5), atol=1 / 255)
    assert torch.allclose(views[1], blend(layer, 0.0), atol=1 / 255)
    assert torch.allclose(views[2], blend(layer, 1.0), atol=1 / 255)
    assert torch.allclose(views[3], layer[3:].expand(3, -1, -1), atol=1 / 255)


def test_a_sheet_has_a_row_for_each_candidate(batch):
    one, two = (pictures(load_templates("vlm"), batch, members, lettered=True)[0] for members in ([0], [0, 1]))
    assert two.width == one.width
    assert two.height > 1.8 * one.height


def test_views_show_what_their_names_say(make_batch):
    batch = make_batch(size=(32, 32))
    background, foreground = batch.layers_GLCHW[1]
    assert torch.allclose(view_3HW(batch, 1, "foreground.black"), blend(foreground, 0.0), atol=1e-5)
    assert torch.allclose(view_3HW(batch, 1, "background.white"), blend(background, 1.0), atol=1e-5)
    assert torch.allclose(view_3HW(batch, 1, "input.black"), blend(batch.inputs[0], 0.0))
    assert torch.equal(view_3HW(batch, 1, "foreground.alpha")[0], foreground[3])


def test_protocols_and_orders_that_there_are_not_are_refused(templates):
    with pytest.raises(ValueError, match="choose pointwise or grid"):
        JudgeScorer(AlphaLover(), templates, "pairwise")
    with pytest.raises(ValueError, match="orders 2 with protocol pointwise"):
        JudgeScorer(AlphaLover(), templates, "pointwise", orders=2)
