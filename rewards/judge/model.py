"""A Qwen2.5-VL in this process: how a question becomes its input, and its answer.

The server does the same behind HTTP; training and checks without a server use this one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.errors import ConfigError, RewardError
from rewards.judge.asking import Question

IMAGE_TOKEN = "<|image_pad|>"


class Reader:
    """Turns questions into model inputs."""

    def __init__(self, tokenizer: Any, pictures: Any) -> None:
        """
        Args:
            tokenizer: with a chat template.
            pictures: an image processor of the Qwen2-VL family.
        """
        self.tokenizer, self._pictures = tokenizer, pictures
        self._image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    @classmethod
    def load(cls, folder: Path) -> "Reader":
        """The reader of a saved model.

        Raises:
            ConfigError: no tokenizer, chat template or picture settings there, or a model without vision.
        """
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            pictures = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library raises many kinds for a folder that is not what it should be
            raise ConfigError(
                f"judge {folder}: no tokenizer or picture settings can be read ({_reason(error)}); "
                "give a folder with tokenizer.json and preprocessor_config.json"
            ) from None
        if not tokenizer.chat_template:
            raise ConfigError(f"judge {folder}: its tokenizer has no chat template; take an instruction-tuned model")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            raise ConfigError(f"judge {folder}: a model without vision (no token {IMAGE_TOKEN}); take a Qwen2.5-VL")
        return cls(tokenizer, pictures)

    def tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def label_ids(self, labels: Sequence[str]) -> list[int]:
        """The token of each label; they were checked to be single ones."""
        return [self.tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]

    def batch(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Model inputs of several questions, padded on the left, so that the last place answers each."""
        images = [image for question in questions for image in question.images]
        seen = self._pictures(images, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(dim=1) // self._pictures.merge_size**2).tolist())
        rows = [self._ids(question, counts) for question in questions]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": ((ids == self._image) & mask.bool()).int(),
            "pixel_values": seen["pixel_values"],
            "image_grid_thw": seen["image_grid_thw"],
        }

    def _ids(self, question: Question, counts: Any) -> list[int]:
        content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, *rest = text.split(IMAGE_TOKEN)
        if len(rest) != len(question.images):
            raise RewardError(f"the question {question.text[:80]!r} holds {IMAGE_TOKEN}, which stands for a picture")
        filled = before + "".join(IMAGE_TOKEN * int(next(counts)) + part for part in rest)
        ids: list[int] = self.tokenizer.encode(filled, add_special_tokens=False)
        return ids


class ModelJudge:
    """Answers in this process; an :class:`rewards.judge.asking.Asker`."""

    concurrency = 1

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: a Qwen2.5-VL as ``transformers`` saves it, for example what ``omnialpha judge train`` wrote.

        Raises:
            ConfigError: the folder is missing or holds something else.
        """
        self.name = folder.name
        self.reader = Reader.load(folder)
        self._model = load_model(folder).eval().requires_grad_(False)

    @torch.no_grad()
    def ask(self, text: str, images: Sequence[Image.Image], labels: Sequence[str]) -> dict[str, float]:
        """Probability of each label as the answer's only token."""
        question = Question(text, tuple(images), tuple(labels))
        logits = answer_logits(self._model, self.reader.batch([question]))[0, self.reader.label_ids(labels)]
        return dict(zip(labels, logits.double().softmax(dim=0).tolist(), strict=True))


def answer_logits(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the answer's token for each question of a batch: (B, vocabulary), float32."""
    # All kept tensors are of the last place: logits of whole prompts would fill memory with large vocabularies.
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()


def load_model(folder: Path) -> Any:
    """The model of a folder, float32.

    Raises:
        ConfigError: it is missing, another architecture, or damaged.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"judge {folder}: no readable config.json ({_reason(error)}); give a model's folder"
        ) from None
    if kind != "qwen2_5_vl":
        raise ConfigError(
            f"judge {folder}: model_type {kind!r}; only qwen2_5_vl is trained and asked in this process: take a "
            "Qwen2.5-VL, or serve the model with vLLM"
        )
    try:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:  # the library raises many kinds for a folder that is not what it should be
        raise ConfigError(f"judge {folder}: cannot be loaded ({_reason(error)}); is a file missing or cut?") from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
