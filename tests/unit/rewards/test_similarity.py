"""The blur, SSIM and PSNR kernels against SciPy, torchmetrics and NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import structural_similarity_index_measure

from common.errors import RewardError
from rewards import similarity
from rewards.similarity import blur, gaussian, psnr, ssim


def textured(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values in [0, 1] with flat, smooth and noisy areas."""
    generator = torch.Generator().manual_seed(seed)
    *leading, height, width = shape
    coarse = torch.rand(1, max(1, int(np.prod(leading))), 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    noise = torch.rand(smooth.shape, generator=generator)
    image = torch.where(smooth > 0.6, noise, (3 * smooth - 0.4))
    return image.clamp(0, 1).reshape(shape)


def each(predictions_N3HW: torch.Tensor, truths_N3HW: torch.Tensor) -> torch.Tensor:
    """SSIM of N images, each to its own truth, (N,)."""
    return ssim(predictions_N3HW[None], truths_N3HW)[0].mean(dim=-1)


@pytest.mark.parametrize("size", [(11, 200), (64, 64), (65, 129), (7, 6)])
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("radius", [1, 5])
def test_the_blur_equals_scipys_gaussian_filter(size, mirror, radius):
    image = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = blur(image, gaussian(radius, radius / 3), mirror)
    mode = "mirror" if mirror else "constant"
    expected = gaussian_filter(image.numpy(), (0, 0, radius / 3, radius / 3), truncate=3, mode=mode)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), radius=st.integers(1, 12))
def test_a_blur_with_nothing_outside_loses_what_leaves_the_image(height, width, radius):
    one = torch.zeros(height, width, dtype=torch.float64)
    one[height // 2, width // 2] = 1
    found, weights = blur(one, gaussian(radius, radius / 3), mirror=False), np.array(gaussian(radius, radius / 3))
    kept = [weights[max(0, radius - s // 2) : radius + s - s // 2].sum() for s in (height, width)]
    assert found.sum().item() == pytest.approx(kept[0] * kept[1], abs=1e-12)
    assert found.min() >= 0


@pytest.mark.parametrize("size", [(11, 11), (24, 20), (64, 64), (133, 211)])
def test_ssim_equals_torchmetrics(size):
    truths, noise = textured(4, 3, *size), textured(4, 3, *size, seed=1)
    predictions = truths.lerp(noise, 0.3)
    options = {"sigma": 1.5, "kernel_size": 11, "data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, maps = structural_similarity_index_measure(predictions.double(), truths.double(), **options)
    found = each(predictions, truths)
    np.testing.assert_allclose(found, maps.flatten(1).mean(dim=1), atol=5e-6)
    assert 0.2 < found.min() < found.max() < 0.99


def test_ssim_compares_every_prediction_with_every_of_its_truths():
    truths, predictions = textured(2, 3, 40, 30), textured(5, 2, 3, 40, 30, seed=1)
    found = ssim(predictions, truths)
    assert found.shape == (5, 2, 3)
    for member in range(5):
        for place in range(2):
            alone = each(predictions[member, place, None], truths[place, None])
            assert found[member, place].mean().item() == pytest.approx(alone.item(), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_ssim_is_symmetric_at_most_one_and_one_for_equal_images(seed, share):
    x, y = textured(1, 3, 20, 33, seed=seed), textured(1, 3, 20, 33, seed=seed + 1)
    y = x.lerp(y, share)
    assert each(x, y).item() == pytest.approx(each(y, x).item(), abs=1e-6)
    assert -1 <= each(x, y).item() <= 1 + 1e-6
    assert each(x, x).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("brightness", [0.0, 0.02, 0.5, 1.0])
def test_flat_areas_have_no_structure_but_rounding(brightness):
    x, y = torch.full((1, 3, 80, 80), brightness), torch.full((1, 3, 80, 80), 0.9 * brightness)
    expected = (2 * 0.9 * brightness**2 + 1e-4) / ((1 + 0.81) * brightness**2 + 1e-4)
    assert each(x, y).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("values", [1, 3 * 24 * 20, 7 * 24 * 20])
def test_ssim_and_psnr_in_small_portions_are_the_same(values, monkeypatch):
    truths, predictions = textured(2, 3, 24, 20), textured(5, 2, 3, 24, 20, seed=1)
    whole = ssim(predictions, truths), psnr(predictions, truths)
    monkeypatch.setattr(similarity, "_SSIM_VALUES", values)
    monkeypatch.setattr(similarity, "_PSNR_VALUES", values)
    torch.testing.assert_close(ssim(predictions, truths), whole[0], atol=1e-7, rtol=0)
    torch.testing.assert_close(psnr(predictions, truths), whole[1], atol=1e-9, rtol=0)


def test_a_nan_pixel_spoils_its_own_plane_and_no_other():
    truths, predictions = textured(2, 3, 70, 30), textured(4, 2, 3, 70, 30, seed=1)
    predictions[1, 0, 2, 5, 5] = float("nan")
    wrong = ssim(predictions, truths).isnan()
    assert wrong.nonzero().tolist() == [[1, 0, 2]]
    assert psnr(predictions, truths).isnan().nonzero().tolist() == [[1, 0]]


def test_neither_changes_what_it_is_given():
    truths, predictions = textured(2, 3, 24, 20), textured(5, 2, 3, 24, 20, seed=1)
    before = truths.clone(), predictions.clone()
    ssim(predictions, truths)
    psnr(predictions, truths)
    blur(truths, gaussian(5, 1.5), mirror=True)
    assert torch.equal(truths, before[0])
    assert torch.equal(predictions, before[1])


def test_psnr_equals_its_formula_and_is_infinite_for_equal_images():
    truths, predictions = textured(2, 3, 24, 20), textured(5, 2, 3, 24, 20, seed=1)
    squares = np.square(predictions.double().numpy() - truths.double().numpy())
    np.testing.assert_allclose(psnr(predictions, truths), -10 * np.log10(squares.mean(axis=(2, 3, 4))), atol=1e-5)
    assert psnr(truths[None], truths).tolist() == [[float("inf")] * 2]


def test_ssim_of_images_smaller_than_its_window_is_refused():
    with pytest.raises(RewardError, match="at least 11 × 11 pixels, these are 10 × 64"):
        ssim(torch.zeros(2, 1, 3, 10, 64), torch.zeros(1, 3, 10, 64))
