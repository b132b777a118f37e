"""The stock Qwen-Image-Edit-Plus pipeline and ours lead the transformer through the same sequence.

The pipeline of diffusers runs as it is, with a tiny VAE and transformer of the real classes; only the area to which it
scales condition images is made small. Its text encoder is left out: the text's embeddings are given.
"""

import derivations
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from tiny_models import CHANNELS, DIT, TEXT, live_dit, normal, qwen_vae

from policy.dit import from_tokens, to_tokens, velocity

FACTOR = 8


@pytest.fixture(scope="module")
def model():
    return live_dit().requires_grad_(False)


@pytest.fixture
def calls(model):
    """What the transformer was given, its positions and its answer, of every call."""
    seen = []
    hooks = [
        model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True),
        model.pos_embed.register_forward_hook(lambda _, args, out: seen[-1].update(positions=out)),
        model.register_forward_hook(lambda _, args, out: seen[-1].update(answer=out[0])),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def run_stock(model, monkeypatch, sizes, height, width, area):
    """One step of the stock pipeline with random condition images of ``sizes`` (width, height)."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", area)
    pipeline = QwenImageEditPlusPipeline(
        FlowMatchEulerDiscreteScheduler(), qwen_vae(), None, None, None, transformer=model
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    pipeline(
        image=images,
        prompt_embeds=normal(1, 5, TEXT, seed=3),
        height=height,
        width=width,
        num_inference_steps=1,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    )


@pytest.mark.parametrize(("inputs", "height", "width"), [(1, 64, 64), (2, 64, 64), (2, 32, 64), (3, 64, 32)])
@torch.no_grad()
def test_our_velocity_equals_the_stock_pipelines_to_the_bit(model, calls, monkeypatch, inputs, height, width):
    run_stock(model, monkeypatch, [(width, height)] * inputs, height, width, height * width)
    (stock,) = calls
    h, w = height // FACTOR, width // FACTOR
    sequence = from_tokens(stock["hidden_states"], 1 + inputs, h, w)
    sigma, text = stock["timestep"], stock["encoder_hidden_states"]
    mine = velocity(model, sequence[:, :1], sigma, sequence[:, 1:], text)
    ours = calls[1]
    assert torch.equal(ours["hidden_states"], stock["hidden_states"])
    assert ours["img_shapes"] == stock["img_shapes"] == [[(1, h // 2, w // 2)] * (1 + inputs)]
    assert all(torch.equal(*pair) for pair in zip(ours["positions"], stock["positions"], strict=True))
    tokens = h * w // 4
    assert torch.equal(to_tokens(mine), stock["answer"][:, :tokens])
    assert float(mine.std()) > 0.01


@torch.no_grad()
def test_the_stock_pipelines_condition_latents_are_those_of_our_token_order(model, calls, monkeypatch):
    run_stock(model, monkeypatch, [(64, 32)] * 2, 32, 64, 32 * 64)
    latents = from_tokens(calls[0]["hidden_states"], 3, 4, 8)
    vae, rng = qwen_vae(), np.random.default_rng(0)
    mean, std = (
        torch.tensor(value).view(1, CHANNELS, 1, 1) for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    for place in (1, 2):
        pixels = torch.from_numpy(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8)).permute(2, 0, 1)[None, :, None]
        encoded = vae.encode(pixels / 127.5 - 1).latent_dist.mean[:, :, 0]
        torch.testing.assert_close(latents[:, place], (encoded - mean) / std, atol=1e-5, rtol=0)


@torch.no_grad()
def test_images_of_different_sizes_are_centred_each_for_itself_and_counted_in_their_order(model, calls, monkeypatch):
    run_stock(model, monkeypatch, [(64, 64), (128, 32), (32, 128)], 96, 64, 64 * 64)
    shapes = calls[0]["img_shapes"][0]
    assert shapes == [(1, 6, 4), (1, 4, 4), (1, 2, 8), (1, 8, 2)]
    check_positions(calls[0]["positions"], shapes)


@pytest.mark.parametrize("targets", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[(3, 5), (2, 2)], [(1, 7)], [(4, 4), (5, 1), (2, 6)]])
def test_several_targets_stand_before_inputs_of_any_size(model, targets, sizes):
    """Targets −m…−1 and inputs 0…n−1 of the paper, shifted by m; text starts behind half the longest side of all."""
    shapes = [(1, 3, 4)] * targets + [(1, *size) for size in sizes]
    check_positions(model.pos_embed([shapes], torch.device("cpu"), max_txt_seq_len=5), shapes)


def check_positions(positions, shapes):
    """Against the definition: layer = place in the list, rows and columns centred in each image."""
    places = [
        (layer, row, column)
        for layer, (_, height, width) in enumerate(shapes)
        for _, row, column in derivations.image_positions(1, height, width)
    ]
    longest = max(max(shape[1:]) for shape in shapes)
    images, text = positions
    assert images.numpy() == pytest.approx(derivations.rotations(places, DIT.rope_axes), abs=1e-6)
    expected = derivations.rotations(derivations.text_positions(len(text), longest, longest), DIT.rope_axes)
    assert text.numpy() == pytest.approx(expected, abs=1e-6)
