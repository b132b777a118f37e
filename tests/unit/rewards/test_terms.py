"""The paper's terms against float64 derivations that share no code with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from common.errors import ConfigError, RewardError
from policy.perceptual import PerceptualDistance
from rewards import similarity, terms
from rewards.base import build, run_scorer
from rewards.similarity import psnr, ssim
from rewards.terms import BackgroundStructure, BoundaryAccuracy, CompositionFidelity, LayerFidelity, boundary_radius


def blend64(image_4HW: np.ndarray, background: float) -> np.ndarray:
    return image_4HW[:3] * image_4HW[3] + background * (1 - image_4HW[3])


def ssim64(x_HW: np.ndarray, y_HW: np.ndarray) -> float:
    """Wang et al. 2004, mirrored borders without repeating the edge, mean over the whole image."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")

    mu_x, mu_y = blur(x_HW), blur(y_HW)
    var_x, var_y, cov = blur(x_HW**2) - mu_x**2, blur(y_HW**2) - mu_y**2, blur(x_HW * y_HW) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))))


def fidelity64(prediction_4HW: np.ndarray, truth_4HW: np.ndarray) -> float:
    parts = []
    for background in (0.0, 1.0):
        x, y = blend64(prediction_4HW, background), blend64(truth_4HW, background)
        parts.append(np.mean([ssim64(a, b) for a, b in zip(x, y, strict=True)]))
        parts.append(np.clip(10 * np.log10(1 / np.mean((x - y) ** 2)) / 50, 0, 1))
    return float(np.mean(parts))


def boundary64(prediction_HW: np.ndarray, truth_HW: np.ndarray, radius: int) -> float:
    def band(alpha: np.ndarray) -> np.ndarray:
        # truncate=3 cuts the kernel at 3σ = radius; mode "constant" puts nothing outside the image.
        soft = ((alpha >= 0.05) & (alpha <= 0.95)).astype(np.float64)
        return gaussian_filter(soft, radius / 3, truncate=3, mode="constant")

    mask = np.clip(band(prediction_HW) + band(truth_HW), 0, 1)
    return 1.0 if mask.sum() == 0 else float(1 - (mask * abs(prediction_HW - truth_HW)).sum() / mask.sum())


