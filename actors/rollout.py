"""Rollout actors: they encode conditions, sample from the current policy and decode RGBA layers.

A group leaves as three returns: small metadata for the driver, the trajectory for learner ranks, the pixels for
scorers. They are returned, not put: a value that an actor put would die with the actor.

Every call names the weights it is to be made with, and an actor that holds others loads them first. So groups of
several policy versions can be in flight at once, and whoever takes over a lost actor's work does it with the same
policy.
"""

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
import torch

from actors.balance import balance
from actors.cluster import ClusterConfig
from actors.crew import Crew, Notify, Work, unheard
from actors.devices import own_device, release
from actors.room import room
from common.errors import ActorError
from common.role_logs import recorded
from data.records import RecordDataset
from data.tasks import get_task
from policy.adapters import base_dtype
from policy.conditions import open_encoder
from policy.dit import PATCH
from policy.folder import load_transformer, load_vae, starting_policy
from policy.group import GroupMeta, GroupPixels, GroupRequest, GroupTrajectory, Recording
from policy.held_out import sample_records
from policy.kernels import KernelConfig
from policy.precision import Precision, computing
from policy.rl import Start, training_times
from policy.sampling import Condition, GroupNoise, denoise, initial_noise, step_noise
from policy.schedule import SamplingConfig, ScheduleConfig
from policy.sight import sight_for
from policy.vae import LatentCodec
from policy.weights import digest, load_packed

Key = TypeVar("Key")


@dataclass(frozen=True)
class Weights:
    """A policy's weights by reference, and the digest that whoever loads them must come to."""

    version: int
    """Training steps behind it; −1 outside training."""
    name: str
    """Digest."""
    source: Any
    """Reference to the index of ``buffer``, or the folder of a policy."""
    buffer: Any = None
    """Reference to the packed weights; None with a folder."""

    @property
    def arguments(self) -> tuple[int, str, Any, Any]:
        """As an actor's methods take them."""
        return self.version, self.name, self.source, self.buffer


@dataclass(frozen=True)
class RolloutSetup:
    """What a rollout actor is made from."""

    start: Start
    """The policy that training starts from; its folder also holds the VAE."""
    dataset: Path
    """Dataset folder."""
    seed: int
    sampling: SamplingConfig
    kernel: KernelConfig
    noise: GroupNoise = "independent"
    recording: Recording = field(default_factory=Recording)
    """What groups carry for the learner."""
    precision: Precision = "float32"
    """Of the transformer while it samples groups; evaluation samples in float32, on a base in bfloat16 like that."""


