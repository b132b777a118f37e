"""One thread: sums then run in one order, and parallel test processes do not fight for cores."""

import pytest
import torch

from policy.text import TextEncoder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return TextEncoder()
