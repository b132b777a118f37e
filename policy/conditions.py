"""What a prompt and its pictures become for the DiT: states of a text encoder, behind one interface.

``policy.text.TextEncoder`` reads the prompt alone, ``policy.qwen.QwenEncoder`` its pictures too;
:class:`ConditionCache` keeps either one's states on disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.commit import storage_errors
from common.errors import CheckpointError
from data.rgba import image_digest, to_uint8_hwc
from policy.base import is_base
from policy.text import TextEncoder


class ConditionEncoder(Protocol):
    """Prompt and pictures -> states."""

    def encode(self, prompt: str, inputs: Sequence[Tensor] = ()) -> Tensor:
        """States (T, D) of a prompt with its pictures, each (4, H, W) in [0, 1] and of any size; where the encoder
        computes."""
        ...

    def to(self, device: torch.device) -> None:
        """Moves the weights, where the encoder is large enough to compute elsewhere than on the CPU."""
        ...


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

    def to(self, device: torch.device) -> None:
        """As :class:`ConditionEncoder`."""
        self._encoder.to(device)

    def lookup(self, prompt: str, digests: Sequence[str], inputs: Callable[[], Sequence[Tensor]]) -> Tensor:
        """As :meth:`encode`, for pictures that are named by their pixel digest and decoded only where they are needed;
        in host memory.

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
        states = self._encoder.encode(prompt, inputs()).cpu()
        # Written under a name of its own: several ranks may meet the same prompt at once.
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        with storage_errors(path):
            save_file({"states": states.contiguous()}, temporary)
            temporary.replace(path)
        return states


def open_encoder(
    folder: Path | None, cache: Path | None = None, device: torch.device | str = "cpu"
) -> ConditionEncoder:
    """The encoder that a policy folder's transformer listens to: the base's own on ``device``, kept in ``cache`` where
    that is given, or else the text encoder of the package, which is fast enough without either.

    Raises:
        CheckpointError: the base's encoder cannot be loaded.
    """
    if folder is None or not is_base(folder):
        return TextEncoder()
    from policy.qwen import QwenEncoder  # slow to import, and only bases need it

    encoder = QwenEncoder(folder, device)
    return encoder if cache is None else ConditionCache(encoder, encoder.identity(), cache)
