"""Qwen2.5-VL as the condition encoder of a real base."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor

from common.commit import file_checksum
from common.errors import CheckpointError
from data.rgba import blend, to_uint8_hwc
from policy.base import TEXT_WEIGHTS
from policy.foreign import load_model, weight_files


class StillProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its video part, which needs torchvision."""

    def __init__(self, image_processor, tokenizer) -> None:
        super().__init__(image_processor, tokenizer)


class QwenEncoder:
    """Qwen2.5-VL of a base folder, led by the Edit-Plus pipeline's own code: its template with ``Picture i:`` for
    every input, its sizes, the last hidden states without the template's first tokens."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """
        Raises:
            CheckpointError: ``text_encoder``, ``tokenizer`` or ``processor`` cannot be loaded.
        """
        self._folder, self._device = folder, torch.device(device)
        model = load_model(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder", TEXT_WEIGHTS)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            pixels = Qwen2VLImageProcessor.from_pretrained(folder / "processor", local_files_only=True)
            words = AutoTokenizer.from_pretrained(folder / "processor", local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: tokenizer or processor cannot be loaded ({str(error).splitlines()[0]}); fetch them again"
            ) from None
        self._pipeline = QwenImageEditPlusPipeline(
            scheduler=None,
            vae=None,
            text_encoder=model.requires_grad_(False).to(self._device),
            tokenizer=tokenizer,
            processor=StillProcessor(pixels, words),
            transformer=None,
        )

    @torch.no_grad()
    def encode(self, prompt: str, inputs: Sequence[Tensor] = ()) -> Tensor:
        """States (T, D) in the encoder's dtype; transparent parts of the pictures are shown on white."""
        images = [self._shown(image) for image in inputs]
        states, _ = self._pipeline.encode_prompt(prompt, image=images or None, device=self._device)
        return states[0]

    def to(self, device: torch.device) -> None:
        """Moves the weights; states are computed there from now on."""
        self._device = device
        self._pipeline.text_encoder.to(device)

    def identity(self) -> str:
        """Hex digest of the encoder's weights."""
        files = weight_files(self._folder / "text_encoder", TEXT_WEIGHTS)
        return hashlib.blake2b("".join(map(file_checksum, files)).encode(), digest_size=16).hexdigest()

    def _shown(self, image_4HW: Tensor) -> Image.Image:
        picture = Image.fromarray(to_uint8_hwc(blend(image_4HW, 1.0)))
        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, picture.width / picture.height)
        return self._pipeline.image_processor.resize(picture, height, width)
