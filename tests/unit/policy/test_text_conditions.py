import pytest
import torch

from policy.text import MAX_TOKENS, TEXT_DIM

SHORT, LONG = "Cut out the cat.", "Remove the marked object and keep the background as it is."


def test_prompts_of_equal_length_need_no_mask(text_encoder):
    text, mask = text_encoder.encode_batch(["Cut out the cat.", "Cut out the dog."])
    assert mask is None
    assert text.shape[0] == 2
    assert text.shape[2] == TEXT_DIM
    assert text_encoder.encode_batch([LONG])[1] is None


def test_the_mask_marks_the_real_tokens_of_each_prompt(text_encoder):
    prompts = [SHORT, LONG, ""]
    text, mask = text_encoder.encode_batch(prompts)
    lengths = [len(text_encoder.encode(prompt)) for prompt in prompts]
    assert mask.dtype == torch.bool
    assert mask.shape == text.shape[:2] == (3, max(lengths))
    assert mask.sum(1).tolist() == lengths
    assert all(bool(mask[row, :length].all()) for row, length in enumerate(lengths))


def test_a_padded_batch_holds_the_single_encodings_to_the_bit(text_encoder):
    prompts = [SHORT, LONG, ""]
    text, mask = text_encoder.encode_batch(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.equal(text[row][mask[row]], text_encoder.encode(prompt))
        assert not text[row][~mask[row]].any()


def test_single_encodings_equal_the_models_own_padded_batch(text_encoder):
    tokens = text_encoder._tokenizer([SHORT, LONG], return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = text_encoder._model(**tokens).last_hidden_state
    for row, prompt in enumerate([SHORT, LONG]):
        mine = text_encoder.encode(prompt)
        assert torch.allclose(theirs[row, : len(mine)], mine, atol=1e-5)
        assert int(tokens["attention_mask"][row].sum()) == len(mine)


def test_the_empty_prompt_is_two_special_tokens_and_a_long_one_is_cut(text_encoder):
    assert text_encoder.encode("").shape == (2, TEXT_DIM)
    assert text_encoder.encode("one word after the other " * 50).shape == (MAX_TOKENS, TEXT_DIM)


@pytest.mark.parametrize("prompt", [SHORT, ""])
def test_encoding_is_repeatable_finite_and_without_gradient(text_encoder, prompt):
    once, again = text_encoder.encode(prompt), text_encoder._encode(prompt)
    assert torch.equal(once, again)
    assert once.dtype == torch.float32
    assert bool(once.isfinite().all())
    assert not once.requires_grad


def test_different_prompts_differ(text_encoder):
    assert not torch.equal(text_encoder.encode("Cut out the cat."), text_encoder.encode("Cut out the dog."))


def test_a_prompt_is_encoded_alike_whatever_precision_its_caller_trains_in(text_encoder):
    with torch.autocast("cpu", torch.bfloat16):
        inside = text_encoder._encode(LONG)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, text_encoder._encode(LONG))
