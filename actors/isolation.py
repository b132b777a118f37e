"""Reward terms in processes of their own: who scores which group, deadlines, and replacing what hangs or dies.

A process has one group at a time; the others wait here. So the deadline of a group counts from when its scoring
begins, and whoever is killed takes no other group along.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import re
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError, RuntimeEnvSetupError

import actors.scorer
from actors.cluster import PlacementRow
from actors.packages import folders_in_place, packed
from actors.processes import admit, enter
from actors.room import room
from actors.scorer import ScorerActor
from actors.waiting import expected, wait_futures
from common.errors import ActorError, ClusterError, ConfigError, DeadlineError, OmniAlphaError, RewardError
from rewards.base import Scores, missing_scores
from rewards.combine import RewardConfig, TermConfig

log = logging.getLogger("omnialpha")

cloudpickle.register_pickle_by_value(actors.scorer)

LOSSES = 3
"""Processes of a term, times their number, that may be lost in a row without one answer between them."""

OWN_VERSIONS = ("torch",)
"""What a term's runtime_env may bring in another version than the driver's."""

Value = TypeVar("Value")


def isolated_terms(config: RewardConfig) -> list[TermConfig]:
    """Terms that run in processes of their own."""
    return [term for term in config.terms if term.own_process]


def scorer_placement(config: RewardConfig) -> list[PlacementRow]:
    """What the processes of isolated terms reserve, term by term."""
    return [
        PlacementRow(f"scorer {term.name}", own.actors, own.actors * own.cpus, own.actors * own.gpus)
        for term in isolated_terms(config)
        for own in (term.reserved,)
    ]


class TermScorers:
    """The processes of one term. Everything runs on the pool's event loop."""

    def __init__(self, term: TermConfig, start_deadline_s: float) -> None:
        self._term, self._start_deadline = term, start_deadline_s
        own = term.reserved
        self._class = ray.remote(num_cpus=own.cpus, num_gpus=own.gpus)(ScorerActor)
        self._allowed = LOSSES * own.actors
        self._lost = 0
        self._broken: OmniAlphaError | None = None
        # None stands for "no process will ever be free again".
        self._free: asyncio.Queue[Any] = asyncio.Queue()
        self._living: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._replacing: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Starts the term's processes.

        Raises:
            ConfigError: the scorer cannot be found, imported or built, or its runtime_env cannot be set up.
            ActorError, DeadlineError: its process ended, or was not ready in time.
        """
        for actor in await asyncio.gather(*(self._start() for _ in range(self._term.reserved.actors))):
            self._free.put_nowait(actor)

    async def score(self, pixels: Any, place: int | None, members: int, group: str, cells: int | None = None) -> Scores:
        """Scores of one group, with ``cells`` its contributions too; all missing, with the reason, if no answer comes.

        Raises:
            RewardError: one process after the other was lost.
            OmniAlphaError: something else than the scorer failed.
        """
        actor = await self._free.get()
        if actor is None:
            self._free.put_nowait(None)
            assert self._broken is not None
            raise self._broken
        began, deadline = time.perf_counter(), self._term.deadline
        try:
            scores: Scores = await _within(actor.score.remote(pixels, place, cells), deadline)
        except _Overdue:
            reason = f"no answer within {deadline:g} s (deadline_s)"
        except RayActorError as error:
            log.debug("reward term %r: %s", self._term.name, error)
            reason = "its process ended: a crash, an exit, or out of memory"
        except RayError as error:
            raise expected(error, f"reward term {self._term.name!r}") from None
        else:
            self._lost = 0
            self._free.put_nowait(actor)
            return scores
        self._lose(actor, f"group {group}: {reason}")
        return missing_scores(self._term.name, members, reason, time.perf_counter() - began)

    def end(self) -> None:
        """Kills the term's processes."""
        for actor in list(self._living):
            self._kill(actor)

    async def _start(self) -> Any:
        """A process that has built the scorer."""
        term, what = self._term, f"reward term {self._term.name!r}"
        env = await asyncio.to_thread(packed, term) if term.runtime_env else None  # packing may take a while
        threads = max(1, int(term.reserved.cpus))
        actor = self._class.options(runtime_env=env).remote(
            term.name, term.source, term.params, threads, folders_in_place(term), term.reserved.gpus
        )
        self._living.append(actor)
        # A replacement takes its forerunner's number.
        number = min(set(range(len(self._living))) - set(self._numbers.values()))
        self._numbers[actor] = number
        name = f"scorer-{re.sub('[^A-Za-z0-9_.]', '_', term.name)}-{number}"  # also names a file
        own = OWN_VERSIONS if term.runtime_env else ()
        actor.prepare.remote()  # an error of it is start's, too
        try:
            admit(await _within(enter(actor, name, own), self._start_deadline), own)
            await _within(actor.start.remote(), self._start_deadline)
        except ClusterError:
            self._kill(actor)
            raise
        except _Overdue:
            self._kill(actor)
            raise DeadlineError(
                f"{what}: its process was not ready after {self._start_deadline:g} s; raise cluster.deadline_s if the "
                "scorer takes that long to build, otherwise see `ray status` for what its resources wait for"
            ) from None
        except RayError as error:
            self._kill(actor)
            raise _not_started(error, what) from None
        return actor

    def _lose(self, actor: Any, reason: str) -> None:
        self._kill(actor)
        self._lost += 1
        if self._lost < self._allowed:
            log.warning("reward term %r, %s; its process is replaced", self._term.name, reason)
            task = asyncio.create_task(self._replace())
            self._replacing.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._replacing.discard)
        else:
            self._give_up(reason)

    async def _replace(self) -> None:
        who = f"scorer {self._term.name} {self._lost}"
        room.make(who)
        try:
            self._free.put_nowait(await self._start())
        except OmniAlphaError as error:
            self._lost += 1
            if self._lost < self._allowed:
                log.warning("%s; trying again", error)
                await self._replace()
            else:
                self._give_up(str(error))
        finally:
            room.placed(who)

    def _give_up(self, reason: str) -> None:
        self._broken = RewardError(
            f"reward term {self._term.name!r} lost its process {self._lost} times without an answer in between, the "
            f"last time with {reason}; try the scorer on stored rollouts (omnialpha reward score) and mend it, raise "
            "the term's deadline_s if it is that slow, or take the term out"
        )
        self._free.put_nowait(None)

    def _kill(self, actor: Any) -> None:
        self._living.remove(actor)
        self._numbers.pop(actor, None)
        with contextlib.suppress(RayError):
            ray.kill(actor, no_restart=True)


