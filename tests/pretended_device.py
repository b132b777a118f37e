"""A device that is not the CPU, for machines that have none: its tensors lie in host memory and are computed there, but
say that they lie elsewhere. What code for a GPU gets wrong fails on it as it would there: tensors of two devices in one
operation, and NumPy on a tensor that was not brought back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``host`` is what it stands for."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Lets operations that name the device make tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Some functions make tensors on a device before anything is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_elsewhere(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return args[0].host.new_tensor(*args[1:], **kwargs).to(args[0].device)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Elsewhere):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(at).to(args[0].device) if isinstance(at, list) else at for at in places)
            args = (args[0], places)
        if func in (torch.where, torch.Tensor.where) and isinstance(args[0], Elsewhere):
            there = args[0].device
            args = [value if isinstance(value, torch.Tensor) else torch.tensor(value).to(there) for value in args]
        return func(*args, **kwargs)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """The device, for as long as the context is open."""
    _register()
    with _Literals(), _Factories(), sdpa_kernel(SDPBackend.MATH):  # fused attention is of a device
        yield torch.device(NAME, 0)


@cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, Elsewhere)]
    for value in tensors if there and func not in MOVES else ():
        if not isinstance(value, Elsewhere) and value.dim():  # as on a GPU, scalars may come from the CPU
            raise RuntimeError(f"{func}: one tensor is on {NAME}:0 and another on {value.device}")
    asked = kwargs.get("device")
    stays = _is_elsewhere(asked) if asked is not None else bool(there)
    kwargs = kwargs | ({"device": torch.device("cpu")} if asked is not None else {})
    if func is aten._conj.default:  # lazily conjugated, it would need a mark that only real devices keep
        func = aten._conj_physical.default
    found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if func is aten.copy_.default:
        return args[0]
    for value in there:  # in place: the same object
        if found is value.host:
            return value
    return (
        tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, found)
        if stays
        else found
    )


def _host(value: Any) -> Any:
    return value.host if isinstance(value, Elsewhere) else value
