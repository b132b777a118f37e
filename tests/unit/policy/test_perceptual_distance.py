"""Perceptual distances against NumPy float64 derivations from Zhang et al. 2018."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.errors import ConfigError
from policy import perceptual
from policy.features import load_efficientnet
from policy.perceptual import PerceptualDistance

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SLICES = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)
ENDS = (1, 3, 6, 9, 12)
"""Convolutions whose activations LPIPS compares."""


@pytest.fixture(scope="module")
def vgg() -> dict[str, np.ndarray]:
    """Random convolutions of VGG16 by LPIPS's names, and channel weights."""
    rng, state, inputs = np.random.default_rng(0), {}, 3
    for outputs, index, part in zip(CHANNELS, TORCHVISION, SLICES, strict=True):
        weight = rng.standard_normal((outputs, inputs, 3, 3), dtype=np.float32) * np.sqrt(2 / (9 * inputs))
        state[f"net.slice{part}.{index}.weight"] = weight.astype(np.float32)
        state[f"net.slice{part}.{index}.bias"] = 0.1 * rng.standard_normal(outputs, dtype=np.float32)
        inputs = outputs
    for stage, end in enumerate(ENDS):
        state[f"lin{stage}.model.1.weight"] = rng.random((1, CHANNELS[end], 1, 1), dtype=np.float32)
    return state


@pytest.fixture(scope="module")
def vgg_file(vgg, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "lpips.safetensors"
    save_file({name: torch.from_numpy(value) for name, value in vgg.items()}, path)
    return path


def lpips64(state: dict[str, np.ndarray], x_3HW: np.ndarray, y_3HW: np.ndarray) -> float:
    """The published definition, image by image."""

    def stages(image: np.ndarray) -> list[np.ndarray]:
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        x = (2 * image - 1 - shift[:, None, None]) / scale[:, None, None]
        found = []
        for k, (index, part) in enumerate(zip(TORCHVISION, SLICES, strict=True)):
            if k and part != SLICES[k - 1]:
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))
            weight = state[f"net.slice{part}.{index}.weight"].astype(np.float64)
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
            x = np.einsum("chwij,ocij->ohw", windows, weight, optimize=True)
            x = np.maximum(x + state[f"net.slice{part}.{index}.bias"][:, None, None], 0)
            if k in ENDS:
                found.append(x / np.sqrt((x**2).sum(axis=0) + 1e-20))
        return found

    pairs = zip(stages(x_3HW.astype(np.float64)), stages(y_3HW.astype(np.float64)), strict=True)
    weights = [state[f"lin{stage}.model.1.weight"].reshape(-1, 1, 1).astype(np.float64) for stage in range(5)]
    return float(sum((w * (a - b) ** 2).sum(axis=0).mean() for w, (a, b) in zip(weights, pairs, strict=True)))


def images(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


def test_lpips_equals_its_definition_for_each_pair(vgg, vgg_file):
    distance = PerceptualDistance("lpips_vgg", vgg_file, min_side=32)
    predictions, truths = images(4).reshape(2, 2, 3, 32, 32), images(2, seed=1)
    found = distance(predictions, truths)
    for member in range(2):
        for place in range(2):
            expected = lpips64(vgg, predictions[member, place].numpy(), truths[place].numpy())
            assert found[member, place].item() == pytest.approx(expected, rel=1e-4)
    assert found.min() > 0.1


def test_torchvisions_names_and_a_pth_file_are_the_same_weights(vgg, vgg_file, tmp_path):
    renamed = {}
    for name, value in vgg.items():
        part = name.split(".")
        renamed[f"features.{part[2]}.{part[3]}" if part[0] == "net" else name] = torch.from_numpy(value)
    renamed["classifier.0.weight"] = torch.zeros(2, 2)  # torchvision's file holds the classifier too
    torch.save(renamed, tmp_path / "vgg16.pth")
    pair = images(1)[None], images(1, seed=1)
    distances = [PerceptualDistance("lpips_vgg", path, 32)(*pair) for path in (vgg_file, tmp_path / "vgg16.pth")]
    assert torch.equal(*distances)


def test_a_file_without_channel_weights_gets_those_of_lpips(vgg, tmp_path):
    bare = {name: torch.from_numpy(value) for name, value in vgg.items() if not name.startswith("lin")}
    save_file(bare, tmp_path / "bare.safetensors")
    heads = torch.load(perceptual._bundled_heads(), "cpu", weights_only=True)
    expected = lpips64(
        vgg | {name: value.numpy() for name, value in heads.items()}, images(1)[0].numpy(), images(1, seed=1)[0].numpy()
    )
    found = PerceptualDistance("lpips_vgg", tmp_path / "bare.safetensors", 32)(images(1)[None], images(1, seed=1))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_distance_by_efficientnet_is_the_mean_of_one_minus_cosine_over_places_and_stages():
    x, y = images(1, (128, 160)), images(1, (128, 160), seed=1)
    parts = []
    for a, b in zip(load_efficientnet()(x).stages, load_efficientnet()(y).stages, strict=True):
        a, b = a[0].double().numpy(), b[0].double().numpy()
        cosine = (a * b).sum(axis=0) / (np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0) + 1e-12)
        parts.append(np.mean(1 - cosine))
    assert PerceptualDistance()(x[None], y).item() == pytest.approx(np.mean(parts), abs=1e-6)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1))
