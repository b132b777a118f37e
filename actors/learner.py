"""Learner ranks: Ray actors that train one program together through DeepSpeed.

The ranks are one failure domain. The same ranks serve every stage: :meth:`LearnerGroup.setup` swaps the program.

    driver ──train(plan, payload refs)──▶ ranks ──▶ micro-batches ──▶ engine ──▶ step record
           ◀─publish()── rank 0: (version's digest, index), weights buffer
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file, save_file

from actors.balance import balance
from actors.cluster import ClusterConfig
from actors.devices import own_device, release
from actors.engine import Engine, EngineConfig, OptimiserConfig, learning_rate, sum_stats
from actors.operator_cache import load_operator
from actors.processes import admit, enter
from actors.rollout import Weights
from actors.room import room
from actors.waiting import LOST, lost_because, wait_all
from common.commit import storage_errors
from common.errors import ActorError, ClusterError, DeadlineError, LearnerError, NumericsError
from common.role_logs import recorded
from data.records import RecordDataset
from policy.latents import LatentSums, encode_records, latent_statistics, split_work
from policy.programs import Program, SftProgram
from policy.rl import GrpoProgram, RlProgram
from policy.schedule import ScheduleConfig
from policy.weights import digest, pack, unpack

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of an optimiser step."""

    lr: float
    calls: int
    """Backward calls that every rank makes."""
    global_count: int
    """Terms of the loss over all ranks."""
    extras: tuple[Any, ...]
    """Small companions of the payloads (advantages)."""
    weights: tuple[float, ...]
    """1 for real items, 0 for those that only keep the calls equal."""
    names: tuple[str, ...]
    """What to call the payloads in an error."""
    ratio_bound: float | None = None
    """Largest |ratio − 1| with which the step may be taken: given while the policy is still the one that sampled."""


@dataclass(frozen=True)
class Item:
    """One work item as the driver sees it."""

    payload: Any
    """A value, or a reference that only ranks resolve."""
    count: int
    """Terms it adds to the loss."""
    cost: float
    """Relative cost, for balancing."""
    calls: int = 1
    """Its micro-batches."""
    extra: Any = None
    name: str = "batch"
    """What to call it in an error."""


def first_ratio_message(error: float, bound: float) -> str:
    """What to say when the learner's replay of an unchanged policy is not the rollout's own."""
    return (
        f"the first ratio is off by {error:.2e}, more than grpo.first_ratio_bound {bound:.1e}, and nothing was trained "
        "on it: rollout actors and learner do not compute the same policy (weights, dtype, batch shape or threads)"
    )