def numpy64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def test_ssim_equals_skimage_where_the_borders_are_constant():
    # skimage mirrors with the edge repeated, torchmetrics without; both are constant here, so the maps agree.
    rng = np.random.default_rng(0)
    x, y = np.zeros((3, 40, 36)), np.zeros((3, 40, 36))
    y[:, 11:-11, 11:-11] = rng.random((3, 18, 14))
    x[:, 11:-11, 11:-11] = np.clip(y[:, 11:-11, 11:-11] + 0.1 * rng.standard_normal((3, 18, 14)), 0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    _, expected = structural_similarity(x, y, channel_axis=0, full=True, **options)
    found = ssim(torch.tensor(x[None], dtype=torch.float32), torch.tensor(y, dtype=torch.float32)).mean()
    assert 0.1 < expected.mean() < 0.99
    assert found.item() == pytest.approx(expected.mean(), abs=3e-6)


def test_ssim_of_flat_areas_of_different_brightness_is_within_float32_rounding():
    # Without structure only the luminance factor is left; float32 variances there are rounding noise beside c2 = 9e-4.
    x, y = torch.full((1, 3, 32, 32), 0.3), torch.full((1, 3, 32, 32), 0.8)
    expected = (2 * 0.3 * 0.8 + 1e-4) / (0.3**2 + 0.8**2 + 1e-4)
    assert ssim(x, y[0]).mean().item() == pytest.approx(expected, abs=1e-4)


def test_ssim_equals_the_formula_with_mirrored_borders(make_batch):
    batch = make_batch(members=4)
    images = batch.layers_GLCHW[:, 0, :3]
    found = ssim(images[None, :2], images[2:])[0].mean(dim=1)
    for index in range(2):
        pairs = zip(numpy64(images[index]), numpy64(images[index + 2]), strict=True)
        assert found[index].item() == pytest.approx(np.mean([ssim64(a, b) for a, b in pairs]), abs=3e-6)


def test_psnr_equals_skimage_for_each_image(make_batch):
    images = make_batch(members=4).layers_GLCHW[:, 0, :3]
    found = psnr(images[None, :2], images[2:])[0]
    for index in range(2):
        expected = peak_signal_noise_ratio(numpy64(images[index]), numpy64(images[index + 2]), data_range=1.0)
        assert found[index].item() == pytest.approx(expected, abs=1e-5)


def test_layer_term_equals_the_literal_formula_for_each_member(make_batch):
    batch = make_batch()
    found = LayerFidelity().score(batch)
    for member in range(3):
        expected = np.mean(
            [
                fidelity64(numpy64(batch.layers_GLCHW[member, layer]), numpy64(batch.targets_LCHW[layer]))
                for layer in range(2)
            ]
        )
        assert found[member].item() == pytest.approx(expected, abs=3e-6)


def test_layer_term_is_the_mean_of_its_two_metrics(make_batch):
    batch = make_batch()
    parts = [run_scorer("layer", build("layer", {"metrics": [name]}), batch).values_G for name in ("ssim", "psnr")]
    np.testing.assert_allclose(run_scorer("layer", build("layer"), batch).values_G, np.mean(parts, axis=0), atol=1e-12)
    assert not np.allclose(parts[0], parts[1])


def test_composition_term_composites_back_to_front_and_compares_with_the_input(make_batch):
    batch = make_batch()
    found = CompositionFidelity().score(batch)
    for member in range(3):
        back, front = numpy64(batch.layers_GLCHW[member])
        parts = []
        for background in (0.0, 1.0):
            x = front[:3] * front[3] + blend64(back, background) * (1 - front[3])
            y = blend64(numpy64(batch.inputs[0]), background)
            parts.append(np.mean([ssim64(a, b) for a, b in zip(x, y, strict=True)]))
            parts.append(np.clip(10 * np.log10(1 / np.mean((x - y) ** 2)) / 50, 0, 1))
        assert found[member].item() == pytest.approx(np.mean(parts), abs=3e-6)


def test_background_term_is_one_minus_the_distance_of_the_blended_background_layers_alone(make_batch):
    batch = make_batch(roles=("background", "foreground", "background"))
    found = BackgroundStructure().score(batch)
    distance = PerceptualDistance()
    for member in range(3):
        parts = []
        for layer in (0, 2):
            for background in (0.0, 1.0):
                x, y = (
                    torch.from_numpy(blend64(numpy64(image), background)).float()[None]
                    for image in (batch.layers_GLCHW[member, layer], batch.targets_LCHW[layer])
                )
                parts.append(1 - distance(x[None], y).item())
        assert found[member].item() == pytest.approx(np.mean(parts), abs=1e-5)


def test_the_perceptual_metric_compares_the_composite_with_the_input_as_the_papers_code_does(make_batch):
    batch = make_batch()
    found = CompositionFidelity(["perceptual"]).score(batch)
    blends = [[terms.on_black_and_white(x)] for x in (terms.over(batch.layers_GLCHW), batch.inputs[0])]
    expected = 1 - PerceptualDistance()(blends[0][0], blends[1][0]).mean(dim=1)
    torch.testing.assert_close(found, expected)
    assert CompositionFidelity(["perceptual"]).describes.startswith("EfficientNet-Lite0")
    assert CompositionFidelity().describes is None


@pytest.mark.parametrize("size", [(24, 20), (320, 300)])
def test_boundary_term_equals_the_literal_formula(make_batch, size):
    batch = make_batch(roles=("background", "foreground", "foreground"), size=size)
    found = BoundaryAccuracy().score(batch)
    radius = max(1, round(10 * (size[0] * size[1]) ** 0.5 / 1024))
    for member in range(3):
        expected = np.mean(
            [
                boundary64(numpy64(batch.layers_GLCHW[member, k, 3]), numpy64(batch.targets_LCHW[k, 3]), radius)
                for k in (1, 2)
            ]
        )
        assert found[member].item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("size", "radius"), [((1024, 1024), 10), ((512, 2048), 10), ((512, 512), 5), ((256, 256), 2), ((16, 16), 1)]
)
def test_the_boundary_radius_scales_with_the_image_and_is_at_least_one(size, radius):
    assert boundary_radius(*size) == radius


