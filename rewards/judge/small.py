"""A small judge from scratch: a Qwen2.5-VL of a few million parameters with a tokenizer of its own.

Its words are the pieces of all-MiniLM-L6-v2's vocabulary that the training prompts and ImageNet's class names need,
and they start from MiniLM's vectors, so that a name the training split never had is near to names it had.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from common.config import StrictConfig
from policy.features import class_names
from policy.text import PACKAGE
from rewards.judge.model import Reader

PATCH, MERGE = 16, 2
HEAD_DIM = 32
"""What vLLM's attention on CPUs accepts; it refuses 16."""
MROPE = (4, 6, 6)
"""Shares of half a head for time, height and width."""

END, START_IMAGE, END_IMAGE, IMAGE, VIDEO, ANSWER = (
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|answer|>",
)
SPECIAL = (END, START_IMAGE, END_IMAGE, IMAGE, VIDEO, ANSWER)
UNKNOWN = "[UNK]"

# Several pictures are counted, so that an answer can name one.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set seen = namespace(pictures=0) -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}{%- set seen.pictures = seen.pictures + 1 -%}"
    f"{{{{ seen.pictures }}}}{START_IMAGE}{IMAGE}{END_IMAGE}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{ANSWER}{{%- endif -%}}"
)


class SmallConfig(StrictConfig):
    """Size of a fresh judge."""

    vision_heads: int = Field(5, ge=1, le=24)
    """Attention heads of the vision tower; each is 32 wide."""
    vision_layers: int = Field(4, ge=1)
    """Blocks of the vision tower; all attend to the whole picture."""
    heads: int = Field(5, ge=1)
    """Attention heads of the language model; each is 32 wide."""
    layers: int = Field(3, ge=1)
    """Layers of the language model."""
    expansion: int = Field(3, ge=1)
    """Width of the gated MLPs over the width of their stream."""


def build_tokenizer(texts: Sequence[str], labels: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-case word-piece tokenizer for ``texts``, ImageNet's class names and ``labels``."""
    known = AutoTokenizer.from_pretrained(_minilm(), local_files_only=True)
    used = {piece for text in (*texts, *class_names(), *labels) for piece in known.tokenize(text)}
    used |= {piece for piece in known.get_vocab() if len(piece.removeprefix("##")) == 1 and piece.isascii()}
    words = [UNKNOWN, *sorted(used - {UNKNOWN})]
    tokenizer = Tokenizer(models.WordPiece({word: k for k, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=END,
        eos_token=END,
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model(config: SmallConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """A fresh model; word embeddings start from MiniLM's, turned to the model's width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # slow to import, and rarely needed

    width, vision = config.heads * HEAD_DIM, config.vision_heads * HEAD_DIM
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    settings = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": width * config.expansion,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(MROPE)},
            "bos_token_id": ids[END],
            "eos_token_id": ids[END],
            "pad_token_id": ids[END],
            "tie_word_embeddings": True,
            "initializer_range": 0.04,
        },
        vision_config={
            "depth": config.vision_layers,
            "hidden_size": vision,
            "intermediate_size": vision * config.expansion,
            "num_heads": config.vision_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": PATCH * MERGE * 4,
            "out_hidden_size": width,
            "fullatt_block_indexes": list(range(config.vision_layers)),
            "initializer_range": 0.04,
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START_IMAGE],
        vision_end_token_id=ids[END_IMAGE],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(settings)
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight
            known = _word_vectors(tokenizer, width)
            embedding[known[0]] = known[1] * 0.1  # first answers are then nearly undecided: logits spread by about 1
    return model


def whiten_patches(model: Any, patches_NP: torch.Tensor) -> None:
    """Starts the patch embedding as a whitening of real patches: their strongest axes, each with the same variance.

    Patches of woven views vary a thousand times more in brightness than in how the views differ, which is what a judge
    has to see; from a random start it takes many times longer to find that.

    Args:
        patches_NP: what the picture settings make of pictures, both time steps of a patch equal.
    """
    weight = model.model.visual.patch_embed.proj.weight  # (width, 3, 2, PATCH, PATCH)
    once = patches_NP.double().unflatten(1, (3, 2, -1))[:, :, 0].flatten(1)
    centred = once - once.mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    variances, axes = variances.flip(0)[: len(weight)], _signed(axes.flip(1)[:, : len(weight)].T).T
    filters = (axes / (variances + variances[-1]).sqrt()).T / 4  # spread of 1/2 over the two equal time steps
    with torch.no_grad():
        weight.copy_(filters.reshape(len(weight), 3, 1, PATCH, PATCH).float().expand_as(weight))


def _signed(axes_KN: torch.Tensor) -> torch.Tensor:
    """Axes that point to where their largest component is positive: the library's choice of sign differs from run to
    run."""
    largest_K1 = axes_KN.gather(1, axes_KN.abs().argmax(dim=1, keepdim=True))
    return axes_KN * largest_K1.sign()


PICTURES = {
    "processor_class": "Qwen2_5_VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    # A woven picture must arrive pixel by pixel: sides that are multiples of a merged patch are never scaled.
    "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 1024 * 1024},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
"""How pictures become patches, as the architecture's processor reads it."""


def small_reader(tokenizer: PreTrainedTokenizerFast) -> Reader:
    """Reads questions for a small judge that is not saved yet."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Reader(tokenizer, Qwen2VLImageProcessorPil(**PICTURES))


def save_processing(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer and the picture settings beside a model."""
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES, indent=1) + "\n")
    # The architecture's processor wants to know how videos are read, although a judge sees none.
    video = {key: value for key, value in PICTURES.items() if key != "image_processor_type"}
    video |= {"video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=1) + "\n")


def _minilm() -> Path:
    return Path(str(files(PACKAGE) / "model"))


def _word_vectors(tokenizer: PreTrainedTokenizerFast, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the words that MiniLM has, and their vectors on its ``width`` strongest axes, scaled to variance 1."""
    known = AutoTokenizer.from_pretrained(_minilm(), local_files_only=True).get_vocab()
    model = AutoModel.from_pretrained(_minilm(), local_files_only=True)
    # Single characters, labels among them, start fresh: MiniLM's digits are nearly the same to each other.
    ours = {word: k for word, k in tokenizer.get_vocab().items() if word in known and len(word) > 1 and word != UNKNOWN}
    vectors = model.get_input_embeddings().weight.detach()[[known[word] for word in ours]]
    centred = vectors - vectors.mean(dim=0)
    axes = _signed(torch.linalg.svd(centred, full_matrices=False).Vh[:width])
    turned = torch.zeros(len(ours), width)
    turned[:, : len(axes)] = centred @ axes.T
    return torch.tensor(list(ours.values())), turned / turned.std()
