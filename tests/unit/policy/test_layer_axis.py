"""How a stack of layers becomes a sequence: token order, layer positions, what comes out."""

import derivations
import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHANNELS, DIT, TEXT, live_dit, make_condition, normal
from torch import nn

from common.errors import ConfigError
from policy import dit
from policy.dit import build_dit, check_axis, from_tokens, guided, to_tokens, velocities, velocity

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@pytest.fixture(scope="module")
def model():
    return live_dit().requires_grad_(False)


@pytest.fixture
def seen(model):
    """What the transformer and its position embedding met in the last call."""
    record = {}

    def model_called(_, args, kwargs):
        record.update(kwargs)

    def positions_called(_, args, kwargs, output):
        record["positions"] = output

    hooks = [
        model.register_forward_pre_hook(model_called, with_kwargs=True),
        model.pos_embed.register_forward_hook(positions_called, with_kwargs=True),
    ]
    yield record
    for hook in hooks:
        hook.remove()


class Echo(nn.Module):
    """Answers with its own sequence."""

    def forward(self, hidden_states, **_):
        return (hidden_states,)


def run(model, batch=2, targets=2, inputs=1, height=4, width=4, seed=0):
    condition = make_condition(batch, inputs, seed=seed + 50)
    inputs_BNCHW = normal(batch, inputs, CHANNELS, height, width, seed=seed + 1)
    latents = normal(batch, targets, CHANNELS, height, width, seed=seed)
    return velocity(model, latents, torch.full((batch,), 0.4), inputs_BNCHW, condition.text_BTD)


@given(shapes, st.integers(0, 1000))
def test_from_tokens_is_the_inverse_of_to_tokens(shape, seed):
    b, k, c, h, w = shape
    latents = normal(b, k, c, 2 * h, 2 * w, seed=seed)
    tokens = to_tokens(latents)
    assert tokens.shape == (b, k * h * w, 4 * c)
    assert torch.equal(from_tokens(tokens, k, 2 * h, 2 * w), latents)
    assert torch.equal(to_tokens(from_tokens(tokens, k, 2 * h, 2 * w)), tokens)


@given(shapes, st.integers(0, 1000))
def test_tokens_of_each_image_are_packed_as_in_diffusers_one_image_after_the_other(shape, seed):
    b, k, c, h, w = shape
    latents = normal(b, k, c, 2 * h, 2 * w, seed=seed)
    packed = [QwenImagePipeline._pack_latents(latents[:, i], b, c, 2 * h, 2 * w) for i in range(k)]
    assert torch.equal(to_tokens(latents), torch.cat(packed, dim=1))


def test_a_token_is_a_patch_of_two_by_two_with_channels_outside():
    latents = normal(1, 1, 3, 4, 6)
    assert np.array_equal(to_tokens(latents)[0].numpy(), derivations.pack(latents[0, 0].numpy()))


def test_the_sequence_lists_targets_first_then_inputs(model, seen):
    targets, inputs = normal(2, 2, CHANNELS, 4, 6, seed=1), normal(2, 3, CHANNELS, 4, 6, seed=2)
    velocity(model, targets, torch.tensor([0.2, 0.9]), inputs, normal(2, 5, TEXT))
    assert torch.equal(seen["hidden_states"], torch.cat([to_tokens(targets), to_tokens(inputs)], dim=1))
    assert seen["img_shapes"] == [[(1, 2, 3)] * 5] * 2
    assert seen["timestep"].tolist() == pytest.approx([0.2, 0.9])


@pytest.mark.parametrize("size", [(4, 4), (6, 10), (2, 8)])
@pytest.mark.parametrize(("targets", "inputs"), [(1, 0), (1, 2), (3, 1)])
def test_positions_are_those_of_stock_qwen_image_edit_plus_to_the_bit(model, seen, targets, inputs, size):
    height, width = size[0] // 2, size[1] // 2
    run(model, targets=targets, inputs=inputs, height=size[0], width=size[1])
    stock = QwenEmbedRope(theta=10000, axes_dim=list(DIT.rope_axes), scale_rope=True)
    # As its pipeline calls it: the generated image first, then one entry for every condition image.
    shapes = [[(1, height, width), *[(1, height, width)] * (targets + inputs - 1)]] * 2
    images, text = stock(shapes, device=torch.device("cpu"), max_txt_seq_len=5)
    assert torch.equal(seen["positions"][0], images)
    assert torch.equal(seen["positions"][1], text)


