"""Training state on disk that depends neither on the number of ranks nor on the ZeRO stage.

    engine/state.json                    optimiser steps taken
    engine/buffers.safetensors           the module's buffers
    engine/rank-00000-000.safetensors    "weight NAME", "exp_avg NAME", "exp_avg_sq NAME": flat, float32

DeepSpeed's own checkpoint cuts the moments as its ranks do. Here every trained parameter is written whole, by one rank,
and every rank reads back just the part that it holds. Both sides go through the parameters one at a time: beyond what
training takes, a rank needs memory for one parameter and one unfinished file.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError

FOLDER = "engine"
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2**29


class Layout(Protocol):
    """How one ZeRO stage keeps a trained parameter and its moments."""

    def prepare(self, steps: int) -> None:
        """Allocates moments where AdamW has not done so yet, and sets its step count."""

    def whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The weight or a moment, whole; all ranks call it together."""

    def parts(self, parameter: torch.nn.Parameter, key: str) -> Iterator[tuple[torch.Tensor, int]]:
        """What this rank holds of the weight or of a moment: flat tensors to be filled, each with where it begins."""


def layout(engine: Any, stage: int) -> Layout:
    """The layout of a DeepSpeed engine."""
    return (Plain, Partitioned, Partitioned, Sharded)[stage](engine.optimizer)


def _fill(state: dict[str, Any], like: torch.Tensor, steps: int) -> None:
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(like)
    state["step"] = torch.tensor(float(steps))


class Plain:
    """No ZeRO: torch's AdamW on whole parameters."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def prepare(self, steps: int) -> None:
        for parameter in self._optimizer.param_groups[0]["params"]:
            _fill(self._optimizer.state[parameter], parameter, steps)

    def whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        return parameter.detach() if key == "weight" else self._optimizer.state[parameter][key]

    def parts(self, parameter: torch.nn.Parameter, key: str) -> Iterator[tuple[torch.Tensor, int]]:
        yield self.whole(parameter, key).view(-1), 0


class Partitioned:
    """ZeRO 1 and 2: whole weights on every rank; of the optimiser's flat copy and its moments one stretch each."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def prepare(self, steps: int) -> None:
        for flat in self._optimizer.single_partition_of_fp32_groups:
            _fill(self._optimizer.state[flat], flat, steps)
        self._optimizer._hp_optimizer_states_linked = False  # or DeepSpeed links parameters to moments only in a step
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key == "weight" else safe_get_full_optimizer_state(parameter, key)

    def parts(self, parameter: torch.nn.Parameter, key: str) -> Iterator[tuple[torch.Tensor, int]]:
        if key == "weight":
            yield parameter.detach().view(-1), 0
        held = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's; None where another rank has it all
        if held is not None:
            yield held.get_hp_fragment(None if key == "weight" else key), held.lp_fragment_address.start


class Sharded:
    """ZeRO 3: of everything an equal share on each rank; the last share may be padded."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._rank = torch.distributed.get_rank()

    def prepare(self, steps: int) -> None:
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            _fill(self._optimizer.optimizer.state[flat], flat, steps)

    def whole(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        return self._optimizer.get_full_hp_param(parameter, None if key == "weight" else key)

    def parts(self, parameter: torch.nn.Parameter, key: str) -> Iterator[tuple[torch.Tensor, int]]:
        share = parameter.ds_tensor  # type: ignore[attr-defined]
        start = self._rank * share.numel()
        real = max(min(share.numel(), parameter.ds_numel - start), 0)  # type: ignore[attr-defined]
        if key == "weight":
            yield share.detach().view(-1)[:real], start
        master, _ = self._optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=None if key == "weight" else key
        )
        yield master[:real], start


@torch.no_grad()
def save(engine: Any, stage: int, trained: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """Writes the state of ``trained`` parameters into ``folder/engine``; all ranks call it together."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    kept, out = layout(engine, stage), folder / FOLDER
    kept.prepare(engine.global_steps)
    out.mkdir(exist_ok=True)
    pending: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if pending:
            save_file(pending, out / f"rank-{rank:05d}-{files:03d}.safetensors")
            pending.clear()
            files += 1

    for number, (name, parameter) in enumerate(trained.items()):
        for key in ("weight", *MOMENTS):
            value = kept.whole(parameter, key)
            if number % world == rank:
                pending[f"{key} {name}"] = value.detach().reshape(-1).to("cpu", torch.float32, copy=True)
        if sum(value.nbytes for value in pending.values()) >= FILE_BYTES:
            flush()
    flush()
    if rank == 0:
        save_file(_buffers(engine.module), out / "buffers.safetensors")
        (out / "state.json").write_text(json.dumps({"steps": engine.global_steps}))


@torch.no_grad()
def load(engine: Any, stage: int, trained: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """Restores what :func:`save` wrote, on any number of ranks and at any ZeRO stage.

    Raises:
        CheckpointError: the state is of other parameters; names one.
    """
    source = folder / FOLDER
    steps = int(json.loads((source / "state.json").read_text())["steps"])
    kept = layout(engine, stage)
    kept.prepare(steps)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in sorted(source.glob("rank-*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            where |= dict.fromkeys(file.keys(), file)
        wanted = {
            f"{key} {name}": (parameter, key) for name, parameter in trained.items() for key in ("weight", *MOMENTS)
        }
        if odd := sorted(where.keys() ^ wanted.keys()):
            raise CheckpointError(
                f"{source}: the training state is of other parameters than this stage trains, for example {odd[0]!r}; "
                "give this run another run_dir"
            )
        for entry, (parameter, key) in wanted.items():
            stored = where[entry].get_slice(entry)
            size, expected = stored.get_shape()[0], getattr(parameter, "ds_numel", parameter.numel())
            if size != expected:
                raise CheckpointError(f"{source}: {entry!r} has {size} elements, not {expected}; take another run_dir")
            for part, start in kept.parts(parameter, key):
                if part.numel():
                    part.copy_(stored[start : start + part.numel()])
    buffers = _buffers(engine.module)
    for name, value in load_file(source / "buffers.safetensors").items():
        buffers[name].copy_(value)
    if stage == 3 and (whole := engine.optimizer.persistent_parameters):
        whole[0].partition(whole)  # small parameters are kept gathered: forget those copies, gather them again
        whole[0].all_gather(whole)
    engine.global_steps = steps


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the module's state."""
    lasting = module.state_dict().keys()
    return {name: value.contiguous() for name, value in module.named_buffers() if name in lasting}
