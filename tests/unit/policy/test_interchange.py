"""LoRA between here and stock diffusers, and OmniAlpha's released layout."""

import json
import shutil

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_base import LATENTS, WIDTH, stock_pipeline, write_base
from tiny_models import live_dit, normal, qwen_vae

from common.errors import CheckpointError
from pipeline.cli import main
from policy.adapters import LoraConfig, add_lora, trained
from policy.dit import velocity
from policy.folder import load_transformer
from policy.interchange import FILE, activate, load_lora, merged, read_lora, save_lora
from policy.objectives import flow_matching_pair
from policy.vae import opaque

NEAR = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def fresh() -> QwenImageTransformer2DModel:
    return live_dit(text_dim=WIDTH, channels=LATENTS)


@torch.no_grad()
def output(model):
    latents, inputs = normal(2, 2, LATENTS, 4, 4, seed=3), normal(2, 1, LATENTS, 4, 4, seed=4)
    return velocity(model, latents, torch.tensor([0.9, 0.3]), inputs, normal(2, 5, WIDTH, seed=5))


def trained_three_steps(seed=0):
    """A transformer whose adapter took three optimiser steps on the objective of SFT."""
    model = fresh()
    add_lora(model, LoraConfig(rank=4, alpha=6), seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(3):
        times = torch.tensor([0.2, 0.7])
        noisy, target = flow_matching_pair(
            normal(2, 1, LATENTS, 4, 4, seed=10 * seed + step), normal(2, 1, LATENTS, 4, 4, seed=50 + step), times
        )
        inputs, text = normal(2, 1, LATENTS, 4, 4, seed=60 + step), normal(2, 5, WIDTH, seed=70 + step)
        optimiser.zero_grad()
        (velocity(model, noisy, times, inputs, text) - target).square().mean().backward()
        optimiser.step()
    return model


def apart(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_a_lora_trained_here_gives_the_same_velocity_in_the_stock_pipeline(tmp_path, base):
    model = trained_three_steps()
    save_lora(tmp_path, model)
    stock = stock_pipeline(base)
    assert apart(output(stock.transformer), output(model)) > 1e-2  # the adapter matters
    stock.load_lora_weights(tmp_path)
    assert apart(output(stock.transformer), output(model)) <= NEAR


def test_a_lora_that_stock_diffusers_saved_gives_the_same_velocity_here(tmp_path, base):
    stock = stock_pipeline(base)
    save_lora(tmp_path / "ours", trained_three_steps())
    stock.load_lora_weights(tmp_path / "ours")
    from peft.utils import get_peft_model_state_dict

    stock.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(stock.transformer, adapter_name="default_0"),
        transformer_lora_adapter_metadata=stock.transformer.peft_config["default_0"].to_dict(),
    )
    model = fresh()
    load_lora(model, read_lora(tmp_path / "theirs"))
    assert apart(output(model), output(stock.transformer)) <= NEAR


def test_merged_weights_give_the_velocity_of_the_adapters_beside_them_and_come_apart_again():
    model = trained_three_steps()
    beside = output(model)
    with merged(model):
        assert all(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))
        assert apart(output(model), beside) <= NEAR
    assert apart(output(model), beside) <= NEAR
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


def test_several_adapters_act_alone_together_or_scaled_as_in_stock_diffusers(tmp_path, base):
    model, stock = fresh(), stock_pipeline(base)
    for seed, name in ((1, "first"), (2, "second")):
        file = save_lora(tmp_path / name, trained_three_steps(seed=seed))
        load_lora(model, read_lora(file), name)
        stock.load_lora_weights(tmp_path / name, adapter_name=name)
    outputs = []
    for strengths in ({"first": 1.0}, {"second": 1.0}, {"first": 0.5, "second": 1.5}):
        activate(model, strengths)
        stock.set_adapters(list(strengths), list(strengths.values()))
        outputs.append(output(model))
        assert apart(outputs[-1], output(stock.transformer)) <= NEAR
        with merged(model):
            assert apart(output(model), outputs[-1]) <= NEAR
    assert min(apart(a, b) for a, b in (outputs[:2], outputs[1:])) > 1e-2


