"""Connecting to Ray, and whether the cluster can hold the configured actors."""

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import ray
import torch
from pydantic import Field, model_validator

from actors.processes import driver_versions
from common.config import StrictConfig
from common.errors import ClusterError, PlacementError

UNASKED = "RAY_IGNORE_UNHANDLED_ERRORS"
"""Ray prints no error that nobody asks for while this is in the driver's environment, whatever its value."""


class RoleConfig(StrictConfig):
    """Actors of one role."""

    actors: int = Field(1, ge=1)
    """Number of processes."""
    cpus: float = Field(1.0, gt=0)
    """Ray CPUs reserved by each. Roles that never work at the same time may share a core by fractions."""
    gpus: float = Field(0.0, ge=0, le=1)
    """Ray GPUs reserved by each, which then computes on it; a fraction shares one, 0 is the CPU. Several learner ranks
    need more than half of one each: their collectives refuse to share."""
    threads: int = Field(1, ge=1)
    """Torch threads of each."""
    spares: int = Field(0, ge=0)
    """Rollout and reward actors beside ``actors`` that reserve as much, hold their model and get no work until they
    take the place of one that is lost: at once, instead of after a start. A new spare is then started."""


class ClusterConfig(StrictConfig):
    """Where the run's actors live."""

    address: str | None = None
    """Ray address; None uses RAY_ADDRESS where it is set (inside a Ray job), else starts Ray on this machine."""
    cpus: int | None = Field(None, ge=1)
    """CPUs that a locally started Ray offers; None offers all of the machine's."""
    object_store_mib: int = Field(1024, ge=80)
    """Object store of a locally started Ray."""
    learner: RoleConfig = RoleConfig()
    """Learner ranks."""
    rollout: RoleConfig = RoleConfig()
    """Rollout actors."""
    rollout_most: int | None = Field(None, ge=1)
    """Rollout actors up to this number while the cluster has room: those beyond ``rollout.actors`` join and leave with
    nodes, nobody waits for them, and they go when anybody is lost, whose place they may have taken. None: no more."""
    colocated: bool = False
    """The learner ranks sample as well, with the very weights that they train: one copy of the policy on each, none on
    its way. There are no rollout actors then, whatever ``rollout`` says, and sampling and training take turns."""
    offload: bool = False
    """With ``colocated``: VAE and condition encoder are in host memory while the policy trains."""
    reward: RoleConfig = RoleConfig()
    """Reward actors."""
    learner_port: int | None = Field(None, ge=1, le=65535)
    """Rendezvous port of the learner ranks on rank 0's node; None takes a free one."""
    replacements: int = Field(3, ge=0)
    """How often in a row the same actor is replaced without an answer from its role in between (learner ranks: without
    a commit); then the run stops."""
    wait_s: float = Field(0.0, ge=0)
    """How long the run waits for a cluster that is too small: before it starts, until an autoscaler has added nodes,
    and when a node is gone and nobody is left in a role."""
    deadline_s: float = Field(900.0, gt=0)
    """Longest wait for any one piece of work."""

    @model_validator(mode="after")
    def _ranks_have_gpus_of_their_own(self) -> Self:
        if self.learner.actors > 1 and 0 < self.learner.gpus <= 0.5:
            raise ValueError(
                f"learner.gpus {self.learner.gpus:g} would let two learner ranks share a GPU, which NCCL refuses; give "
                "each more than 0.5, or take one rank"
            )
        return self

    @model_validator(mode="after")
    def _only_shared_devices_are_cleared(self) -> Self:
        if self.offload and not self.colocated:
            raise ValueError("offload clears the device that sampling and training share: set colocated too")
        return self

    @model_validator(mode="after")
    def _guests_come_on_top(self) -> Self:
        if self.rollout_most is not None and (self.colocated or self.rollout_most < self.rollout.actors):
            raise ValueError(
                f"rollout_most {self.rollout_most} is for rollout actors beyond rollout.actors "
                f"({self.rollout.actors}), and a colocated run has none; raise it or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_no_spares(self) -> Self:
        if self.learner.spares:
            raise ValueError("learner.spares: ranks are lost together and built anew together; leave it out")
        return self


@dataclass(frozen=True)
class PlacementRow:
    """What one role asks for."""

    role: str
    actors: int
    cpus: float
    """Of all its actors together."""
    gpus: float = 0.0
    """Of all its actors together."""


def placement(config: ClusterConfig) -> list[PlacementRow]:
    """What the configured roles reserve, role by role."""
    crews = {"reward": config.reward} if config.colocated else {"rollout": config.rollout, "reward": config.reward}
    asked = [("learner and sampler" if config.colocated else "learner", config.learner, config.learner.actors)]
    asked += [(name, crew, crew.actors) for name, crew in crews.items()]
    asked += [(f"{name} spare", crew, crew.spares) for name, crew in crews.items() if crew.spares]
    return [PlacementRow(name, count, count * role.cpus, count * role.gpus) for name, role, count in asked]


def check_placement(rows: Sequence[PlacementRow], cpus: float, gpus: float | None = None) -> None:
    """Compares the configured actors with what a cluster offers, before anything loads.

    Args:
        rows: what is asked for.
        cpus: what there is.
        gpus: what there is; None where only the cluster could tell.

    Raises:
        PlacementError: what is asked for, role by role, and what there is.
    """
    remedy = "lower cluster.*.actors, cluster.*.cpus or cluster.*.gpus"
    if any(row.role.startswith("scorer ") for row in rows):
        remedy += ", or the resources of rewards.terms"
    if any(row.role == "judge" for row in rows):
        remedy += ", or judging.server"
    for kind, offered in (("CPU", cpus), ("GPU", gpus)):
        asked = [(row, row.cpus if kind == "CPU" else row.gpus) for row in rows]
        need = sum(amount for _, amount in asked)
        if offered is not None and need > offered + 1e-9:
            each = ", ".join(f"{r.role} {r.actors} × {amount / r.actors:g} {kind}" for r, amount in asked if amount)
            raise PlacementError(
                f"the configured actors need {need:g} {kind}s ({each}) but the cluster offers {offered:g}; "
                f"{remedy}, or add machines"
            )


def check_nodes(rows: Sequence[PlacementRow], nodes: Sequence[tuple[float, float]]) -> None:
    """Refuses an actor that is larger than every node: Ray would wait for room until the deadline.

    Args:
        rows: what is asked for.
        nodes: (CPUs, GPUs) of each.

    Raises:
        PlacementError: the role, what one of its actors reserves, and what the nodes have.
    """
    for row in rows:
        cpus, gpus = row.cpus / row.actors, row.gpus / row.actors
        if not any(has[0] + 1e-9 >= cpus and has[1] + 1e-9 >= gpus for has in nodes):
            each = ", ".join(sorted({f"{has[0]:g} and {has[1]:g}" for has in nodes}))
            raise PlacementError(
                f"one {row.role} actor needs {cpus:g} CPUs and {gpus:g} GPUs on one node, and no node has both (CPUs "
                f"and GPUs of the nodes: {each}); lower what the role reserves for each actor, or add larger nodes"
            )


def check_cluster(rows: Sequence[PlacementRow]) -> None:
    """Compares the configured actors with the nodes that the connected cluster has now.

    Raises:
        PlacementError: there is too little of something.
    """
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(has.get("CPU", 0), has.get("GPU", 0)) for has in found]
    check_placement(rows, sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes))
    check_nodes(rows, nodes)


