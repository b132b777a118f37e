"""One thread: sums then run in one order, and parallel test processes do not fight for cores."""

import hypothesis
import pytest
import torch

from policy.text import TextEncoder

torch.set_num_threads(1)
# Busy machines must not fail tests, and every run tries the same examples.
hypothesis.settings.register_profile("omnialpha", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("omnialpha")


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return TextEncoder()
