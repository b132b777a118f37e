"""The arithmetic of a forward pass: one context for training and for sampling.

A rollout and its replay must do the same arithmetic: a ratio is exactly 1 only where precision and attention kernel are
those of the sampler.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["float32", "bfloat16"]

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def attending(precision: Precision, device: str = "cpu") -> AbstractContextManager[Any]:
    """The attention kernel of :func:`computing`, for a backward pass that computes a forward pass again."""
    # The backward pass of torch's fused attention in bfloat16 on a CPU takes twice the time of the plain one.
    return sdpa_kernel(SDPBackend.MATH) if precision == "bfloat16" and device == "cpu" else nullcontext()


@contextmanager
def computing(precision: Precision, device: str = "cpu") -> Iterator[None]:
    """Matrix products and convolutions in ``precision`` (autocast); weights stay as they are."""
    if precision == "float32":
        yield
        return
    with torch.autocast(device, torch.bfloat16), attending(precision, device):
        yield
