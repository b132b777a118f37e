import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import live_dit, normal
from torch import nn

from common.errors import CheckpointError
from policy.weights import digest, load_packed, pack


class Mixed(nn.Module):
    """Every kind of tensor a module may hold."""

    def __init__(self, seed: int = 0, width: int = 5, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width, bias=bias)
        self.coarse = nn.Parameter(normal(7, seed=seed).to(torch.bfloat16))
        self.scale = nn.Parameter(torch.tensor(0.5 + seed))
        self.register_buffer("sixteen", normal(2, 2, seed=seed + 1).to(torch.float16))
        self.register_buffer("fine", normal(3, seed=seed + 2).double())
        self.register_buffer("steps", torch.tensor([seed, -1, 2**40]))
        self.register_buffer("mask", torch.tensor([True, False, bool(seed)]))
        self.register_buffer("nothing", torch.zeros(0, 4))
        with torch.no_grad():
            self.linear.weight.copy_(normal(width, 3, seed=seed + 3))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_packed_weights_arrive_bit_for_bit_in_every_dtype():
    there, here = Mixed(seed=1), Mixed(seed=2)
    assert not equal(there.state_dict(), here.state_dict())
    index, buffer = pack(there.state_dict())
    assert load_packed(here, index, buffer) == digest(there.state_dict())
    assert equal(there.state_dict(), here.state_dict())


def test_a_transformer_takes_published_weights_and_gives_the_publishers_digest():
    there, here = live_dit(seed=1), live_dit(seed=2)
    assert load_packed(here, *pack(there.state_dict())) == digest(there.state_dict())
    assert equal(there.state_dict(), here.state_dict())


def test_a_read_only_buffer_as_ray_delivers_it_is_enough_and_stays_untouched():
    there, here = Mixed(seed=1), Mixed(seed=2)
    index, buffer = pack(there.state_dict())
    before = buffer.copy()
    buffer.setflags(write=False)
    load_packed(here, index, buffer)
    with torch.no_grad():
        here.linear.weight.zero_()
    assert np.array_equal(buffer, before)


def test_the_buffer_is_a_copy_of_the_weights_and_not_a_view():
    module = Mixed()
    index, buffer = pack(module.state_dict())
    with torch.no_grad():
        module.linear.weight.zero_()
    other = Mixed(seed=3)
    load_packed(other, index, buffer)
    assert bool((other.linear.weight != 0).all())


def test_every_tensor_is_aligned_and_none_overlaps_the_next():
    index, buffer = pack(Mixed().state_dict())
    assert buffer.dtype == np.uint8
    assert [entry.name for entry in index] == sorted(Mixed().state_dict())
    end = 0
    for entry in index:
        assert entry.offset % 64 == 0
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
    assert end <= len(buffer)


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_single_flipped_bit_anywhere_changes_the_digest(place, bit):
    state = {name: tensor.clone() for name, tensor in Mixed().state_dict().items() if tensor.dtype != torch.bool}
    before = digest(state)
    raw = [tensor.view(-1).view(torch.uint8) for tensor in state.values() if tensor.numel()]
    place %= sum(len(part) for part in raw)
    for part in raw:
        if place < len(part):
            part[place] ^= 1 << bit
            break
        place -= len(part)
    assert digest(state) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {("other" if k == "scale" else k): v for k, v in s.items()},
        lambda s: s | {"linear.weight": s["linear.weight"].view(3, 5)},
        lambda s: s | {"fine": s["fine"].view(torch.int64)},
        lambda s: s | {"coarse": s["coarse"].to(torch.float32)},
        lambda s: {k: v for k, v in s.items() if k != "nothing"},
        lambda s: s | {"sixteen": s["sixteen"].T.contiguous()},
    ],
    ids=["name", "shape", "dtype alone", "precision", "missing", "order of values"],
)
def test_names_shapes_and_dtypes_are_part_of_the_digest(change):
    state = Mixed().state_dict()
    assert digest(change(dict(state))) != digest(state)


def test_the_digest_does_not_depend_on_order_or_memory_layout():
    state = Mixed().state_dict()
    turned = dict(reversed(state.items()))
    turned["linear.weight"] = state["linear.weight"].T.contiguous().T
    assert not turned["linear.weight"].is_contiguous()
    assert digest(turned) == digest(state)


def test_weights_that_lose_precision_on_arrival_are_noticed_by_their_digest():
    there, here = nn.Linear(8, 8), nn.Linear(8, 8).to(torch.bfloat16)
    assert load_packed(here, *pack(there.state_dict())) != digest(there.state_dict())


@pytest.mark.parametrize(
    ("publisher", "message"),
    [
        (Mixed(bias=False), r"1 names differ, \['linear.bias'\]"),
        (nn.Linear(2, 2), "names differ"),
        (Mixed(seed=4, width=6), r"linear\.bias is \(6,\), not \(5,\)"),
    ],
    ids=["a missing name", "another module", "another shape"],
)
def test_weights_of_another_module_are_refused_and_change_nothing(publisher, message):
    module = Mixed(seed=9)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_packed(module, *pack(publisher.state_dict()))
    assert equal(module.state_dict(), before)