class ScorerPool:
    """The processes of all isolated terms, and the thread that keeps their deadlines beside the driver's own work."""

    def __init__(self, terms: Sequence[TermConfig], start_deadline_s: float) -> None:
        """
        Raises:
            OmniAlphaError: a term's processes do not start (:meth:`TermScorers.begin`).
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scorers", daemon=True)
        self._thread.start()
        self._terms = {term.name: TermScorers(term, start_deadline_s) for term in terms}
        try:
            wait_futures([self.run(term.begin()) for term in self._terms.values()], "scorers to start")
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, Value]) -> concurrent.futures.Future[Value]:
        """Starts work on the pool's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def score(
        self,
        names: Sequence[str],
        pixels: Any,
        members: int,
        group: str,
        place: int | None = None,
        cells: int | None = None,
    ) -> list[Scores]:
        """Scores of one group by those of ``names`` that are isolated, all at the same time."""
        own = [self._terms[name] for name in names if name in self._terms]
        return await asyncio.gather(*(term.score(pixels, place, members, group, cells) for term in own))

    def close(self) -> None:
        """Ends the thread and all processes. To be called before the connection to Ray ends."""
        if self._loop.is_closed():
            return

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for term in self._terms.values():
                term.end()

        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.run(cancel()).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()


class _Overdue(Exception):
    """No answer in time. Not a TimeoutError, which is also what the answer may be."""


async def _within(ref: Any, seconds: float) -> Any:
    """The value of ``ref``.

    Raises:
        _Overdue: it was not there in time.
    """
    answer = asyncio.ensure_future(ref)
    done, _ = await asyncio.wait({answer}, timeout=seconds)
    if not done:
        answer.cancel()
        raise _Overdue
    return answer.result()


def _not_started(error: RayError, what: str) -> OmniAlphaError:
    if isinstance(error, RuntimeEnvSetupError):
        log.debug("%s: %s", what, error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return ConfigError(
            f"{what}: its runtime_env cannot be set up: {' '.join(lines)[:400]}; mend rewards.terms, or what it names"
        )
    if isinstance(error, RayActorError):
        log.debug("%s: %s", what, error)
        return ActorError(
            f"{what}: its process ended while it built the scorer: a crash, an exit, or out of memory; try "
            "`omnialpha reward check`, or see the worker's log in Ray's session folder"
        )
    return expected(error, what)