@recorded
class LearnerRank:
    """One DeepSpeed rank; made into a Ray actor by :class:`LearnerGroup`."""

    def __init__(self, rank: int, threads: int, gpus: float = 0.0) -> None:
        torch.set_num_threads(threads)
        self._rank, self._device = rank, own_device(gpus)
        self._socket: socket.socket | None = None
        self._program: Program | None = None
        self._engine: Engine | None = None

    def address(self, host: str | None, port: int | None) -> tuple[str, int]:
        """Opens the rendezvous: ``host`` or this node's IP, ``port`` or one that is free there.

        The socket is kept and handed to the rendezvous, so nobody can take the port in between and nothing listens on
        other interfaces.

        Raises:
            ClusterError: the port asked for is in use.
        """
        host = host or ray.util.get_node_ip_address()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port or 0))
            self._socket.listen()
        except OSError as error:
            raise ClusterError(
                f"cluster.learner_port {port} cannot be used on {host} ({error.strerror}); choose another port, "
                "or leave it out to take a free one"
            ) from None
        return host, self._socket.getsockname()[1]

    def connect(self, address: str, port: int, world: int) -> None:
        """Joins the process group."""
        os.environ.update(
            MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(self._rank), WORLD_SIZE=str(world), LOCAL_RANK="0"
        )
        # Ray shows a rank its own GPU only, so that every rank is the first of its node.
        os.environ["DS_ACCELERATOR"] = self._device.type
        if address == LOOPBACK:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        listening = self._socket.detach() if self._socket is not None else None
        store = torch.distributed.TCPStore(address, port, world, is_master=self._rank == 0, master_listen_fd=listening)
        backend = "gloo"
        if self._device.type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(self._device)
        torch.distributed.init_process_group(backend, store=store, rank=self._rank, world_size=world)
        if self._device.type == "cpu":
            load_operator()
        import deepspeed

        deepspeed.init_distributed(backend, verbose=False)  # takes over the group that is there

    def setup(self, build: Callable[[], Program], optimiser: OptimiserConfig, config: EngineConfig) -> int:
        """Builds the program and its engine; returns the number of trained parameters."""
        self._let_go()
        self._program = build()
        self._program.place(self._device)
        count = sum(p.numel() for p in self._program.module.parameters() if p.requires_grad)
        self._engine = Engine(self._program.module, optimiser, config)
        return count

    def restore(self, folder: Path) -> None:
        """Loads training state from a verified commit."""
        self._ready().load(folder)

    def train(self, plan: StepPlan, *payloads: Any) -> dict[str, float]:
        """One optimiser step on this rank's items; returns sums of logged quantities, norm and seconds."""
        engine, program, start = self._ready(), self._program, time.perf_counter()
        assert program is not None
        micros = [
            (micro, weight, name)
            for payload, extra, weight, name in zip(payloads, plan.extras, plan.weights, plan.names, strict=True)
            for micro in program.micro_batches(payload, extra)
        ]
        micros += [(micros[-1][0], 0.0, "padding")] * (plan.calls - len(micros))
        stats = []
        for k, (micro, weight, name) in enumerate(micros):
            with engine.autocast():
                loss = program.loss(engine.engine, micro)
            try:
                engine.accumulate(loss, plan.global_count, last=k == len(micros) - 1, weight=weight)
            except NumericsError as error:
                raise NumericsError(f"{name}: {error}") from None
            if weight:
                stats.append(loss.stats | {"loss": float(loss.total.detach()), "count": float(loss.count)})
        off = [entry["max_ratio_error"] for entry in stats if "max_ratio_error" in entry]
        if plan.ratio_bound is not None and off and not np.max(off) <= plan.ratio_bound:  # also for NaN
            raise NumericsError(first_ratio_message(float(np.max(off)), plan.ratio_bound))
        norm = engine.step(plan.lr)
        return sum_stats(stats) | {"max_grad_norm": norm, "max_seconds": time.perf_counter() - start}

    def begin_batch(self, sampled_by: tuple[Any, Any] | None) -> None:
        """Tells the program that a new batch of rollouts arrives, and whose: references to (index, buffer) of published
        weights, which only a program that wants them fetches; None is the current policy."""
        current = self._ready().weights
        self._rl_program().begin_batch((lambda: dict(unpack(*ray.get(list(sampled_by))))) if sampled_by else current)

    def recompute(self, spare: int, *payloads: Any) -> Any:
        """This rank's groups with its own log-probabilities, then the largest |ratio − 1| to the delivered ones.

        ``spare`` repeats of the last group keep the ranks' forward passes equal in number.
        """
        program, engine = self._rl_program(), self._ready().engine
        assert isinstance(program, GrpoProgram)
        with self._ready().autocast():
            results = [program.recompute(engine, payload) for payload in payloads]
            for _ in range(spare):
                program.recompute(engine, payloads[-1])
        groups, errors = zip(*results, strict=True)
        return (*groups, float(np.max(errors)))  # a NaN must not hide behind another group's number

    def publish(self) -> tuple[Any, Any]:
        """((digest, index), buffer) of the weights; (None, None) except on rank 0."""
        weights = self._ready().weights()
        if self._rank:
            return None, None
        index, buffer = pack(weights)
        return (digest(weights), index), buffer

    def save(self, folder: Path) -> None:
        """Writes this rank's training state."""
        with storage_errors(folder):
            self._ready().save(folder, self._rank)

    def store_weights(self, path: Path, index: Any, buffer: np.ndarray) -> None:
        """Writes published weights."""
        with storage_errors(path):
            save_file(dict(unpack(index, buffer)), path)

    def stored_weights(self, path: Path) -> tuple[Any, Any]:
        """((digest, index), buffer) of what :meth:`store_weights` wrote."""
        weights = load_file(path)
        index, buffer = pack(weights)
        return (digest(weights), index), buffer

    def export(self, folder: Path) -> None:
        """Rank 0 writes the weights that the stage hands on; the others take part in gathering them."""
        weights = self._ready().published()
        if self._rank == 0:
            assert self._program is not None
            with storage_errors(folder):
                self._program.export(folder, weights)

    def draw(self, path: Path, indices: Sequence[int], schedule: ScheduleConfig) -> None:
        """Draws validation records with the current weights. All ranks sample, as a forward pass under ZeRO 3 takes all
        of them; rank 0 writes the PNG."""
        engine, program = self._ready(), self._program
        assert isinstance(program, SftProgram)
        picture = program.draw(engine.engine, indices, schedule)
        if self._rank == 0:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)

    def encode(self, model: Path, dataset: Path, work: tuple[list[int], frozenset[str]], out: Path) -> LatentSums:
        """Encodes this rank's share of the training split (between stages: no engine needed)."""
        return encode_records(model, RecordDataset(dataset, "train"), *work, out, self._device)

    def _let_go(self) -> None:
        """Frees what was set up: it must not be held beside what comes next."""
        if self._engine is not None:
            self._engine.engine.destroy()
        self._engine = self._program = None
        release(self._device)

    def _rl_program(self) -> RlProgram:
        assert isinstance(self._program, RlProgram)
        return self._program

    def _ready(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("setup() comes first")
        return self._engine


def one_node() -> bool:
    """Whether the connected cluster is a single machine, so that ranks can meet on loopback."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


class LearnerGroup:
    """All ranks, driven as one. They are lost together: whatever one of them dies of or raises unexpectedly is a
    :class:`LearnerError`, after which only :meth:`rebuild` makes sense."""

    kind: type[LearnerRank] = LearnerRank
    """What a rank is."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._deadline, self.world = config.deadline_s, config.learner.actors
        self._optimiser: OptimiserConfig | None = None
        self._steps = 0
        self._begun = list[Any]()
        self._start()

    def _start(self) -> None:
        config, role = self._config, self._config.learner
        actor = ray.remote(num_cpus=role.cpus, num_gpus=role.gpus)(self.kind)
        self._ranks = [actor.remote(rank, *self._settings()) for rank in range(self.world)]
        entering = [enter(rank, f"learner-{number}") for number, rank in enumerate(self._ranks)]
        for said in wait_all(entering, "learner ranks to start", self._deadline, room.look):
            admit(said)
        asked = self._ranks[0].address.remote(LOOPBACK if one_node() else None, config.learner_port)
        ((address, port),) = wait_all([asked], "a rendezvous of the learner ranks", self._deadline)
        connecting = [rank.connect.remote(address, port, self.world) for rank in self._ranks]
        wait_all(connecting, "ranks to connect", self._deadline)

    def _settings(self) -> tuple[Any, ...]:
        """What a rank is made with, besides its number."""
        return self._config.learner.threads, self._config.learner.gpus

    def rebuild(self) -> None:
        """Ends all ranks and starts new ones, which know nothing: :meth:`setup` and :meth:`restore` come next.

        Raises:
            LearnerError: one of them was lost before they had met, or did not come in time.
        """
        self.close()
        room.make("learner")
        # The old processes must be gone: they hold the rendezvous port and the memory that the new ones need.
        pending = [rank.__ray_ready__.remote() for rank in self._ranks]
        ray.wait(pending, num_returns=len(pending), timeout=30.0)
        self._begun = []
        try:
            self._start()
        except (ActorError, DeadlineError) as error:
            raise LearnerError(self._dead() or str(error)) from None
        room.placed("learner")

    def setup(self, build: Callable[[], Program], optimiser: OptimiserConfig, engine: EngineConfig, steps: int) -> int:
        """Gives every rank a program; returns its number of trained parameters."""
        self._optimiser, self._steps = optimiser, steps
        ref = ray.put(build)
        return self._each("setup", lambda r, _: r.setup.remote(ref, optimiser, engine))[0]

    def restore(self, folder: Path) -> None:
        """Loads a verified commit on all ranks."""
        self._each("restore", lambda r, _: r.restore.remote(folder))

    def train(self, step: int, items: Sequence[Item], ratio_bound: float | None = None) -> dict[str, float]:
        """One optimiser step over all ranks.

        Returns:
            Means over the loss's terms; ``max_*`` are maxima.

        Args:
            step: from 0.
            ratio_bound: as in :class:`StepPlan`.

        Raises:
            NumericsError: a loss or gradient was not finite, a ratio off by more than the bound, or
                terms were lost between driver and loss; names the
                step and the item. The training state must not be committed.
        """
        assert self._optimiser is not None
        lr = learning_rate(self._optimiser, step, self._steps)
        shares = balance([item.cost for item in items], self.world)
        calls = max(sum(items[i].calls for i in share) for share in shares)
        count = sum(item.count for item in items)

        def submit(rank: Any, number: int) -> Any:
            # A rank without work repeats the first item with weight 0, so that all ranks meet in every collective.
            mine, weight = ([items[i] for i in shares[number]], 1.0) if shares[number] else ([items[0]], 0.0)
            extras, names = tuple(item.extra for item in mine), tuple(item.name for item in mine)
            plan = StepPlan(lr, calls, count, extras, (weight,) * len(mine), names, ratio_bound)
            return rank.train.remote(plan, *(item.payload for item in mine))

        try:
            total = sum_stats(self._each(f"step {step + 1}", submit))
        except NumericsError as error:
            raise NumericsError(f"step {step + 1}, {error}") from None
        if total.pop("count") != count:
            raise NumericsError(f"step {step + 1}: the ranks did not train on the {count} terms they were given")
        return {"lr": lr} | {k: v if k.startswith("max_") else v / count for k, v in total.items()}

    def begin_batch(self, sampled_by: Weights | None = None) -> None:
        """Before the first update on a batch of rollouts; ``sampled_by`` where that was not the current policy. Returns
        at once: ranks make their calls in order, and whoever waits for the next one hears of an error in this one."""
        old = (sampled_by.source, sampled_by.buffer) if sampled_by else None
        self._begun += [rank.begin_batch.remote(old) for rank in self._ranks]

    def recompute(self, items: Sequence[Item]) -> tuple[list[Item], float]:
        """The items with the learner's own old log-probabilities, and the largest |ratio − 1| to the delivered ones.

        The groups stay in the object store: the driver gets references.
        """
        if len({item.calls for item in items}) != 1:
            raise ValueError("groups with windows of different sizes would leave ranks waiting for each other")
        shares = balance([item.cost for item in items], self.world)
        calls = [sum(items[i].calls for i in share) for share in shares]
        busiest, fresh, errors = max(calls), dict[int, Item](), []
        for rank, share, own in zip(self._ranks, shares, calls, strict=True):
            mine = share or [0]  # a rank without work takes part in the collectives and throws its result away
            spare = (busiest - own if share else busiest - items[0].calls) // items[mine[-1]].calls
            method = rank.recompute.options(num_returns=len(mine) + 1)
            *refs, error = method.remote(spare, *(items[i].payload for i in mine))
            errors.append(error)
            fresh |= {i: replace(items[i], payload=ref) for i, ref in zip(share, refs, strict=False)}
        worst = np.max(self._all(errors, "learner ranks: old log-probabilities"))
        return [fresh[i] for i in range(len(items))], float(worst)

    def publish(self) -> tuple[str, Any, Any]:
        """(digest, index, buffer reference) of the current weights. The buffer stays in the object store."""
        pairs = [r.publish.options(num_returns=2).remote() for r in self._ranks]
        heads = self._all([head for head, _ in pairs], "weights to be published")
        name, index = heads[0]
        return name, index, pairs[0][1]

    def save(self, folder: Path) -> None:
        """All ranks write their state into one folder."""
        self._each("save", lambda r, _: r.save.remote(folder))

    def store_weights(self, folder: Path, weights: Sequence[Weights]) -> None:
        """Rank 0 writes published weights into a folder."""
        rank = self._ranks[0]
        paths = [folder / f"weights-{each.version:08d}.safetensors" for each in weights]
        stored = [rank.store_weights.remote(p, w.source, w.buffer) for p, w in zip(paths, weights, strict=True)]
        self._all(stored, "published weights to be stored")

    def stored_weights(self, folder: Path) -> list[tuple[int, str, Any, Any]]:
        """What :meth:`store_weights` wrote, by version: (version, digest, index, buffer reference) each."""
        paths = {int(path.stem.rpartition("-")[2]): path for path in folder.glob("weights-*.safetensors")}
        pairs = {v: self._ranks[0].stored_weights.options(num_returns=2).remote(paths[v]) for v in sorted(paths)}
        heads = self._all([head for head, _ in pairs.values()], "published weights to be read")
        return [(v, *head, buffer) for (v, (_, buffer)), head in zip(pairs.items(), heads, strict=True)]

    def export(self, folder: Path) -> None:
        """Writes the policy folder that the stage hands on."""
        self._each("export", lambda r, _: r.export.remote(folder))

    def draw(self, path: Path, indices: Sequence[int], schedule: ScheduleConfig) -> None:
        """Draws validation records into a PNG: input, sample of the current weights, truth."""
        self._each("pictures", lambda r, _: r.draw.remote(path, indices, schedule))

    def encode_split(self, model: Path, dataset: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the training split into shards under ``out``; returns mean and std of the latents per channel."""
        work = split_work(RecordDataset(dataset, "train"), self.world)
        paths = [out / f"latents-{number:05d}.safetensors" for number in range(self.world)]
        parts = self._each("encode", lambda r, number: r.encode.remote(model, dataset, work[number], paths[number]))
        return latent_statistics(parts)

    def close(self) -> None:
        """Ends the ranks."""
        for rank in self._ranks:
            ray.kill(rank)

    def _each(self, what: str, submit: Callable[[Any, int], Any]) -> list[Any]:
        return self._all([submit(rank, number) for number, rank in enumerate(self._ranks)], f"learner ranks: {what}")

    def _all(self, refs: Sequence[Any], what: str) -> list[Any]:
        begun, self._begun = self._begun, []
        try:
            return wait_all([*begun, *refs], what, self._deadline)[len(begun) :]
        except (ActorError, DeadlineError) as error:
            raise LearnerError(self._dead() or str(error)) from None

    def _dead(self) -> str | None:
        """Which rank is dead, and why. Its peers may have complained about a lost connection before that was known."""
        probes = {rank.__ray_ready__.remote(): number for number, rank in enumerate(self._ranks)}
        for ref in ray.wait(list(probes), num_returns=len(probes), timeout=1.0)[0]:
            try:
                ray.get(ref)
            except LOST as error:
                return f"learner rank {probes[ref]}: {lost_because(error)}"
        return None
