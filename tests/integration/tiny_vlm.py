"""A Qwen2.5-VL of a hundred thousand random weights, whose tokens are characters, in the folder that vLLM serves."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIAL = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|answer|>")
HEAD_DIM, PATCH, MERGE = 32, 16, 2
TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- else -%}<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}<|answer|>"
)
PICTURES = {
    "processor_class": "Qwen2_5_VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 256 * 256},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def save_tiny_vlm(folder: Path) -> Path:
    """Writes model, tokenizer and picture settings."""
    tokenizer = characters()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    width = 2 * HEAD_DIM
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # so that answers differ by more than rounding
    }
    vision = {
        "depth": 2,
        "hidden_size": width,
        "intermediate_size": width,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": PATCH * MERGE * 4,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0, 1],
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    video: dict[str, Any] = {key: value for key, value in PICTURES.items() if key != "image_processor_type"}
    video["video_processor_type"] = "Qwen2VLVideoProcessor"
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are printable ASCII characters."""
    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def answer_here(folder: Path, text: str, picture: Image.Image, labels: tuple[str, ...]) -> dict[str, float]:
    """Probability of each label as transformers computes it."""
    model, tokenizer, pictures = _loaded(folder)
    seen = pictures([picture], return_tensors="pt")
    count = int(seen["image_grid_thw"].prod()) // MERGE**2
    prompt = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{text}<|answer|>"
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **seen).logits[0, -1]
    chosen = logits[[tokenizer.convert_tokens_to_ids(label) for label in labels]]
    return dict(zip(labels, chosen.double().softmax(0).tolist(), strict=True))
