"""Opaque initialisation of VAEs that others trained: both classes, on disk and in memory."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from tiny_models import VAE, qwen_vae

from common.commit import verify
from common.errors import CheckpointError
from pipeline.cli import main
from policy.folder import load_vae
from policy.foreign import WEIGHTS, load_rgb_vae
from policy.vae import build_vae, opaque

MAKERS = {"AutoencoderKL": lambda: build_vae(VAE, 3, image_channels=3).eval(), "AutoencoderKLQwenImage": qwen_vae}


@pytest.fixture(params=MAKERS)
def rgb(request):
    return MAKERS[request.param]()


def pixels(vae, batch=2, size=16, channels=4):
    """Random images in [−1, 1], with an axis for frames where the class has one."""
    images = torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images.unsqueeze(2) if isinstance(vae, AutoencoderKLQwenImage) else images


@torch.no_grad()
def test_posteriors_and_colours_equal_the_rgb_vaes_and_alpha_is_exactly_one(rgb):
    made, images = opaque(rgb).eval(), pixels(rgb)
    theirs, ours = rgb.encode(images[:, :3]).latent_dist, made.encode(images).latent_dist
    torch.testing.assert_close(ours.mean, theirs.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.logvar, theirs.logvar, atol=1e-6, rtol=0)
    before, after = rgb.decode(theirs.mean).sample, made.decode(theirs.mean).sample
    torch.testing.assert_close(after[:, :3], before, atol=1e-6, rtol=0)
    assert after.shape[1] == 4
    assert torch.equal(after[:, 3], torch.ones_like(after[:, 3]))
    assert float(before.std()) > 0.01


def test_every_copied_weight_is_bit_equal_and_only_two_layers_have_grown(rgb):
    old, new = rgb.state_dict(), opaque(rgb).state_dict()
    grown = {name for name in old if old[name].shape != new[name].shape}
    assert grown == {"encoder.conv_in.weight", "decoder.conv_out.weight", "decoder.conv_out.bias"}
    for name, value in old.items():
        assert torch.equal(new[name][tuple(slice(length) for length in value.shape)], value), name
    assert not new["encoder.conv_in.weight"][:, 3].any()
    assert not new["decoder.conv_out.weight"][3].any()
    assert float(new["decoder.conv_out.bias"][3]) == 1


def test_conversion_leaves_the_global_random_state_and_the_rgb_vae_alone(rgb):
    before = {name: value.clone() for name, value in rgb.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    made = opaque(rgb)
    assert torch.equal(torch.rand(2), expected)
    for value in made.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in rgb.state_dict().items())


@torch.no_grad()
def test_several_frames_of_a_video_vae_keep_their_colours_too():
    rgb = qwen_vae()
    made, video = opaque(rgb).eval(), pixels(rgb, 1, 8).expand(-1, -1, 5, -1, -1).contiguous()
    latents = rgb.encode(video[:, :3]).latent_dist.mean
    torch.testing.assert_close(made.encode(video).latent_dist.mean, latents, atol=1e-6, rtol=0)
    frames = made.decode(latents).sample
    torch.testing.assert_close(frames[:, :3], rgb.decode(latents).sample, atol=1e-6, rtol=0)
    assert frames[:, 3].unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_the_command_converts_a_folder_and_keeps_dtype_config_and_bits(tmp_path, rgb, dtype, inside):
    rgb.to(dtype).save_pretrained(tmp_path / "model" / "vae")
    source, out = tmp_path / "model" / ("" if inside else "vae"), tmp_path / "out"
    assert main(["vae-convert", str(source), str(out)]) == 0
    verify(out)
    made = type(rgb).from_pretrained(out, subfolder="vae", torch_dtype=dtype)
    expected = opaque(rgb).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())
    assert made.config.latents_mean == rgb.config.latents_mean
    stored = load_rgb_vae(out)  # reads any number of channels
    assert stored.dtype == dtype
    assert json.loads((out / "model_index.json").read_text())["vae"] == ["diffusers", type(rgb).__name__]


def test_a_converted_vae_of_the_projects_own_class_loads_as_such(tmp_path):
    MAKERS["AutoencoderKL"]().save_pretrained(tmp_path / "vae")
    assert main(["vae-convert", str(tmp_path), str(tmp_path / "out")]) == 0
    assert isinstance(load_vae(tmp_path / "out"), AutoencoderKL)


def test_a_vae_of_another_class_is_refused_where_training_would_load_it(tmp_path):
    qwen_vae(4).save_pretrained(tmp_path / "vae")
    assert torch.equal(load_vae(tmp_path).decoder.conv_in.weight, qwen_vae(4).decoder.conv_in.weight)
    settings = tmp_path / "vae" / "config.json"
    settings.write_text(settings.read_text().replace("AutoencoderKLQwenImage", "AutoencoderTiny"))
    with pytest.raises(CheckpointError, match="is of class AutoencoderTiny, this version trains"):
        load_vae(tmp_path)


def fails(capsys, *arguments):
    """The one message with which the command ends."""
    assert main(["vae-convert", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("omnialpha: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("channels", [4, 1])
def test_a_vae_with_other_than_three_channels_is_refused(tmp_path, capsys, channels):
    qwen_vae(channels).save_pretrained(tmp_path / "vae")
    error = fails(capsys, tmp_path, tmp_path / "out")
    assert f"has {channels} image channels" in error
    assert ("RGBA VAE already" in error) == (channels == 4)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_vae_or_with_another_model_is_refused(tmp_path, capsys):
    assert "no vae/config.json or config.json here" in fails(capsys, tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    assert "a QwenImageTransformer2DModel, not a VAE that is known" in fails(capsys, tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    assert "config.json: cannot be read" in fails(capsys, tmp_path, tmp_path / "out")


def test_pickled_weights_are_refused_and_never_opened(tmp_path, capsys):
    qwen_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    assert [path.suffix for path in (tmp_path / "vae").glob("diffusion*")] == [".bin"]
    error = fails(capsys, tmp_path, tmp_path / "out")
    assert "pickled weights (diffusion_pytorch_model.bin)" in error
    assert "safetensors form" in error


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no weights"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
        (lambda path: path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors")), "fp16.safetensors"),
    ],
)
def test_missing_and_damaged_weights_are_one_message(tmp_path, capsys, damage, message):
    qwen_vae().save_pretrained(tmp_path / "vae")
    damage(tmp_path / "vae" / WEIGHTS)
    assert message in fails(capsys, tmp_path, tmp_path / "out")


def test_weights_that_do_not_belong_to_the_config_are_refused(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    qwen_vae().save_pretrained(tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / WEIGHTS)
    partial = {name: value for name, value in weights.items() if name != "encoder.conv_in.weight"}
    save_file(partial, tmp_path / "vae" / WEIGHTS)
    assert "encoder.conv_in.weight" in fails(capsys, tmp_path, tmp_path / "out")
    weights["encoder.conv_in.weight"] = torch.zeros(2, 2)
    save_file(weights, tmp_path / "vae" / WEIGHTS)
    assert "do not fit" in fails(capsys, tmp_path, tmp_path / "out")


def test_an_existing_folder_is_not_touched(tmp_path, capsys):
    assert "exists; remove it" in fails(capsys, tmp_path, tmp_path)


def test_weights_in_several_files_are_read_alike(tmp_path):
    qwen_vae().save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    assert main(["vae-convert", str(tmp_path), str(tmp_path / "out")]) == 0
    expected = opaque(qwen_vae()).state_dict()
    made = load_rgb_vae(tmp_path / "out").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
