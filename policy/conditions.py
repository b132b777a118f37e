"""What a prompt and its pictures become for the DiT: states of a text encoder, behind one interface.

``policy.text.TextEncoder`` reads the prompt alone; :class:`QwenEncoder` reads the pictures too, exactly as diffusers'
Edit-Plus pipeline has Qwen2.5-VL do it. :class:`ConditionCache` keeps either one's states on disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor

from common.commit import file_checksum, storage_errors
from common.errors import CheckpointError
from data.rgba import blend, image_digest, to_uint8_hwc
from policy.base import TEXT_WEIGHTS, is_base
from policy.foreign import load_model, weight_files
from policy.text import TextEncoder


class ConditionEncoder(Protocol):
    """Prompt and pictures -> states."""

    def encode(self, prompt: str, inputs: Sequence[Tensor] = ()) -> Tensor:
        """States (T, D) of a prompt with its pictures, each (4, H, W) in [0, 1] and of any size."""
        ...


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

    def identity(self) -> str:
        """Hex digest of the encoder's weights."""
        files = weight_files(self._folder / "text_encoder", TEXT_WEIGHTS)
        return hashlib.blake2b("".join(map(file_checksum, files)).encode(), digest_size=16).hexdigest()

    def _shown(self, image_4HW: Tensor) -> Image.Image:
        picture = Image.fromarray(to_uint8_hwc(blend(image_4HW, 1.0)))
        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, picture.width / picture.height)
        return self._pipeline.image_processor.resize(picture, height, width)


class ConditionCache:
    """States on disk, one safetensors file per prompt and pictures, named by their content and the encoder's."""

    def __init__(self, encoder: ConditionEncoder, identity: str, folder: Path) -> None:
        """
        Args:
            identity: names the encoder's weights; states of another encoder are never taken for its own.
        """
        self._encoder, self._identity, self._folder = encoder, identity, folder
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def encode(self, prompt: str, inputs: Sequence[Tensor] = ()) -> Tensor:
        """States (T, D), as :class:`ConditionEncoder` gives them."""
        return self.lookup(prompt, [image_digest(to_uint8_hwc(image)) for image in inputs], lambda: inputs)

    def lookup(self, prompt: str, digests: Sequence[str], inputs: Callable[[], Sequence[Tensor]]) -> Tensor:
        """As :meth:`encode`, for pictures that are named by their pixel digest and decoded only where they are needed.

        Raises:
            CheckpointError: a file of the cache is damaged.
            StorageError: it cannot be written.
        """
        name = hashlib.blake2b(json.dumps([self._identity, prompt, *digests]).encode(), digest_size=16).hexdigest()
        path = self._folder / f"{name}.safetensors"
        if path.is_file():
            try:
                return load_file(path)["states"]
            except (SafetensorError, OSError, KeyError) as error:
                raise CheckpointError(f"{path}: damaged ({error}); remove it, it is made anew") from None
        states = self._encoder.encode(prompt, inputs())
        # Written under a name of its own: several ranks may meet the same prompt at once.
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        with storage_errors(path):
            save_file({"states": states.contiguous()}, temporary)
            temporary.replace(path)
        return states


def open_encoder(folder: Path | None, cache: Path | None = None) -> ConditionEncoder:
    """The encoder that a policy folder's transformer listens to: the base's own, kept in ``cache`` where that is given,
    or else the text encoder of the package, which is fast enough without.

    Raises:
        CheckpointError: the base's encoder cannot be loaded.
    """
    if folder is None or not is_base(folder):
        return TextEncoder()
    encoder = QwenEncoder(folder)
    return encoder if cache is None else ConditionCache(encoder, encoder.identity(), cache)
