"""Prompt and pictures as the text encoders' states, and those states on disk."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from tiny_base import WIDTH, stock_pipeline, write_base

from common.errors import CheckpointError
from policy.conditions import ConditionCache
from policy.qwen import QwenEncoder

PROMPT = "Cut out a red apple."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def encoder(folder):
    return QwenEncoder(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stock, "CONDITION_IMAGE_SIZE", 64 * 64)


def pixels(width, height, seed=0):
    rgba = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    return rgba


def tensor(rgba):
    return torch.from_numpy(rgba.transpose(2, 0, 1) / np.float32(255))


@pytest.mark.parametrize("sizes", [[], [(60, 60)], [(90, 40), (50, 70)], [(64, 64), (33, 95), (70, 70)]])
def test_states_are_those_that_the_stock_pipeline_encodes(folder, encoder, sizes):
    pictures = [pixels(*size, seed=k) for k, size in enumerate(sizes)]
    pipeline = stock_pipeline(folder)
    shown = []
    for rgba in pictures:  # as the pipeline's call prepares them
        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, rgba.shape[1] / rgba.shape[0])
        shown.append(pipeline.image_processor.resize(Image.fromarray(rgba), height, width))
    expected, _ = pipeline.encode_prompt(PROMPT, image=shown or None)
    found = encoder.encode(PROMPT, [tensor(rgba) for rgba in pictures])
    assert found.shape[1] == WIDTH
    assert torch.equal(found, expected[0])


def test_the_template_names_every_picture_and_loses_its_first_tokens(encoder, monkeypatch):
    asked = []
    processor = encoder._pipeline.processor

    def listening(text, **more):
        asked.append((text, processor(text=text, **more)))
        return asked[-1][1]

    monkeypatch.setattr(encoder._pipeline, "processor", listening)
    states = encoder.encode(PROMPT, [tensor(pixels(64, 64)), tensor(pixels(64, 64, 1))])
    (((text,), tokens),) = asked
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text.endswith(f"user\nPicture 1: {place}Picture 2: {place}{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    assert len(states) == tokens["input_ids"].shape[1] - 64


def test_transparent_parts_are_shown_on_white(encoder):
    clear = pixels(64, 64)
    clear[10:40, 10:40, 3] = 0
    white = clear.copy()
    white[10:40, 10:40] = 255
    assert torch.equal(encoder.encode(PROMPT, [tensor(clear)]), encoder.encode(PROMPT, [tensor(white)]))
    assert not torch.equal(encoder.encode(PROMPT, [tensor(clear)]), encoder.encode(PROMPT, [tensor(pixels(64, 64))]))


@pytest.mark.parametrize("part", ["tokenizer", "processor"])
def test_a_tokenizer_or_processor_that_cannot_be_loaded_is_named(tmp_path, part):
    folder = write_base(tmp_path)
    for path in (folder / part).iterdir():
        path.write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer or processor cannot be loaded"):
        QwenEncoder(folder)


class Counting:
    """Passes on and counts."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def encode(self, prompt, inputs=()):
        self.calls += 1
        return self.encoder.encode(prompt, inputs)


def test_states_are_encoded_once_and_come_back_to_the_bit_in_another_process_life(encoder, tmp_path):
    counting, inputs = Counting(encoder), [tensor(pixels(64, 40))]
    first = ConditionCache(counting, encoder.identity(), tmp_path / "states").encode(PROMPT, inputs)
    again = ConditionCache(counting, encoder.identity(), tmp_path / "states").encode(PROMPT, inputs)
    assert counting.calls == 1
    assert torch.equal(first, again)
    assert torch.equal(first, encoder.encode(PROMPT, inputs))


def test_prompt_pictures_their_order_and_the_encoder_each_make_other_states(encoder, tmp_path):
    counting = Counting(encoder)
    one, two = tensor(pixels(64, 64)), tensor(pixels(64, 64, 1))
    cache = ConditionCache(counting, "a", tmp_path)
    cache.encode("", [one])
    for inputs in ([], [one], [two], [one, two], [two, one]):
        cache.encode(PROMPT, inputs)
    ConditionCache(counting, "b", tmp_path).encode(PROMPT, [one])
    assert counting.calls == 7
    assert len(list(tmp_path.iterdir())) == 7


def test_pictures_are_not_decoded_where_their_states_are_there(encoder, tmp_path):
    cache = ConditionCache(encoder, "a", tmp_path)
    found = cache.lookup(PROMPT, ["digest"], lambda: [tensor(pixels(64, 64))])
    assert torch.equal(cache.lookup(PROMPT, ["digest"], lambda: pytest.fail("decoded")), found)


def test_a_damaged_file_of_the_cache_is_named(encoder, tmp_path):
    cache = ConditionCache(encoder, "a", tmp_path)
    cache.encode(PROMPT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"safetensors: damaged .* remove it"):
        cache.encode(PROMPT)


def test_the_text_only_encoder_has_the_same_face(text_encoder, tmp_path):
    inputs = [tensor(pixels(64, 64))]
    alone = text_encoder.encode(PROMPT)
    assert torch.equal(text_encoder.encode(PROMPT, inputs), alone)
    assert torch.equal(ConditionCache(text_encoder, "MiniLM", tmp_path).encode(PROMPT, inputs), alone)
