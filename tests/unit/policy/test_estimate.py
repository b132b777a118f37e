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


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_the_count_is_within_a_tenth_of_the_tensors_of_a_real_step(lora):
    model = live_dit(text_dim=384)
    if lora:
        add_lora(model, lora, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    latents, text = normal(2, 3, 4, 16, 16), normal(2, 8, 384)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = velocity(model, latents[:, :1], torch.ones(2), latents[:, 1:], text).square().sum()
    activations = sum(size for size, _ in kept.values())
    loss.backward()
    for p in trained:  # DeepSpeed holds one for every trained weight; the last block's text feeds nothing
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimiser = torch.optim.AdamW(trained)
    optimiser.step()
    moments = [v for state in optimiser.state.values() for k, v in state.items() if k != "step"]
    held = (list(model.parameters()), [p.grad for p in trained], moments, [latents, text])
    sizes = [sum(t.numel() * t.element_size() for t in tensors) for tensors in held]
    found = footprint(dict(model.config), lora, 2, 3, 16, 8)
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