def test_positions_count_layers_from_the_backmost_target_and_text_starts_at_half_the_longer_side(model, seen):
    run(model, targets=2, inputs=2, height=4, width=6)
    images = derivations.rotations(derivations.image_positions(4, 2, 3), DIT.rope_axes)
    text = derivations.rotations(derivations.text_positions(5, 2, 3), DIT.rope_axes)
    assert seen["positions"][0].numpy() == pytest.approx(images, abs=1e-6)
    assert seen["positions"][1].numpy() == pytest.approx(text, abs=1e-6)


def test_text_shares_layer_positions_with_inputs_when_images_are_small(model, seen):
    """The paper's "text at z ≥ n" holds at its size and not at this one; the stock model's rule is kept."""
    run(model, targets=2, inputs=2, height=4, width=4)
    layer_axis = slice(0, DIT.rope_axes[0] // 2)
    layers = seen["positions"][0].view(4, 4, -1)[:, 0, layer_axis]
    text = seen["positions"][1][:, layer_axis]
    assert torch.equal(text[0], layers[1])
    assert torch.equal(text[1], layers[2])


def test_counting_layers_from_zero_equals_the_papers_negative_targets(model, monkeypatch):
    """Targets −m…−1 and inputs 0…n−1: all layer positions, text among them, are shifted by m; attention cannot tell."""
    stock = run(model, targets=2, inputs=1)
    rope = model.pos_embed

    def shifted(shapes, device=None, max_txt_seq_len=None):
        _, height, width = shapes[0][0]
        frames = rope.rope_params(torch.arange(-2, 20), DIT.rope_axes[0])
        images, text = QwenEmbedRope.forward(rope, shapes, device, max_txt_seq_len)
        axis, start = slice(0, DIT.rope_axes[0] // 2), max(height // 2, width // 2)
        images, text = images.clone(), text.clone()
        images[:, axis] = frames[: len(shapes[0])].repeat_interleave(height * width, 0)
        text[:, axis] = frames[start : start + max_txt_seq_len]
        return images, text

    monkeypatch.setattr(rope, "forward", shifted)
    assert torch.allclose(run(model, targets=2, inputs=1), stock, rtol=1e-4, atol=1e-4)


def test_velocity_is_the_output_at_the_targets_places_alone():
    latents, inputs = normal(2, 2, CHANNELS, 4, 4, seed=1), normal(2, 3, CHANNELS, 4, 4, seed=2)
    assert torch.equal(velocity(Echo(), latents, torch.ones(2), inputs, normal(2, 5, TEXT)), latents)


@pytest.mark.parametrize(("targets", "inputs"), [(1, 0), (1, 1), (3, 2)])
def test_velocity_has_the_shape_of_the_targets_with_any_number_of_inputs(model, targets, inputs):
    assert run(model, targets=targets, inputs=inputs).shape == (2, targets, CHANNELS, 4, 4)


def test_targets_and_inputs_of_different_sizes_stand_in_one_sequence(model, seen):
    targets = [normal(2, CHANNELS, h, w, seed=h * w) for h, w in ((4, 6), (2, 8))]
    inputs = [normal(2, CHANNELS, h, w, seed=h * w + 1) for h, w in ((6, 2), (4, 4), (2, 2))]
    text, times = normal(2, 5, TEXT), torch.tensor([0.2, 0.9])
    found = velocities(model, targets, times, inputs, text)
    assert seen["img_shapes"] == [[(1, 2, 3), (1, 1, 4), (1, 3, 1), (1, 2, 2), (1, 1, 1)]] * 2
    images = [to_tokens(image[:, None]) for image in (*targets, *inputs)]
    assert torch.equal(seen["hidden_states"], torch.cat(images, dim=1))
    assert [value.shape for value in found] == [value.shape for value in targets]
    assert all(
        torch.equal(*pair) for pair in zip(velocities(Echo(), targets, times, inputs, text), targets, strict=True)
    )
    # The smaller target alone, of which a shorter stack is one size.
    alone = velocity(model, targets[1][:, None], times, inputs, text)
    assert torch.equal(alone[:, 0], velocities(model, targets[1:], times, inputs, text)[0])


def test_what_the_axes_do_not_hold_is_refused(model):
    table = model.pos_embed.pos_freqs.shape[0], model.pos_embed.neg_freqs.shape[0]
    assert table == (dit.AXIS, dit.AXIS)
    check_axis([(4, 4)] * dit.AXIS, 100)
    with pytest.raises(ConfigError, match="4097 layers and inputs: the layer axis holds 4096"):
        check_axis([(4, 4)] * (dit.AXIS + 1), 100)
    check_axis([(4, 400)], dit.AXIS - 100)
    with pytest.raises(ConfigError, match="images of 200 patches a side with 3997 text tokens"):
        check_axis([(4, 400)], dit.AXIS - 99)
    with pytest.raises(ConfigError, match="shorter prompt"):
        velocity(model, normal(1, 1, CHANNELS, 2, 2), torch.ones(1), [], normal(1, dit.AXIS + 1, TEXT))


def test_guidance_leads_away_from_the_negative_at_every_tokens_own_length():
    plain, negative = normal(2, 2, CHANNELS, 4, 6, seed=1), normal(2, 2, CHANNELS, 4, 6, seed=2)
    assert torch.allclose(guided(plain, negative, 1.0), plain, atol=1e-6)
    assert torch.allclose(guided(plain, plain, 4.0), plain, atol=1e-6)
    away = guided(plain, negative, 4.0)
    lengths = [to_tokens(value).norm(dim=-1) for value in (away, plain)]
    torch.testing.assert_close(*lengths)
    expected = negative + 4 * (plain - negative)
    direction = [torch.nn.functional.normalize(to_tokens(value), dim=-1) for value in (away, expected)]
    torch.testing.assert_close(*direction)
    assert not guided(torch.zeros_like(plain), torch.zeros_like(plain), 4.0).any()  # a fresh model is still


def test_the_order_of_inputs_and_of_layers_matters(model):
    latents, condition = normal(1, 2, CHANNELS, 4, 4, seed=1), make_condition(1, inputs=2)
    inputs, times = condition.inputs_BNCHW, torch.tensor([0.5])
    plain = velocity(model, latents, times, inputs, condition.text_BTD)
    assert float((velocity(model, latents, times, inputs.flip(1), condition.text_BTD) - plain).abs().max()) > 1e-3
    turned = velocity(model, latents.flip(1), times, inputs, condition.text_BTD).flip(1)
    assert float((turned - plain).abs().max()) > 1e-3


def test_every_condition_reaches_the_velocity(model):
    latents, condition, times = normal(1, 1, CHANNELS, 4, 4), make_condition(1), torch.tensor([0.5])
    plain = velocity(model, latents, times, condition.inputs_BNCHW, condition.text_BTD)
    others = {
        "latents": velocity(model, latents + 0.5, times, condition.inputs_BNCHW, condition.text_BTD),
        "noise level": velocity(model, latents, times * 0.5, condition.inputs_BNCHW, condition.text_BTD),
        "inputs": velocity(model, latents, times, condition.inputs_BNCHW + 0.5, condition.text_BTD),
        "text": velocity(model, latents, times, condition.inputs_BNCHW, condition.text_BTD.flip(2)),
    }
    assert {name for name, other in others.items() if float((other - plain).abs().max()) < 1e-4} == set()


def test_rows_of_a_batch_do_not_see_each_other(model):
    latents, condition, times = normal(3, 2, CHANNELS, 4, 4), make_condition(3), torch.tensor([0.1, 0.5, 0.9])
    together = velocity(model, latents, times, condition.inputs_BNCHW, condition.text_BTD)
    for row in range(3):
        one = slice(row, row + 1)
        alone = velocity(model, latents[one], times[one], condition.inputs_BNCHW[one], condition.text_BTD[one])
        assert torch.allclose(together[one], alone, rtol=1e-4, atol=1e-5)
    changed = latents.clone()
    changed[1] += 1
    other = velocity(model, changed, times, condition.inputs_BNCHW, condition.text_BTD)
    assert torch.equal(other[[0, 2]], together[[0, 2]])
    assert not torch.equal(other[1], together[1])


def test_padded_text_gives_the_velocity_of_the_unpadded_one(model):
    latents, condition, times = normal(2, 1, CHANNELS, 4, 4), make_condition(2, tokens=6), torch.tensor([0.3, 0.6])
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    together = velocity(model, latents, times, condition.inputs_BNCHW, condition.text_BTD, mask)
    short = velocity(model, latents[:1], times[:1], condition.inputs_BNCHW[:1], condition.text_BTD[:1, :4])
    assert torch.allclose(together[:1], short, rtol=1e-4, atol=1e-5)


def test_a_fresh_transformer_is_still_and_follows_from_its_seed():
    once, again, other = (build_dit(DIT, CHANNELS, TEXT, seed) for seed in (3, 3, 4))
    assert not run(once).any()
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(once.parameters(), other.parameters(), strict=True))


def test_building_a_transformer_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_dit(DIT, CHANNELS, TEXT, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("axes", [(4, 4, 2), (3, 5, 4), (4, 4, 6)])
def test_rotary_axes_that_do_not_fill_the_head_with_even_numbers_are_refused(axes):
    with pytest.raises(ValueError, match="must be even and sum to head_dim 12"):
        type(DIT)(layers=1, heads=1, head_dim=12, rope_axes=axes)
