"""Colocated placement: the learner ranks sample too, with the very weights that they train.

    driver ──sample(request)──▶ ranks ──▶ groups ──▶ reward actors
           ──train(plan)──────▶ the same ranks

One copy of the policy on each device and no weights on their way: the choice for few GPUs. Sampling and training take
turns. Under ZeRO 3 every forward pass takes all ranks, so that all of them make the same number of them in the same
order; one that has no group left samples its last one again and throws it away.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from actors.balance import balance
from actors.cluster import ClusterConfig
from actors.engine import EngineConfig, OptimiserConfig
from actors.learner import LearnerGroup, LearnerRank, StepPlan
from actors.rollout import Group, RolloutActor, RolloutSetup, Weights, in_order
from actors.waiting import LOOK_UP_EVERY_S, Wait, expected
from common.errors import ActorError, DeadlineError, LearnerError
from common.role_logs import recorded
from policy.adapters import base_dtype
from policy.folder import load_transformer
from policy.group import GroupMeta, GroupPixels, GroupRequest, GroupTrajectory
from policy.schedule import ScheduleConfig

HOST = torch.device("cpu")


@recorded
class ColocatedRank(LearnerRank):
    """A learner rank that samples; made into a Ray actor by :class:`ColocatedGroup`."""

    def __init__(self, rank: int, threads: int, gpus: float = 0.0, offload: bool = False) -> None:
        super().__init__(rank, threads, gpus)
        self._size, self._offload = (threads, gpus), offload
        self._sampler: RolloutActor | None = None

    def setup(self, build: Any, optimiser: OptimiserConfig, config: EngineConfig) -> int:
        """As a learner rank; whoever sampled with the program before is gone."""
        self._sampler = None
        return super().setup(build, optimiser, config)

    def train(self, plan: StepPlan, *payloads: Any) -> dict[str, float]:
        """As a learner rank, with the device to itself where that is asked for."""
        if self._offload and self._sampler is not None:
            self._sampler.move(HOST)
        return super().train(plan, *payloads)

    def sample(
        self, setup: RolloutSetup, request: GroupRequest, version: int
    ) -> tuple[GroupMeta, GroupTrajectory, GroupPixels]:
        """Rolls out one group with the weights that are trained."""
        return self._current(setup, version).sample(request)

    def keep_up(self, setup: RolloutSetup, request: GroupRequest, version: int) -> None:
        """Makes the forward passes of :meth:`sample` for nothing but the other ranks."""
        self._current(setup, version).sample(request)

    def generate(
        self, setup: RolloutSetup, split: str, indices: Sequence[int], schedule: ScheduleConfig, version: int
    ) -> tuple[int, list[GroupPixels]]:
        """One sample per record, with the weights that are trained, or those of a folder (``version`` −1)."""
        sampler = self._current(setup, version) if version >= 0 else self._sampler
        assert sampler is not None
        return sampler.generate(split, indices, schedule)

    def load_folder(self, setup: RolloutSetup, model: Path) -> str:
        """From now on samples with the transformer of a policy folder. What was trained makes way for it."""
        self._let_go()
        if self._sampler is None:
            transformer = load_transformer(model, base_dtype(setup.start.lora))
            self._sampler = RolloutActor(setup, *self._size, transformer)
            return self._sampler.take(transformer)
        self._sampler.move(self._device)
        return self._sampler.load_folder(model)

    def _current(self, setup: RolloutSetup, version: int) -> RolloutActor:
        engine = self._ready()
        if self._sampler is None:
            self._sampler = RolloutActor(setup, *self._size, engine.module)
        self._sampler.adopt(engine.engine, version)
        if self._offload:
            self._sampler.move(self._device)
        return self._sampler


class ColocatedGroup(LearnerGroup):
    """Learner ranks that sample, driven as one."""

    kind = ColocatedRank

    def __init__(self, config: ClusterConfig) -> None:
        self._even = False
        super().__init__(config)

    def setup(self, build: Any, optimiser: OptimiserConfig, engine: EngineConfig, steps: int) -> int:
        """As a learner group."""
        self._even = engine.zero_stage == 3
        return super().setup(build, optimiser, engine, steps)

    def publish(self) -> tuple[str, Any, Any]:
        """Nothing goes anywhere: whoever samples has the weights."""
        return "", None, None

    def sample(self, setup: Any, requests: Sequence[GroupRequest], costs: Sequence[float], version: int) -> list[Group]:
        """Submits groups, shared among the ranks by their relative costs."""
        shares = balance(costs, self.world)
        longest = max(map(len, shares))
        groups = []
        for rank, share in zip(self._ranks, shares, strict=True):
            for place in share:
                made = rank.sample.options(num_returns=3).remote(setup, requests[place], version)
                groups.append(Group(requests[place], *made))
            last = requests[share[-1] if share else 0]
            self._begun += [rank.keep_up.remote(setup, last, version) for _ in range(self._spare(longest, len(share)))]
        return groups

    def generate(
        self, setup: Any, split: str, chunks: Sequence[Sequence[int]], schedule: ScheduleConfig, version: int
    ) -> list[tuple[Any, Any]]:
        """Submits evaluation chunks round robin: (count, pixels) references."""
        pairs, even = [], self._even and version >= 0
        for number in range(-(-len(chunks) // self.world) * self.world if even else len(chunks)):
            rank, chunk = self._ranks[number % self.world], chunks[min(number, len(chunks) - 1)]
            pairs.append(rank.generate.options(num_returns=2).remote(setup, split, chunk, schedule, version))
        self._begun += [count for count, _ in pairs[len(chunks) :]]
        return pairs[: len(chunks)]

    def load_folder(self, setup: Any, model: Path) -> str:
        """All ranks sample with a policy folder's transformer from now on; returns its digest."""
        return self._each(f"{model} to load", lambda rank, _: rank.load_folder.remote(setup, model))[0]

    def as_done(self, refs: Sequence[Any], what: str) -> Iterator[Any]:
        """``refs``, each as soon as it is there.

        Raises:
            LearnerError: a rank was lost, or raised something unexpected, or none answered for too long.
            LostValueError, OmniAlphaError: as :func:`actors.waiting.wait_all`.
        """
        begun, self._begun = self._begun, []
        pending, wait, heard = [*refs, *begun], Wait(what, len(refs), self._deadline), 0.0
        wanted = set(refs)
        try:
            while pending:
                left = min(wait.left(len(wanted.intersection(pending)), heard), LOOK_UP_EVERY_S)
                ready, pending = ray.wait(pending, num_returns=1, timeout=left)
                for ref in ready:
                    ray.get(ref)
                    heard = time.monotonic()
                    if ref in wanted:
                        yield ref
        except RayError as error:
            meant = expected(error, what)
            raise (LearnerError(self._dead() or str(meant)) if isinstance(meant, ActorError) else meant) from None
        except DeadlineError as error:
            raise LearnerError(self._dead() or str(error)) from None

    def _settings(self) -> tuple[Any, ...]:
        return *super()._settings(), self._config.offload

    def _spare(self, longest: int, own: int) -> int:
        return longest - own if self._even else 0


