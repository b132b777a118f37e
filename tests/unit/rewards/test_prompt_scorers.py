"""What the scorers of prompts see, and with which part of the prompt they compare it."""

import pytest
import torch
from skimage import data

from common.errors import ConfigError, RewardError
from data.rgba import blend
from policy.clip import load_clip
from policy.features import class_names, load_efficientnet, resized
from policy.text import TextEncoder
from rewards.base import build, run_scorer
from rewards.prompt import ClipSimilarity, PromptFidelity

REFERRING = {"task": "referring_matting", "roles": ("foreground",)}


@pytest.fixture(scope="module")
def cat_layers() -> torch.Tensor:
    """(2, 1, 4, 112, 112): a photo of a cat, opaque, and a grey square."""
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    cat = resized(image[..., 60:360], 112, 112)[0]
    layers = torch.ones(2, 1, 4, 112, 112)
    layers[0, 0, :3], layers[1, 0, :3] = cat, 0.5
    return layers


def test_a_cat_is_nearer_to_a_cat_than_to_a_car_and_than_a_grey_square_is(make_batch, cat_layers):
    scores = {
        name: PromptFidelity().score(
            make_batch(**REFERRING, layers_GLCHW=cat_layers, targets_LCHW=None, prompt=f"Cut out {name}.")
        )
        for name in ("a cat", "a car")
    }
    assert scores["a cat"][0] > scores["a car"][0] + 0.1
    assert scores["a cat"][0] > scores["a cat"][1] + 0.1


def test_the_score_is_the_probability_weighted_cosine_of_the_ten_likeliest_names(make_batch, cat_layers):
    batch = make_batch(**REFERRING, layers_GLCHW=cat_layers, targets_LCHW=None, prompt="Cut out a striped cat.")
    encoder, found = TextEncoder(), PromptFidelity(words=False).score(batch)

    def vector(text: str) -> torch.Tensor:
        states = encoder.encode(text).double().mean(dim=0)
        return states / states.norm()

    for member in range(2):
        shown = torch.stack([blend(cat_layers[member, 0], tone) for tone in (0.0, 1.0)])
        mean_K = load_efficientnet()(resized(shown, 224, 224)).probabilities_NK.double().mean(dim=0)
        best = mean_K.argsort(descending=True)[:10].tolist()
        weights = [float(mean_K[k]) for k in best]
        nearness = [float(vector(class_names()[k]) @ vector("a striped cat")) for k in best]
        expected = sum(w * n for w, n in zip(weights, nearness, strict=True)) / sum(weights)
        assert found[member].item() == pytest.approx(expected, abs=1e-5)


def test_clip_compares_the_foreground_on_black_and_white_with_the_named_object(make_batch, tiny_clip):
    batch = make_batch(members=3, **REFERRING, targets_LCHW=None, prompt="Extract fish with its transparency.")
    shown = torch.stack([blend(batch.layers_GLCHW[:, 0], tone) for tone in (0.0, 1.0)], dim=1)
    expected = load_clip(tiny_clip).similarity(shown.flatten(0, 1), "fish").reshape(3, 2).mean(dim=1)
    torch.testing.assert_close(ClipSimilarity(tiny_clip).score(batch), expected)
    assert len(set(expected.tolist())) == 3
    assert build("clip", {"folder": str(tiny_clip)}).describes == f"CLIP, {tiny_clip.name}"


def test_the_background_of_a_decomposition_is_not_looked_at(make_batch, tiny_clip):
    batch = make_batch(prompt="a fish")
    changed = batch.layers_GLCHW.clone()
    changed[:, 0] = 0.3
    scores = [ClipSimilarity(tiny_clip).score(b) for b in (batch, make_batch(prompt="a fish", layers_GLCHW=changed))]
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", ["prompt_fidelity", "clip"])
def test_a_prompt_that_names_no_object_has_no_score_and_says_why(make_batch, tiny_clip, name):
    scorer = build(name, {"folder": str(tiny_clip)} if name == "clip" else {})
    batch = make_batch(
        task="automatic_matting", roles=("foreground",), prompt="Matte this image and keep the foreground."
    )
    with pytest.raises(RewardError, match="needs a prompt that names an object"):
        scorer.score(batch)
    assert "tasks" in run_scorer(name, scorer, batch).reasons[0]
    assert "needs prompt" in run_scorer(name, scorer, make_batch(prompt="")).reasons[0]


@pytest.mark.parametrize("name", ["prompt_fidelity", "clip"])
def test_fully_transparent_layers_have_a_score(make_batch, tiny_clip, name):
    scorer = build(name, {"folder": str(tiny_clip)} if name == "clip" else {})
    layers = torch.zeros(2, 1, 4, 24, 20)
    batch = make_batch(**REFERRING, layers_GLCHW=layers, targets_LCHW=None, prompt="Cut out a cat.")
    assert run_scorer(name, scorer, batch).reasons == (None, None)


def test_a_clip_folder_must_be_given_and_exist():
    with pytest.raises(ConfigError, match="missing a required argument: 'folder'"):
        build("clip")
    with pytest.raises(ConfigError, match=r"no config\.json here"):
        build("clip", {"folder": "/nowhere"})
