"""What can be wrong with a base folder: one message each, before any weights are read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_base import write_base
from tiny_models import live_dit, measured_vae

from common.errors import CheckpointError
from policy.adapters import LoraConfig, add_lora, save_adapter, trained
from policy.base import check_base, is_base, load_base
from policy.folder import save_policy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "base")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_base(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_folder_is_a_base_and_a_stages_policy_is_none(folder, tmp_path):
    assert is_base(folder)
    check_base(folder)
    save_policy(tmp_path / "ours", measured_vae(), live_dit())
    assert not is_base(tmp_path / "ours")
    assert not is_base(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["scheduler", "vae", "transformer", "text_encoder", "tokenizer", "processor"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    assert f"{folder}: no {part} in it" in message(folder)


def test_a_missing_index_is_named(folder):
    (folder / "model_index.json").unlink()
    assert is_base(folder)
    assert "model_index.json: no such file" in message(folder)


@pytest.mark.parametrize("part", ["vae", "transformer", "text_encoder"])
def test_a_part_without_its_settings_or_with_damaged_ones_is_named(folder, part):
    path = folder / part / "config.json"
    path.write_text("{")
    assert f"{path}: cannot be read" in message(folder)
    path.unlink()
    assert f"{path}: no such file" in message(folder)


def test_another_pipeline_is_named_with_the_one_that_is_wanted(folder):
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    assert "a FluxPipeline; give a folder of a QwenImageEditPlusPipeline" in message(folder)


@pytest.mark.parametrize(
    ("part", "changes", "found"),
    [
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "of class FluxTransformer2DModel"),
        ("vae", {"_class_name": "AutoencoderKL"}, "of class AutoencoderKL"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "of class T5EncoderModel"),
        ("text_encoder", {"architectures": None}, "of class ?"),
        ("transformer", {"zero_cond_t": True}, "zero_cond_t is set, as in another model of the family"),
        ("transformer", {"in_channels": 64}, "transformer in_channels is 64, vae z_dim x 4 is 24"),
        ("transformer", {"joint_attention_dim": 3584}, "transformer joint_attention_dim is 3584, text width is 32"),
    ],
)
def test_parts_of_another_architecture_are_named(folder, part, changes, found):
    edit(folder / part / "config.json", **changes)
    assert found in message(folder)
    assert str(folder) in message(folder)


def test_an_rgb_vae_is_refused_with_the_way_to_an_rgba_one(tmp_path):
    folder = write_base(tmp_path / "rgb", rgba=False)
    assert "an RGB VAE (3 channels), layers need RGBA; convert it with `omnialpha vae-convert" in message(folder)


@pytest.mark.parametrize(
    ("part", "name", "pickle"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_pickle_where_safetensors_belong_is_never_read(folder, part, name, pickle, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / part / name).unlink()
    torch.save(Bomb(), folder / part / pickle)
    found = message(folder)
    assert f"{folder / part}: holds pickled weights ({pickle})" in found
    assert "safetensors form" in found
    assert not (tmp_path / "ran").exists()
    (folder / part / pickle).unlink()
    assert f"{folder / part}: no {name} here" in message(folder)


def shard(place):
    """Splits a model's weights into two files with an index, as large models are stored."""
    weights = load_file(place / "diffusion_pytorch_model.safetensors")
    (place / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, place / file)
    index = {"metadata": {}, "weight_map": where}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(set(where.values()))


def test_sharded_weights_load_alike_and_a_missing_shard_is_named(folder):
    before = load_base(folder, torch.device("cpu")).transformer.state_dict()
    files = shard(folder / "transformer")
    after = load_base(folder, torch.device("cpu")).transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (folder / "transformer" / files[1]).unlink()
    assert f"1 of 2 weight files are missing, among them {files[1]}" in message(folder)


def test_weights_that_are_missing_or_damaged_are_named_when_they_are_loaded(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("proj_out.bias")
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=r"transformer: 1 weights are missing, among them proj_out\.bias"):
        load_base(folder, torch.device("cpu"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_base(folder, torch.device("cpu"))


def test_an_adapter_beside_the_base_takes_part(folder):
    model = load_base(folder, torch.device("cpu")).transformer
    lora = LoraConfig(rank=2)
    add_lora(model, lora, seed=1)
    weights = {name: value + 1 for name, value in trained(model.state_dict(), lora=True).items()}
    save_adapter(folder, weights, lora)
    loaded = trained(load_base(folder, torch.device("cpu")).transformer.state_dict(), lora=True)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
