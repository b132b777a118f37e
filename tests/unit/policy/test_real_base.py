"""Sampling from a base folder, against diffusers' own Edit-Plus pipeline on the same folder."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from tiny_base import stock_pipeline, write_base

from common.errors import ConfigError, NumericsError
from data.tasks import get_task
from policy import dit
from policy.dit import to_tokens
from policy.edit import EditConfig, EditPolicy, canvas

PROMPT = "Cut out a red apple."
SMALL = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def policy(folder):
    return EditPolicy(folder)


@pytest.fixture
def small(monkeypatch):
    """The pipeline's rule, for pictures of a smaller area: its two constants are all that changes."""
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", SMALL * SMALL)
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", SMALL * SMALL)


def picture(width, height, seed=0, alpha=False):
    """Random pixels (H, W, 4), opaque unless ``alpha``."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if not alpha:
        pixels[..., 3] = 255
    return pixels


def as_input(pixels):
    return torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(255))


class Calls:
    """Positions, image shapes and answer of every call of a transformer."""

    def __init__(self, model):
        self.seen = []
        self._hooks = [
            model.register_forward_pre_hook(
                lambda _, args, kw: self.seen.append({"shapes": kw["img_shapes"]}), with_kwargs=True
            ),
            model.pos_embed.register_forward_hook(lambda _, args, out: self.seen[-1].update(positions=out)),
            model.register_forward_hook(lambda _, args, out: self.seen[-1].update(answer=out[0])),
        ]

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def stock_run(folder, pictures, steps, guidance, seed, size, mode="RGBA"):
    """Final tokens of the pipeline, and its calls."""
    pipeline = stock_pipeline(folder)
    images = [Image.fromarray(pixels).convert(mode) for pixels in pictures]
    height, width = canvas(*pictures[-1].shape[:2], size)
    with Calls(pipeline.transformer) as seen:
        result = pipeline(
            image=images,
            prompt=PROMPT,
            negative_prompt=" " if guidance > 1 else None,
            true_cfg_scale=guidance,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    return result.images, seen


def assert_equal_runs(policy, folder, pictures, steps, guidance, size, mode="RGBA"):
    tokens, theirs = stock_run(folder, pictures, steps, guidance, 3, size, mode)
    config = EditConfig(steps=steps, guidance=guidance, size=size, seed=3)
    with Calls(policy.transformer) as ours:
        latents = policy.latents(1, [as_input(pixels) for pixels in pictures], PROMPT, config)
    assert len(ours) == len(theirs) == steps * (2 if guidance > 1 else 1)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["shapes"] == other["shapes"]
        assert all(torch.equal(*pair) for pair in zip(mine["positions"], other["positions"], strict=True))
        velocities = [call["answer"][:, : tokens.shape[1]] for call in (mine, other)]
        torch.testing.assert_close(*velocities, atol=1e-5, rtol=0)
    torch.testing.assert_close(to_tokens(latents), tokens, atol=1e-5, rtol=0)
    assert float(tokens.std()) > 0.1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sizes", [[(50, 50)], [(97, 40)], [(64, 64), (30, 90)], [(90, 30), (40, 40), (33, 70)]])
def test_positions_velocities_and_latents_are_those_of_the_stock_pipeline(policy, folder, small, sizes, guidance):
    pictures = [picture(*size, seed=k) for k, size in enumerate(sizes)]
    assert_equal_runs(policy, folder, pictures, 4, guidance, SMALL)


def test_they_are_after_fifty_steps_with_guidance_too(policy, folder, small):
    assert_equal_runs(policy, folder, [picture(48, 80)], 50, 4.0, SMALL)


def test_they_are_at_the_pipelines_own_area_of_a_million_pixels(policy, folder):
    assert_equal_runs(policy, folder, [picture(60, 50)], 2, 4.0, 1024)


def test_an_rgb_base_whose_vae_was_made_rgba_samples_what_the_rgb_base_does(policy, tmp_path, small):
    """The opaque initialisation changes nothing for an RGB picture."""
    assert_equal_runs(policy, write_base(tmp_path, rgba=False), [picture(70, 50)], 4, 4.0, SMALL, mode="RGB")


def test_what_a_sample_is_asked_for_reaches_it(policy, small):
    """Were one of these left out, the comparisons above would say less than they seem to."""

    def draw(pixels=None, prompt=PROMPT, **settings):
        config = EditConfig(**({"steps": 3, "size": SMALL} | settings))
        return policy.latents(1, [as_input(picture(50, 50) if pixels is None else pixels)], prompt, config)

    plain, thinned = draw(), picture(50, 50)
    thinned[10:30, 10:30, 3] = 0
    assert torch.equal(draw(), plain)
    others = {
        "prompt": draw(prompt="Cut out a blue bus."),
        "picture": draw(picture(50, 50, seed=9)),
        "alpha": draw(thinned),
        "seed": draw(seed=1),
        "guidance": draw(guidance=2.0),
        "negative": draw(negative="blurred, ugly"),
        "steps": draw(steps=4),
        "shift": draw(shift=3.0),
        "solver": draw(solver="dpm2m", steps=4),
    }
    assert [name for name, other in others.items() if float((other - plain).abs().max()) < 1e-4] == []


def test_result_g_is_that_of_a_single_draw_with_seed_g_later(policy, small):
    inputs = [as_input(picture(40, 60))]
    both = policy.latents(2, inputs, PROMPT, EditConfig(steps=2, size=SMALL, count=2, seed=5))
    later = policy.latents(2, inputs, PROMPT, EditConfig(steps=2, size=SMALL, seed=6))
    assert torch.equal(both[1], later[0])


@pytest.mark.parametrize("task", ["text_to_rgba", "automatic_matting", "object_removal", "layer_decomposition"])
def test_every_kind_of_task_gives_its_layers_at_the_last_inputs_canvas(policy, small, task):
    found = get_task(task)
    inputs = [as_input(picture(96, 40, seed=k, alpha=True)) for k in range(len(found.inputs))]
    with Calls(policy.transformer) as seen:
        layers = policy.infer(found, inputs, PROMPT, EditConfig(steps=2, size=SMALL, guidance=1.0))
    height, width = canvas(40, 96, SMALL) if inputs else (SMALL, SMALL)
    assert layers.shape == (1, len(found.targets), 4, height, width)
    assert layers.min() >= 0
    assert layers.max() <= 1
    assert layers.std() > 0.01
    assert seen[0]["shapes"] == [[(1, height // 16, width // 16)] * found.images]


def test_weights_stored_in_bfloat16_are_sampled_in_bfloat16(policy, folder, tmp_path, small):
    half = write_base(tmp_path, dtype=torch.bfloat16)
    config = EditConfig(steps=2, size=SMALL, guidance=2.0)
    drawn = EditPolicy(half).latents(1, [as_input(picture(50, 50))], PROMPT, config)
    assert drawn.dtype == torch.bfloat16
    full = policy.latents(1, [as_input(picture(50, 50))], PROMPT, config)
    assert 0 < float((drawn.float() - full).abs().mean()) < 0.1 * float(full.abs().mean())


def test_inputs_that_do_not_fit_the_task_are_refused(policy):
    with pytest.raises(ConfigError, match=r"object_removal takes 2 images \(image, mask\).*got \[\(4, 30, 40\)\]"):
        policy.infer(get_task("object_removal"), [as_input(picture(40, 30))], PROMPT, EditConfig())


def test_more_layers_than_the_axis_holds_are_refused_before_any_work(policy, small, monkeypatch):
    monkeypatch.setattr(dit, "AXIS", 4)  # a sequence that overruns the real one takes minutes
    monkeypatch.setattr(policy._codec, "encode", lambda _: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match="5 layers and inputs: the layer axis holds 4"):
        policy.latents(4, [as_input(picture(40, 40))], PROMPT, EditConfig(steps=2, size=SMALL))


def test_values_that_are_not_numbers_are_an_error(folder, small):
    policy = EditPolicy(folder)
    with torch.no_grad():
        policy.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="values that are not numbers"):
        policy.infer(get_task("text_to_rgba"), [], PROMPT, EditConfig(steps=2, size=SMALL))