class ColocatedRollouts:
    """The ranks of a :class:`ColocatedGroup` as those who sample (:class:`actors.rollout.Rollouts`). A rank that is
    lost takes its groups with it: the learner group is built anew, and the stage goes on from its last commit."""

    def __init__(self, learner: ColocatedGroup, setup: RolloutSetup) -> None:
        self._learner, self._setup = learner, ray.put(setup)
        self._weights: Weights | None = None

    @property
    def samplers(self) -> int:
        """As :attr:`actors.rollout.Rollouts.samplers`."""
        return self._learner.world

    def publish(self, version: int, name: str, index: Any, buffer: Any) -> Weights:
        """Counts versions; the ranks have the weights."""
        self._weights = Weights(version, name, index, buffer)
        return self._weights

    def sample(self, requests: Sequence[GroupRequest], costs: Sequence[float], weights: Weights) -> Iterator[Group]:
        """As :meth:`actors.rollout.Rollouts.sample`."""
        groups = {g.meta: g for g in self._learner.sample(self._setup, requests, costs, weights.version)}
        done = self._learner.as_done(list(groups), f"learner ranks: groups of step {requests[0].step}")
        return (groups[meta] for meta in done)

    def load_folder(self, model: Path) -> str:
        """As :meth:`actors.rollout.Rollouts.load_folder`. The trained weights are gone then."""
        name = self._learner.load_folder(self._setup, model)
        self._weights = Weights(-1, name, model)
        return name

    def generate(
        self, split: str, chunks: Sequence[Sequence[int]], schedule: ScheduleConfig
    ) -> Iterator[tuple[Any, Any]]:
        """As :meth:`actors.rollout.Rollouts.generate`.

        Raises:
            ActorError: there are no weights yet.
        """
        if self._weights is None:
            raise ActorError("learner ranks were asked for samples before there were weights")
        asked = self._learner.generate(self._setup, split, chunks, schedule, self._weights.version)
        pairs = dict(asked)
        done = self._learner.as_done(list(pairs), "learner ranks: evaluation")
        return ((count, pairs[count]) for count in in_order(list(pairs), done))
