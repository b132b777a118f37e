"""One thread: sums then run in one order, and parallel test processes do not fight for cores."""

import hypothesis
import pytest
import torch
from rl_groups import LORA, move
from tiny_models import live_dit, measured_vae

from policy.adapters import add_lora, save_adapter, trained
from policy.folder import save_policy
from policy.rl import Start
from policy.text import TextEncoder

torch.set_num_threads(1)
# Busy machines must not fail tests, and every run tries the same examples.
hypothesis.settings.register_profile("omnialpha", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("omnialpha")


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return TextEncoder()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    plain, adapted = (tmp_path_factory.mktemp(name) for name in ("plain", "adapted"))
    model = live_dit()
    for folder in (plain, adapted):
        save_policy(folder, measured_vae(), model)
    add_lora(model, LORA, seed=1)
    save_adapter(adapted, trained(move(model).state_dict(), lora=True), LORA)
    return {
        "all weights": Start(plain),
        "a fresh adapter": Start(plain, LORA, seed=2),
        "an earlier stage's adapter": Start(adapted, LORA),
    }


@pytest.fixture
def plain(folders):
    return folders["all weights"]


@pytest.fixture(params=["all weights", "a fresh adapter", "an earlier stage's adapter"])
def start(request, folders):
    return folders[request.param]
