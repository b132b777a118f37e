"""The arithmetic of a forward pass: one context for training and for sampling.

A rollout and its replay must do the same arithmetic: a ratio is exactly 1 only where precision and attention kernel are
those of the sampler.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["float32", "bfloat16"]

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def computing(precision: Precision, device: str = "cpu") -> Iterator[None]:
    """Matrix products and convolutions in ``precision`` (autocast); weights stay as they are."""
    if precision == "float32":
        yield
        return
    # The backward pass of torch's fused attention in bfloat16 on a CPU takes twice the time of the plain one.
    attention = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with torch.autocast(device, torch.bfloat16), attention:
        yield
