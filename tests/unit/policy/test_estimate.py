"""The plan's numbers against tensors that are really there."""

import pytest
import torch
from tiny_models import live_dit, normal

from policy.adapters import LoraConfig, add_lora
from policy.dit import velocity
from policy.estimate import footprint

REAL = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": [16, 56, 56],
}


def kept_bytes(model, forward):
    """Result of a forward pass and, by address, what is kept for its backward pass besides the model's weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, kept


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_the_count_is_within_a_tenth_of_the_tensors_of_a_real_step(lora, recomputed):
    model = live_dit(text_dim=384)
    if lora:
        add_lora(model, lora, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    if recomputed:
        model.enable_gradient_checkpointing()
    latents, text, seen = normal(2, 3, 4, 16, 16), normal(2, 8, 384), []
    last = model.transformer_blocks[-1]
    hook = last.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    output, kept = kept_bytes(model, lambda: velocity(model, latents[:, :1], torch.ones(2), latents[:, 1:], text))
    hook.remove()
    if recomputed:  # one block at a time is computed again, and keeps what it would have kept
        args, kwargs = seen[0]
        kept |= kept_bytes(model, lambda: last(*args, **kwargs))[1]
    activations = sum(size for size, _ in kept.values())
    output.square().sum().backward()
    for p in trained:  # DeepSpeed holds one for every trained weight; the last block's text feeds nothing
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    moments = [v for state in optimiser.state.values() for k, v in state.items() if k != "step"]
    held = (list(model.parameters()), [p.grad for p in trained], moments, [latents, text])
    sizes = [sum(t.numel() * t.element_size() for t in tensors) for tensors in held]
    found = footprint(dict(model.config), lora, 2, 3, 16, 8, recomputed=recomputed)
    assert found.base_bytes + found.trained_bytes == sizes[0]
    assert found.trained_bytes == sizes[1]
    assert found.optimiser_bytes == sizes[2]
    assert found.activation_bytes == pytest.approx(activations, rel=0.1)
    assert found.per_rank(0, 1) == pytest.approx(sum(sizes) + activations, rel=0.1)
    assert found.per_rank(3, 2) < found.per_rank(2, 2) < found.per_rank(1, 2) < found.per_rank(0, 2)


def test_the_real_width_is_counted_without_allocating_it():
    found = footprint(REAL, LoraConfig(rank=256), 1, 3, 72, 512, torch.bfloat16)
    assert found.base_bytes / 2 == pytest.approx(20.43e9, rel=0.005)
    assert found.trained == pytest.approx(1.70e9, rel=0.02)  # attention and MLP of both streams


def test_recomputation_trades_most_activations_for_a_forward_pass():
    settings = dict(live_dit().config) | {"num_layers": 12}
    kept, again = (footprint(settings, LoraConfig(rank=4), 1, 3, 16, 8, recomputed=flag) for flag in (False, True))
    assert again.activation_bytes < kept.activation_bytes / 4
    assert (kept.step_flops(5), again.step_flops(5)) == (10 * kept.forward_flops, 15 * kept.forward_flops)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_recomputed_activations_give_the_same_gradients(lora):
    gradients = []
    for recomputed in (False, True):
        model = live_dit()
        if lora:
            add_lora(model, lora, 0)
        latents, text = normal(2, 3, 4, 8, 8), normal(2, 8, 16)
        if recomputed:
            model.enable_gradient_checkpointing()
        velocity(model, latents[:, :1], torch.ones(2), latents[:, 1:], text).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    kept, again = gradients
    assert kept.keys() == again.keys()
    assert any(gradient.any() for gradient in kept.values())
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()), msg=name)
