"""Evaluation metrics against direct NumPy formulas."""

import numpy as np
import pytest
import torch

from common.errors import RewardError
from rewards.matting import connectivity_error, gradient_error
from rewards.metrics import HIGHER_IS_BETTER, NEEDS_ROLE, clearly, goodness, sample_metrics


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    layers, targets = torch.rand(2, 2, 4, 9, 7, generator=generator)
    targets[1, 3, :4] = 0.0
    return layers, targets


def test_metrics_equal_their_formulas(pair):
    found = sample_metrics(("background", "foreground"), *pair)
    (p_back, p_front), (t_back, t_front) = (tensor.double().numpy() for tensor in pair)
    error = np.abs(p_front[3] - t_front[3])

    def psnr(p, t):
        p, t = (image[:3] * image[3] + 1 - image[3] for image in (p, t))
        return 10 * np.log10(1 / np.mean((p - t) ** 2))

    visible = t_front[3] > 0
    rgb = [np.abs(p_back[:3] - t_back[:3]).mean(), np.abs(p_front[:3] - t_front[:3]).mean(axis=0)[visible].mean()]
    expected = {
        "alpha_mad": error.sum() / 63,
        "alpha_mse": (error**2).sum() / 63,
        "alpha_sad": error.sum() / 1000,
        "alpha_grad": gradient_error(p_front[3], t_front[3]),  # derived in test_matting.py
        "alpha_conn": connectivity_error(p_front[3], t_front[3]),
        "soft_iou": np.minimum(p_front[3], t_front[3]).sum() / np.maximum(p_front[3], t_front[3]).sum(),
        "alpha_coverage": p_front[3].mean() - t_front[3].mean(),
        "rgb_l1": np.mean(rgb),
        "rgb_l1_alpha": np.mean(
            [
                (np.abs(p[:3] - t[:3]).mean(axis=0) * t[3]).sum() / t[3].sum()
                for p, t in ((p_back, t_back), (p_front, t_front))
            ]
        ),
        "psnr_white": (psnr(p_back, t_back) + psnr(p_front, t_front)) / 2,
        "background_psnr": psnr(p_back, t_back),
    }
    assert found == pytest.approx(expected, abs=1e-12)
    assert visible.sum() == 35


def test_every_metric_has_a_direction(pair):
    assert set(sample_metrics(("background", "foreground"), *pair)) == set(HIGHER_IS_BETTER)


def test_a_perfect_prediction_reaches_the_best_value_of_every_metric(pair):
    _, targets = pair
    found = sample_metrics(("background", "foreground"), targets, targets)
    assert found == {
        "alpha_mad": 0.0,
        "alpha_mse": 0.0,
        "alpha_sad": 0.0,
        "alpha_grad": 0.0,
        "alpha_conn": 0.0,
        "alpha_coverage": 0.0,
        "soft_iou": 1.0,
        "rgb_l1": 0.0,
        "rgb_l1_alpha": 0.0,
        "psnr_white": 100.0,
        "background_psnr": 100.0,
    }


def test_metrics_improve_in_their_direction(pair):
    layers, targets = pair
    far, near = (sample_metrics(("background", "foreground"), targets.lerp(layers, x), targets) for x in (0.8, 0.2))
    for name in HIGHER_IS_BETTER:
        assert goodness(name, near[name]) > goodness(name, far[name]), name


def test_coverage_says_whether_foregrounds_are_left_out_or_added(pair):
    _, targets = pair
    less, more = targets.clone(), targets.clone()
    less[1, 3] *= 0.5
    more[1, 3] = 0.5 + 0.5 * more[1, 3]
    roles = ("background", "foreground")
    assert (
        sample_metrics(roles, less, targets)["alpha_coverage"]
        < 0
        < sample_metrics(roles, more, targets)["alpha_coverage"]
    )


@pytest.mark.parametrize(
    ("quantity", "low", "high", "expected"),
    [
        ("soft_iou", 0.1, 0.2, "better"),
        ("alpha_mad", 0.1, 0.2, "worse"),
        ("alpha_mad", -0.2, -0.1, "better"),
        ("reward", -0.2, -0.1, "worse"),
        ("term/mine", 0.1, 0.2, "better"),
        ("soft_iou", -0.1, 0.2, ""),
        ("soft_iou", 0.0, 0.2, ""),
        ("soft_iou", float("nan"), float("nan"), ""),
        ("soft_iou", None, None, ""),
        ("alpha_coverage", 0.1, 0.2, ""),
    ],
)
def test_an_interval_is_good_or_bad_only_where_it_excludes_zero_and_the_metric_has_a_direction(
    quantity, low, high, expected
):
    assert clearly(quantity, low, high) == expected


def test_the_metrics_that_a_sample_has_are_those_whose_layers_it_has(pair):
    layers, targets = pair
    for role in ("background", "foreground"):
        found = sample_metrics((role,), layers[1:], targets[1:])
        assert set(found) == {name for name in HIGHER_IS_BETTER if NEEDS_ROLE.get(name) in (None, role)}


def test_metrics_without_a_layer_to_measure_are_left_out(pair):
    layers, targets = pair
    assert set(sample_metrics(("background",), layers[:1], targets[:1])) == {
        "rgb_l1",
        "rgb_l1_alpha",
        "psnr_white",
        "background_psnr",
    }
    alone = sample_metrics(("foreground",), layers[1:], targets[1:])
    assert "background_psnr" not in alone
    assert "alpha_mad" in alone


def test_metrics_are_means_over_the_layers_of_their_role(pair):
    layers, targets = pair
    both = sample_metrics(("foreground", "foreground"), layers, targets)
    single = [sample_metrics(("foreground",), layers[k : k + 1], targets[k : k + 1]) for k in range(2)]
    assert both == pytest.approx({name: (single[0][name] + single[1][name]) / 2 for name in both})


def test_empty_alpha_in_truth_and_prediction_is_full_agreement_without_a_colour_error():
    clear = torch.rand(1, 4, 5, 5)
    clear[:, 3] = 0.0
    found = sample_metrics(("foreground",), clear, clear)
    assert found["soft_iou"] == 1.0
    assert "rgb_l1" not in found


def test_colour_under_zero_truth_alpha_does_not_count(pair):
    layers, targets = pair
    changed = layers.clone()
    changed[1, :3, :4] = 0.5
    before, after = (sample_metrics(("foreground",), x[1:], targets[1:])["rgb_l1"] for x in (layers, changed))
    assert before == after


def test_one_pixel_is_enough():
    white, black = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    found = sample_metrics(("foreground",), black, white)
    assert found["alpha_mad"] == 1.0
    assert found["alpha_sad"] == 0.001
    assert found["soft_iou"] == 0.0
    assert found["rgb_l1"] == 1.0


def test_shapes_that_do_not_fit_are_refused(pair):
    layers, targets = pair
    with pytest.raises(RewardError, match="bring the prediction to the truth's size"):
        sample_metrics(("background", "foreground"), layers[..., :5], targets)
    with pytest.raises(RewardError, match="1 roles for 2 layers"):
        sample_metrics(("background",), layers, targets)
