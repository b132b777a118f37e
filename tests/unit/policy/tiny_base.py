"""A base folder with every component of Qwen-Image-Edit-2509 as its real class, small and random."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from policy.qwen import StillProcessor
from policy.vae import opaque
from tests.unit.policy.tiny_models import live_dit, qwen_vae

WIDTH = 32
LATENTS = 6
"""Not 4: the stock pipeline takes a picture with as many channels as latents have for latents."""
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SCHEDULER = {  # the real base's
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
PARTS = {
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Every byte is a token, beside Qwen's special ones."""
    letters = list(bytes_to_unicode().values())
    tokenizer = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def tiny_text_encoder(tokenizer: Qwen2Tokenizer, width: int = WIDTH) -> Qwen2_5_VLForConditionalGeneration:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": width,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # far from the tiny initialisation at which inputs hardly matter
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_base(folder: Path, rgba: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the folder as ``save_pretrained`` of the stock pipeline would, with an RGBA or an RGB VAE."""
    tokenizer = tiny_tokenizer()
    vae = qwen_vae(latents=LATENTS)
    (opaque(vae) if rgba else vae).to(dtype).save_pretrained(folder / "vae")
    live_dit(text_dim=WIDTH, channels=LATENTS).to(dtype).save_pretrained(folder / "transformer")
    tiny_text_encoder(tokenizer).to(dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "processor")
    Qwen2VLImageProcessor().save_pretrained(folder / "processor")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPlusPipeline", **PARTS}))
    return folder


def stock_pipeline(folder: Path) -> QwenImageEditPlusPipeline:
    """diffusers' pipeline on the folder. Its processor is put together, as the stock one's needs torchvision."""
    words = AutoTokenizer.from_pretrained(folder / "processor")
    pipeline = QwenImageEditPlusPipeline.from_pretrained(
        folder, processor=StillProcessor(Qwen2VLImageProcessor.from_pretrained(folder / "processor"), words)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