@contextlib.contextmanager
def connected(config: ClusterConfig, others: Sequence[PlacementRow] = (), *, may_grow: bool = False) -> Iterator[None]:
    """Ray for the length of a run: an existing cluster, or one of this run's own.

    Args:
        config: where it is, and the actors of each role.
        others: what isolated reward terms and the judge reserve beside them.
        may_grow: an existing cluster that is too small is taken; :mod:`actors.room` waits for it.

    Raises:
        ClusterError: no cluster answers at the address.
        PlacementError: the cluster is too small for the configured actors.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    rows = [*placement(config), *others]
    _reach(address)
    if address == "local":
        check_placement(rows, config.cpus or os.cpu_count() or 1, torch.cuda.device_count())
    options: dict = {}
    if address == "local":
        options = {
            "num_cpus": config.cpus or os.cpu_count(),
            "object_store_memory": config.object_store_mib * 2**20,
            "include_dashboard": False,
        }
    # Ray puts the driver's working directory on every worker's import path, where a user's own ``data/`` folder would
    # shadow ours, and starts workers in it: connect from an empty folder that lives as long as they do.
    with tempfile.TemporaryDirectory(prefix="omnialpha-") as empty, _only_asked_errors():
        try:
            with contextlib.chdir(empty):
                ray.init(
                    address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="omnialpha", **options
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ClusterError(_unreachable(address, error)) from None
        try:
            if not may_grow:
                check_cluster(rows)
            driver_versions()
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _only_asked_errors() -> Iterator[None]:
    """Errors of calls for which nobody asks are not printed. Where a wait fails, its first failure is the cause and is
    reported; Ray would print those of its other calls after the run's last line."""
    before = os.environ.get(UNASKED)
    os.environ[UNASKED] = "1"
    try:
        yield
    finally:
        del os.environ[UNASKED]
        if before is not None:
            os.environ[UNASKED] = before


def _reach(address: str) -> None:
    """Ray ends the whole process when nobody answers at ``host:port``: ask first.

    Raises:
        ClusterError: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(_unreachable(address, error)) from None


def _unreachable(address: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    if address == "local":
        return f"Ray did not start on this machine: {reason}; see /tmp/ray for its logs"
    return (
        f"cannot reach Ray at {address!r}: {reason}; start a cluster there (`ray start --head`), or unset "
        "cluster.address and RAY_ADDRESS to run locally"
    )