def test_the_soft_band_includes_both_its_ends(make_batch):
    # A uniform alpha against a clear truth: inside the band the error is alpha itself, outside there is no band.
    values = torch.tensor([0.0499, 0.05, 0.95, 0.9501])
    layers, targets = torch.ones(4, 1, 4, 12, 12), torch.ones(1, 4, 12, 12)
    layers[:, :, 3], targets[:, 3] = values.reshape(4, 1, 1, 1), 0.0
    batch = make_batch(roles=("foreground",), layers_GLCHW=layers, targets_LCHW=targets)
    assert BoundaryAccuracy().score(batch).tolist() == pytest.approx([1.0, 0.95, 0.05, 1.0], abs=1e-6)


@pytest.mark.parametrize("name", ["layer", "composition", "background", "boundary"])
def test_a_perfect_prediction_scores_exactly_one(make_batch, name):
    truth = make_batch().targets_LCHW
    batch = make_batch(layers_GLCHW=truth.repeat(2, 1, 1, 1, 1), inputs=(terms.over(truth),))
    np.testing.assert_allclose(run_scorer(name, build(name), batch).values_G, 1.0, atol=1e-6)


def test_colour_under_zero_alpha_does_not_count(make_batch):
    layers, targets = torch.rand(2, 1, 4, 16, 16), torch.rand(1, 4, 16, 16)
    layers[:, :, 3], targets[:, 3] = 0.0, 0.0
    batch = make_batch(members=2, roles=("foreground",), layers_GLCHW=layers, targets_LCHW=targets)
    assert LayerFidelity().score(batch).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert BoundaryAccuracy().score(batch).tolist() == [1.0, 1.0]


def test_the_layer_term_sees_a_wrong_hard_alpha_that_the_boundary_term_cannot(make_batch):
    layers, targets = torch.ones(1, 1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    layers[..., 3, :, :8] = 0.0
    batch = make_batch(members=1, roles=("foreground",), layers_GLCHW=layers, targets_LCHW=targets)
    assert BoundaryAccuracy().score(batch).tolist() == [1.0]
    assert LayerFidelity().score(batch).item() < 0.9


@pytest.mark.parametrize("name", ["layer", "composition", "background", "boundary"])
def test_scoring_a_group_equals_scoring_its_members_one_by_one(make_batch, name):
    batch = make_batch(members=5, size=(33, 47))
    together = run_scorer(name, build(name), batch).values_G
    alone = [
        run_scorer(name, build(name), make_batch(members=5, size=(33, 47), layers_GLCHW=layers[None]))
        for layers in batch.layers_GLCHW
    ]
    np.testing.assert_allclose(together, [scores.values_G[0] for scores in alone], atol=1e-6)


@pytest.mark.parametrize("name", ["layer", "composition", "background", "boundary"])
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)), seed=st.integers(0, 100))
def test_reordering_the_members_reorders_the_scores(make_batch, name, order, seed):
    batch = make_batch(members=4, size=(16, 13), seed=seed)
    shuffled_batch = make_batch(members=4, size=(16, 13), seed=seed, layers_GLCHW=batch.layers_GLCHW[list(order)])
    scorer = build(name, {"min_side": 32} if name == "background" else {})
    values = run_scorer(name, scorer, batch).values_G
    shuffled = run_scorer(name, scorer, shuffled_batch).values_G
    np.testing.assert_allclose(shuffled, values[list(order)], atol=1e-6)
    assert np.all((values <= 1 + 1e-6) & (values >= -0.5))


@pytest.mark.parametrize("name", ["layer", "composition", "background", "boundary"])
def test_a_nan_pixel_makes_its_member_missing_and_no_other(make_batch, name):
    clean = make_batch()
    broken = clean.layers_GLCHW.clone()
    broken[1, :, 3, 5, 5] = float("nan")
    scores = run_scorer(name, build(name), make_batch(layers_GLCHW=broken))
    expected = run_scorer(name, build(name), clean).values_G
    assert np.isnan(scores.values_G).tolist() == [False, True, False]
    np.testing.assert_allclose(scores.values_G[[0, 2]], expected[[0, 2]], atol=1e-6)


def test_large_groups_are_split_without_changing_the_scores(make_batch, monkeypatch):
    batch = make_batch()
    whole = LayerFidelity().score(batch)
    for values in (5 * 3 * 24 * 20, 1):
        monkeypatch.setattr(similarity, "_SSIM_VALUES", values)
        torch.testing.assert_close(LayerFidelity().score(batch), whole, atol=1e-6, rtol=0)


