"""CLIP similarity of images and a text, with weights from a local folder (Radford et al. 2021, arXiv 2103.00020)."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError

# The colour statistics that CLIP was trained with, where the folder does not give its own.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """A CLIP model as ``transformers`` saves it; made by :func:`load_clip`."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: what ``CLIPModel.save_pretrained`` and the tokenizer's wrote; ``preprocessor_config.json`` may tell
                the colour statistics.

        Raises:
            ConfigError: the folder is missing or holds something else.
        """
        from transformers import AutoTokenizer, CLIPModel  # slow to import, and rarely needed

        if not (folder / "config.json").is_file():
            raise ConfigError(f"clip folder {folder}: no config.json here; give a folder with a saved CLIP model")
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            path = folder / "preprocessor_config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            self._mean, self._std = (
                torch.tensor(settings.get(name, default))[:, None, None]
                for name, default in (("image_mean", _MEAN), ("image_std", _STD))
            )
        except Exception as error:  # the library raises many kinds for a folder that is not what it should be
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ConfigError(
                f"clip folder {folder}: cannot be loaded as a CLIP model ({reason}); it needs config.json, "
                "model.safetensors and the tokenizer's files"
            ) from None
        self._model.eval().requires_grad_(False)
        self._side: int = self._model.config.vision_config.image_size
        self._words: int = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def similarity(self, images_N3HW: Tensor, text: str) -> Tensor:
        """Cosine between each RGB image in [0, 1] and the text, (N,) in [−1, 1]; a longer text is cut.

        The model follows the images to their device.
        """
        device = images_N3HW.device
        tokens: Any = self._tokenizer([text], return_tensors="pt", truncation=True, max_length=self._words)
        found = self._model.to(device)(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            pixel_values=self._pixels(images_N3HW),
        )
        return F.cosine_similarity(found.image_embeds, found.text_embeds)

    def _pixels(self, images_N3HW: Tensor) -> Tensor:
        """The shorter side scaled to the model's, the middle of the longer one, colours normalised."""
        height, width = images_N3HW.shape[-2:]
        scale = self._side / min(height, width)
        size = (max(self._side, round(height * scale)), max(self._side, round(width * scale)))
        scaled = F.interpolate(images_N3HW, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        middle = scaled[..., top : top + self._side, left : left + self._side]
        return (middle - self._mean.to(middle)) / self._std.to(middle)


@lru_cache(maxsize=2)
def load_clip(folder: Path) -> Clip:
    """The model in ``folder``, one copy per process. Raises as :class:`Clip`."""
    return Clip(folder)
