"""Weights on the move: one flat buffer, an index into it, and a digest cheap enough for every push."""

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import CheckpointError
from policy.adapters import has_lora, trained


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and bytes. CRC-32 of each tensor keeps it near memory speed."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(state):
        tensor = state[name]
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{zlib.crc32(_bytes(tensor).data)}\n".encode())
    return total.hexdigest()


def pack(state: Mapping[str, torch.Tensor]) -> tuple[tuple[Entry, ...], np.ndarray]:
    """Copies ``state`` into one uint8 buffer that crosses processes without being copied again."""
    index, offset = [], 0
    for name in sorted(state):
        size = state[name].numel() * state[name].element_size()
        dtype = str(state[name].dtype).removeprefix("torch.")
        index.append(Entry(name, dtype, tuple(state[name].shape), offset, size))
        offset += size + (-size) % 64  # aligned for every dtype
    buffer = np.zeros(offset, dtype=np.uint8)
    for entry in index:
        buffer[entry.offset : entry.offset + entry.nbytes] = _bytes(state[entry.name])
    return tuple(index), buffer


def unpack(index: tuple[Entry, ...], buffer: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of the tensors that :func:`pack` took, one after the other, with their names."""
    for entry in index:
        raw = torch.tensor(buffer[entry.offset : entry.offset + entry.nbytes])
        yield entry.name, raw.view(getattr(torch, entry.dtype)).view(entry.shape)


def load_packed(module: torch.nn.Module, index: tuple[Entry, ...], buffer: np.ndarray) -> str:
    """Writes packed weights into ``module`` (all of it, or its adapter) and returns the digest of what it now holds.

    Raises:
        CheckpointError: names or shapes do not fit the module exactly.
    """
    state = trained(module.state_dict(), has_lora(module))
    if missing := sorted(state.keys() ^ {entry.name for entry in index}):
        raise CheckpointError(f"published weights do not fit the model: {len(missing)} names differ, {missing[:3]}")
    for entry in index:
        if tuple(state[entry.name].shape) != entry.shape:
            raise CheckpointError(f"published {entry.name} is {entry.shape}, not {tuple(state[entry.name].shape)}")
    with torch.no_grad():
        for name, tensor in unpack(index, buffer):
            state[name].copy_(tensor)
    return digest(state)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