def test_layers_and_truth_are_blended_once_for_all_terms_of_a_group(make_batch, monkeypatch):
    blended = []
    original = terms.on_black_and_white
    monkeypatch.setattr(terms, "on_black_and_white", lambda image: blended.append(image.ndim) or original(image))
    batch = make_batch(members=6)
    for scorer in (LayerFidelity(["ssim"]), LayerFidelity(["psnr"]), BackgroundStructure()):
        scorer.score(batch)
    assert sorted(blended) == [4, 5]
    for scorer in (CompositionFidelity(["ssim"]), CompositionFidelity(["psnr"])):
        scorer.score(batch)
    assert sorted(blended) == [3, 4, 4, 5]  # and the input image and the composites
    LayerFidelity(["psnr"]).score(make_batch(members=6))
    assert len(blended) == 6  # another group has blends of its own


def test_work_on_the_truth_does_not_grow_with_the_group(make_batch, monkeypatch):
    seen = []
    original = terms.soft_band
    monkeypatch.setattr(
        terms, "soft_band", lambda alpha, radius: seen.append(alpha.shape[0]) or original(alpha, radius)
    )
    BoundaryAccuracy().score(make_batch(members=6))
    assert sorted(seen) == [1, 6]  # one band of the truth's foreground, six of the predictions'


def test_images_smaller_than_the_ssim_window_are_refused_but_have_psnr_and_boundary(make_batch):
    with pytest.raises(RewardError, match="at least 11 × 11 pixels, these are 10 × 64"):
        LayerFidelity().score(make_batch(size=(10, 64)))
    pixel = make_batch(size=(1, 1))
    assert np.isfinite(run_scorer("layer", LayerFidelity(["psnr"]), pixel).values_G).all()
    assert np.isfinite(run_scorer("boundary", BoundaryAccuracy(), pixel).values_G).all()
    reasons = run_scorer("layer", LayerFidelity(), pixel).reasons
    assert all("use larger images" in reason for reason in reasons)


def test_a_one_pixel_boundary_is_weighed_by_its_blurred_mask(make_batch):
    # One soft pixel of error 0.5 at its centre: the normalised 3×3 kernel at σ = 1/3 leaves its centre weight.
    layers, targets = torch.zeros(1, 1, 4, 12, 12), torch.zeros(1, 4, 12, 12)
    layers[0, 0, 3, 6, 6] = 0.5
    batch = make_batch(members=1, roles=("foreground",), layers_GLCHW=layers, targets_LCHW=targets)
    centre = (1 / (1 + 2 * np.exp(-4.5))) ** 2
    assert BoundaryAccuracy().score(batch).item() == pytest.approx(1 - 0.5 * centre, abs=1e-6)


def test_terms_refuse_tasks_they_cannot_judge(make_batch):
    with pytest.raises(RewardError, match="boundary needs a foreground layer"):
        BoundaryAccuracy().score(make_batch(roles=("background",)))
    with pytest.raises(RewardError, match="background needs a background layer"):
        BackgroundStructure().score(make_batch(roles=("foreground",)))
    with pytest.raises(RewardError, match="compares with the input image"):
        CompositionFidelity().score(make_batch(input_roles=("mask",)))
    with pytest.raises(RewardError, match=r"input image is \(8, 8\), the layers are \(24, 20\)"):
        CompositionFidelity().score(make_batch(inputs=(torch.zeros(4, 8, 8),)))


def test_metrics_and_networks_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="metrics of a reward is"):
        LayerFidelity(["lpips"])
    with pytest.raises(ConfigError, match="no perceptual network 'vgg'"):
        BackgroundStructure("vgg")
    with pytest.raises(ConfigError, match=r"reward 'background': params do not fit.*it takes: network, weights"):
        build("background", {"metrics": ["ssim"]})


def test_the_mask_input_is_never_taken_for_the_image(make_batch):
    image = make_batch().inputs[0]
    swapped = make_batch(inputs=(torch.zeros_like(image), image), input_roles=("mask", "image"))
    torch.testing.assert_close(CompositionFidelity().score(swapped), CompositionFidelity().score(make_batch()))


def test_a_better_prediction_scores_higher(make_batch):
    truth = make_batch().targets_LCHW
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1))
    layers = torch.stack([truth.lerp(noise, share) for share in (0.5, 0.2, 0.05)])
    batch = make_batch(layers_GLCHW=layers, inputs=(terms.over(truth),))
    for name in ("layer", "composition", "background", "boundary"):
        values = run_scorer(name, build(name), batch).values_G
        assert values[0] < values[1] < values[2]