def release(folder, channels=4):
    """What OmniAlpha's authors publish: an RGBA VAE and a LoRA."""
    vae = qwen_vae(latents=LATENTS)
    (opaque(vae) if channels == 4 else vae).save_pretrained(folder / "rgba_vae")
    model = trained_three_steps()
    save_lora(folder / "lora", model)
    return model


def test_the_released_layout_becomes_a_policy_folder_that_computes_the_same(tmp_path, base):
    model = release(tmp_path / "release")
    out = tmp_path / "policy"
    assert main(["adopt", str(base), str(tmp_path / "release"), str(out)]) == 0
    assert apart(output(load_transformer(out)), output(model)) <= NEAR
    held, released = out / "vae", tmp_path / "release" / "rgba_vae"
    weights = "diffusion_pytorch_model.safetensors"
    assert (held / weights).read_bytes() == (released / weights).read_bytes()
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "QwenImageEditPlusPipeline"


FIRST = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"


NAMES = {"first": FIRST, "strange": "unet.x.lora_A.weight", "alpha": FIRST.replace("lora_A.weight", "alpha")}


def change(**updates):
    def damage(file):
        state = load_file(file)
        for name, value in updates.items():
            name = NAMES[name]
            state = {k: v for k, v in state.items() if k != name} if value is None else state | {name: value(state)}
        save_file(state, file)

    return damage


def wider(file):
    save_file({k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in load_file(file).items()}, file)


def other_layers(file):
    save_file({k.replace("img_mlp", "ff"): v for k, v in load_file(file).items()}, file)


SPOILS = {
    "not there": (lambda file: file.unlink(), "cannot be read"),
    "damaged": (lambda file: file.write_bytes(file.read_bytes()[:99]), "cannot be read"),
    "half a pair": (change(first=None), "is there without"),
    "mixed ranks": (change(first=lambda s: s[FIRST][:2].clone()), r"layers of ranks \[2, 4\]"),
    "another layout": (change(strange=lambda s: s[FIRST].clone()), "'unet.x.lora_A.weight' is not"),
    "kohya's alpha": (change(alpha=lambda s: torch.tensor(4.0)), "alpha' is not"),
    "another width": (wider, r"lora_A is \(4, 48\).* ask for \(4, 24\).*another width"),
    "layers of another model": (other_layers, "has no linear layer 'transformer_blocks.0.ff.net.0.proj'"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILS.values(), ids=SPOILS)
def test_a_lora_that_does_not_fit_is_one_message_and_leaves_the_model_alone(tmp_path, spoil, words):
    file = save_lora(tmp_path, trained_three_steps())
    spoil(file)
    model = fresh()
    before = output(model)
    with pytest.raises(CheckpointError, match=words) as refused:
        load_lora(model, read_lora(tmp_path))
    assert FILE in str(refused.value)
    assert torch.equal(output(model), before)
    assert not trained(model.state_dict(), lora=True)


def test_a_pickled_lora_is_not_opened(tmp_path):
    torch.save({FIRST: torch.zeros(2, 24)}, tmp_path / "lora.bin")
    with pytest.raises(CheckpointError, match=r"lora.bin: not a \.safetensors"):
        read_lora(tmp_path / "lora.bin")


def test_an_rgb_vae_in_a_release_and_a_missing_lora_are_named(tmp_path, base, capsys):
    release(tmp_path / "rgb", channels=3)
    assert main(["adopt", str(base), str(tmp_path / "rgb"), str(tmp_path / "out")]) == 1
    assert "rgba_vae: has 3 image channels, layers need 4" in capsys.readouterr().err
    release(tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "lora")
    assert main(["adopt", str(base), str(tmp_path / "bare"), str(tmp_path / "out")]) == 1
    assert FILE in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