@recorded
class RolloutActor:
    """Samples groups; made into a Ray actor by :class:`RolloutPool`."""

    def __init__(
        self, setup: RolloutSetup, threads: int, gpus: float = 0.0, model: torch.nn.Module | None = None
    ) -> None:
        """``model``: the transformer of somebody in the same process, who keeps and may train it; otherwise a copy."""
        torch.set_num_threads(threads)
        self._setup, self._device = setup, own_device(gpus)
        start, self._base = setup.start, base_dtype(setup.start.lora)
        if model is None:
            model = self._at_rest(starting_policy(start.policy, start.lora, start.seed))
        self._model = model
        self._codec = LatentCodec(load_vae(start.policy).to(self._device), sight_for(model, self._device))
        self._text = open_encoder(start.policy, device=self._device)
        self._splits: dict[str, RecordDataset] = {}
        self._version, self._held = -1, ""

    def adopt(self, model: torch.nn.Module, version: int) -> None:
        """Samples with somebody's model, as it is then."""
        self._model, self._held, self._version = model, "", version

    def move(self, device: torch.device) -> None:
        """Moves all but the transformer."""
        self._codec.to(device)
        self._text.to(device)

    def load(self, version: int, index: Any, buffer: np.ndarray) -> str:
        """Takes published weights and answers with the digest of what the model now holds."""
        self._held = load_packed(self._model, index, buffer)
        self._version = version
        return self._held

    def load_folder(self, model: Path) -> str:
        """Takes the transformer of a policy folder (evaluation) and answers with its digest."""
        self._model, self._held = torch.nn.Module(), ""  # one policy is not held beside the next
        release(self._device)
        return self.take(load_transformer(model, self._base))

    def take(self, model: torch.nn.Module) -> str:
        """Samples with a transformer that nobody trains, and answers with its digest."""
        self._model = self._at_rest(model)
        self._held, self._version = digest(self._model.state_dict()), -1
        return self._held

    def hold(self, version: int, name: str, source: Any, buffer: np.ndarray | None) -> None:
        """Loads weights unless it holds them.

        Raises:
            ActorError: after loading, the model's digest is not ``name``.
        """
        if self._held != name:
            held = self.load_folder(source) if buffer is None else self.load(version, source, buffer)
            if held != name:
                raise ActorError(f"a rollout actor holds {held} after loading version {version}, which is {name}")
        self._version = version

    def sample(self, request: GroupRequest, *weights: Any) -> tuple[GroupMeta, GroupTrajectory, GroupPixels]:
        """Rolls out one group with the policy of ``weights`` (:attr:`Weights.arguments`), or the one it holds."""
        if weights:
            self.hold(*weights)
        start, setup = time.perf_counter(), self._setup
        if self._version < 0:
            raise ActorError("a rollout actor was asked for a group before it had received weights")
        data = self._split("train")
        record = data.record(request.index)
        sample = record.decode()
        task = get_task(record.task)
        inputs_NCHW = self._codec.encode_stack(sample.inputs, *sample.targets_LCHW.shape[-2:])
        text_TD = self._text.encode(record.prompt, sample.inputs).float().to(self._device)
        shape = (len(task.targets), self._codec.channels, *inputs_NCHW.shape[2:])
        seeds = (setup.seed, request.step, request.group)

        members = (shape, seeds, request.members, setup.noise)
        recording, schedule = setup.recording, setup.sampling.schedule
        window = range(0)
        if recording.window:
            window = setup.sampling.window_steps(setup.seed, request.step - 1, request.group)
        trained = tuple(window) or training_times(seeds, recording.times, schedule.steps)
        with computing(setup.precision, self._device.type):
            result = denoise(
                self._model,
                Condition(inputs_NCHW[None], text_TD[None]).expand(request.members),
                initial_noise(*members).to(self._device),
                schedule.sigmas(),
                window,
                setup.kernel,
                lambda step: step_noise(*members, step),
                solver=schedule.solver,
            )
        layers = self._codec.decode_stacks(result.latents_BMCHW)
        sequence = task.images * (shape[-2] // PATCH) * (shape[-1] // PATCH) + len(text_TD)
        meta = GroupMeta(
            name=request.name,
            task=record.task,
            record=record.id,
            version=self._version,
            steps=len(trained),
            tokens=sequence * request.members * len(trained),
            seconds=time.perf_counter() - start,
        )
        trajectory = GroupTrajectory(
            key=seeds,
            steps=trained,
            inputs_NCHW=inputs_NCHW.cpu().numpy(),
            text_TD=text_TD.cpu().numpy(),
            window_GWMCHW=result.window_BWMCHW.cpu().numpy(),
            log_probs_GW=result.log_probs_BW.cpu().numpy(),
            clean_GMCHW=result.latents_BMCHW.cpu().numpy(),
            means_GWMCHW=result.means_BWMCHW.cpu().numpy() if recording.means else None,
        )
        return meta, trajectory, self._pixels(record, layers, sample)

    def generate(
        self, split: str, indices: Sequence[int], schedule: ScheduleConfig, *weights: Any
    ) -> tuple[int, list[GroupPixels]]:
        """One sample per record (:func:`sample_records`; all of one task and size): (their number, groups of one).

        ``weights`` as in :meth:`sample`.
        """
        if weights:
            self.hold(*weights)
        data = self._split(split)
        records = [data.record(int(index)) for index in indices]
        sampled = sample_records(self._model, self._codec, self._text, records, schedule, self._setup.seed, self._base)
        groups = [self._pixels(r, layers[None], s) for r, (s, layers) in zip(records, sampled, strict=True)]
        return len(groups), groups

    def _pixels(self, record: Any, layers_GLCHW: torch.Tensor, sample: Any) -> GroupPixels:
        return GroupPixels(
            name=record.id,
            task=record.task,
            prompt=record.prompt,
            layers_GLCHW=layers_GLCHW.contiguous().cpu().numpy(),
            targets_LCHW=sample.targets_LCHW.numpy(),
            inputs=tuple(image.numpy() for image in sample.inputs),
        )

    def _at_rest(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.eval().requires_grad_(False).to(self._device)

    def _split(self, name: str) -> RecordDataset:
        if name not in self._splits:
            self._splits[name] = RecordDataset(self._setup.dataset, name)
        return self._splits[name]


@dataclass(frozen=True)
class Group:
    """A group that exists: everything of it by reference."""

    request: GroupRequest
    meta: Any
    trajectory: Any
    pixels: Any


class Rollouts(Protocol):
    """Whoever samples: rollout actors (:class:`RolloutPool`), or the learner ranks (:mod:`actors.colocated`)."""

    @property
    def samplers(self) -> int:
        """How many of them there are now."""
        ...

    def publish(self, version: int, name: str, index: Any, buffer: Any) -> Weights:
        """Weights for whatever is asked for from now on, unless it names older ones."""
        ...

    def sample(self, requests: Sequence[GroupRequest], costs: Sequence[float], weights: Weights) -> Iterator[Group]:
        """Submits groups and returns at once; they come one by one as they exist, in any order."""
        ...

    def load_folder(self, model: Path) -> str:
        """From now on it is a policy folder's transformer that samples; returns its digest."""
        ...

    def generate(
        self, split: str, chunks: Sequence[Sequence[int]], schedule: ScheduleConfig
    ) -> Iterator[tuple[Any, Any]]:
        """Submits evaluation chunks and returns at once: (count, pixels) references in the order of the chunks."""
        ...


class RolloutPool:
    """All rollout actors. One that dies is replaced, and its groups are sampled again: they are the same groups, for
    all of their randomness follows from the request, and the request comes with the weights."""

    def __init__(self, config: ClusterConfig, setup: RolloutSetup, notify: Notify = unheard) -> None:
        """``notify`` hears who is lost, replaced, joins or leaves."""
        role = config.rollout
        actor = ray.remote(num_cpus=role.cpus, num_gpus=role.gpus)(RolloutActor)
        self._weights: Weights | None = None
        self.crew = Crew(
            "rollout",
            lambda: actor.remote(setup, role.threads, role.gpus),
            role.actors,
            replacements=config.replacements,
            deadline_s=config.deadline_s,
            notify=notify,
            spares=role.spares,
            guests=max(0, (config.rollout_most or 0) - role.actors),
        )
        if config.rollout_most:
            room.welcome(self.crew.send_guests_away)
        self.crew.begin()

    @property
    def samplers(self) -> int:
        """As :attr:`Rollouts.samplers`."""
        return len(self.crew.serving) or self.crew.count

    def publish(self, version: int, name: str, index: Any, buffer: Any) -> Weights:
        """Weights for whatever is asked for from now on, unless it names older ones. The actors load them when they
        come to it; one whose digest then differs from the learner's ends the run."""
        self._weights = Weights(version, name, ray.put(index), buffer)
        return self._weights

    def sample(self, requests: Sequence[GroupRequest], costs: Sequence[float], weights: Weights) -> Iterator[Group]:
        """Submits groups, shared among the actors by their relative costs, and returns at once; the groups come one by
        one as they exist, in any order."""
        self.crew.invite_guests()
        asked = {}
        for number, share in enumerate(balance(costs, self.samplers)):
            for place in share:
                request = requests[place]
                asked[self.crew.ask(functools.partial(_sample, request, weights), number)] = request
        done = self.crew.as_done(list(asked), f"rollout actors: groups of step {requests[0].step}")
        return (Group(asked[work], *work.refs) for work, _ in done)

    def load_folder(self, model: Path) -> str:
        """From now on all actors work with a policy folder's transformer; returns its digest."""
        loading = self.crew.ask(lambda actor: actor.load_folder.remote(model))
        (name,) = self.crew.wait([loading], f"{model} to load")
        self._weights = Weights(-1, name, model)
        return name

    def generate(
        self, split: str, chunks: Sequence[Sequence[int]], schedule: ScheduleConfig
    ) -> Iterator[tuple[Any, Any]]:
        """Submits evaluation chunks round robin and returns at once: (count, pixels) references, in the order of the
        chunks, each as soon as it exists.

        Raises:
            ActorError: there are no weights yet.
        """
        if self._weights is None:
            raise ActorError("rollout actors were asked for samples before they had been given weights")
        call = functools.partial(_generate, self._weights, split, schedule)
        asked = [self.crew.ask(functools.partial(call, chunk)) for chunk in chunks]
        done = self.crew.as_done(asked, "rollout actors: evaluation")
        return (_pair(work) for work in in_order(asked, (work for work, _ in done)))


def _pair(work: Work) -> tuple[Any, Any]:
    count, pixels = work.refs
    return count, pixels


def in_order(keys: Sequence[Key], done: Iterable[Key]) -> Iterator[Key]:
    """``keys``, each as soon as it and all before it are among ``done``."""
    there, place = set(), 0
    for key in done:
        there.add(key)
        while place < len(keys) and keys[place] in there:
            yield keys[place]
            place += 1


def _sample(request: GroupRequest, weights: Weights, actor: Any) -> Any:
    return actor.sample.options(num_returns=3).remote(request, *weights.arguments)


def _generate(weights: Weights, split: str, schedule: ScheduleConfig, chunk: Sequence[int], actor: Any) -> Any:
    return actor.generate.options(num_returns=2).remote(split, chunk, schedule, *weights.arguments)