def test_the_distance_by_efficientnet_is_symmetric_and_between_0_and_1(seed, share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 3, 32, 32, generator=generator)
    y = x.lerp(torch.rand(1, 3, 32, 32, generator=generator), share)
    there, back = (PerceptualDistance(min_side=32)(a[None], b).item() for a, b in ((x, y), (y, x)))
    assert 0 < there <= 1
    assert there == pytest.approx(back, abs=1e-6)


def test_equal_images_have_no_distance_and_worse_ones_more():
    truth = images(1, (64, 64))
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(3))
    found = PerceptualDistance()(torch.stack([truth.lerp(noise, share) for share in (0, 0.1, 0.3, 0.9)]), truth)[:, 0]
    assert found[0] < 1e-9
    assert (found.diff() > 0.01).all()


def test_opposite_extremes_stay_in_range():
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert 0 < PerceptualDistance()(black[None], white).item() <= 1


def test_a_truth_passes_through_the_network_once_for_all_its_predictions(monkeypatch):
    batches = []
    original = perceptual._unit_stages
    monkeypatch.setattr(perceptual, "_unit_stages", lambda net, x: batches.append(len(x)) or original(net, x))
    PerceptualDistance()(images(12, (64, 64)).reshape(6, 2, 3, 64, 64), images(2, (64, 64)))
    assert sorted(batches) == [1, 1, 6, 6]


def test_a_group_too_large_for_one_call_is_split_without_changing_the_distances(monkeypatch):
    predictions, truths = images(10, (64, 64)).reshape(5, 2, 3, 64, 64), images(2, (64, 64), seed=1)
    whole = PerceptualDistance()(predictions, truths)
    monkeypatch.setitem(perceptual._PIXELS_AT_ONCE, "efficientnet_lite0", 2 * 128 * 128)
    torch.testing.assert_close(PerceptualDistance()(predictions, truths), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "size", "compared"),
    [
        ({}, (64, 64), (128, 128)),
        ({}, (64, 96), (128, 192)),
        ({}, (300, 200), (300, 200)),
        ({}, (1024, 768), (512, 384)),
        ({"min_side": 32}, (64, 64), (64, 64)),
        ({"max_side": 256}, (1024, 1024), (256, 256)),
    ],
)
def test_small_images_are_enlarged_and_large_ones_shrunk(options, size, compared):
    assert PerceptualDistance(**options).size(*size) == compared


def test_it_says_which_network_judges_and_that_efficientnet_is_not_lpips(vgg_file):
    assert PerceptualDistance().describes.startswith("EfficientNet-Lite0 features, equal weights (not LPIPS)")
    assert PerceptualDistance("lpips_vgg", vgg_file).describes == "LPIPS, VGG16 weights lpips.safetensors"


def test_it_is_sent_to_other_processes_without_its_weights():
    distance = PerceptualDistance()
    sent = pickle.dumps(distance)
    assert len(sent) < 1000
    pair = images(1, (64, 64))[None], images(1, (64, 64), seed=1)
    assert torch.equal(pickle.loads(sent)(*pair), distance(*pair))  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "alexnet"}, "no perceptual network 'alexnet'; choose one of efficientnet_lite0, lpips_vgg"),
        ({"network": "lpips_vgg"}, "lpips_vgg needs `weights`"),
        ({"network": "lpips_vgg", "weights": "/nowhere/vgg16.pth"}, "/nowhere/vgg16.pth: no such file"),
        ({"weights": "/nowhere/net.pth"}, "/nowhere/net.pth: no such file"),
        ({"network": "lpips_vgg", "min_side": 8}, "below 16 pixels"),
        ({"min_side": 256, "max_side": 128}, "exclude each other"),
    ],
)
def test_what_cannot_be_used_is_one_message(options, words):
    with pytest.raises(ConfigError, match=words):
        PerceptualDistance(**options)


def test_weights_that_are_not_vggs_are_refused_with_what_is_wrong(vgg, tmp_path):
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not those of VGG16 or LPIPS-VGG \\(0 convolutions instead of 13"):
        PerceptualDistance("lpips_vgg", tmp_path / "other.safetensors")
    state = {name: torch.from_numpy(value) for name, value in vgg.items()}
    save_file(state | {"net.slice1.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "thin.safetensors")
    with pytest.raises(ConfigError, match=r"thin\.safetensors: not those of VGG16"):
        PerceptualDistance("lpips_vgg", tmp_path / "thin.safetensors")
    state.pop("lin4.model.1.weight")
    save_file(state, tmp_path / "headless.safetensors")
    with pytest.raises(ConfigError, match="channel weights of"):
        PerceptualDistance("lpips_vgg", tmp_path / "headless.safetensors")
