"""A real CLIP model class with random weights, saved and loaded as a person's folder would be."""

import json
import shutil
import string

import pytest
import torch
from transformers import CLIPModel

from common.errors import ConfigError
from policy.clip import load_clip


def test_similarity_is_the_cosine_of_the_models_embeddings(tiny_clip):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = load_clip(tiny_clip).similarity(images, "cat")
    model = CLIPModel.from_pretrained(tiny_clip)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    letters = {letter: k + 2 for k, letter in enumerate(string.ascii_lowercase)}
    ids = torch.tensor([[0, letters["c"], letters["a"], letters["t"] + 26, 1]])
    with torch.no_grad():
        theirs = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=(images - mean[:, None, None]) / std[:, None, None],
        )
    a, b = theirs.image_embeds.double().numpy(), theirs.text_embeds.double().numpy()[0]
    expected = (a @ b) / ((a**2).sum(axis=1) * (b**2).sum()) ** 0.5
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(set(found.tolist())) == 3


def test_other_sizes_are_scaled_and_the_middle_is_taken(tiny_clip):
    clip, wide = load_clip(tiny_clip), torch.rand(1, 3, 32, 96, generator=torch.Generator().manual_seed(1))
    changed = wide.clone()
    changed[..., :20] = 0
    assert torch.equal(clip.similarity(wide, "cat"), clip.similarity(changed, "cat"))
    assert torch.isfinite(clip.similarity(torch.rand(1, 3, 7, 5), "cat")).all()


def test_the_colour_statistics_of_the_folder_are_used(tiny_clip, tmp_path):
    other = shutil.copytree(tiny_clip, tmp_path / "clip")
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert not torch.allclose(load_clip(tiny_clip).similarity(image, "cat"), load_clip(other).similarity(image, "cat"))


def test_a_long_text_is_cut(tiny_clip):
    image = torch.rand(1, 3, 32, 32)
    assert torch.isfinite(load_clip(tiny_clip).similarity(image, "a very long text " * 20)).all()


def test_a_folder_without_a_model_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json here; give a folder with a saved CLIP model"):
        load_clip(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ConfigError, match="cannot be loaded as a CLIP model"):
        load_clip(tmp_path)
