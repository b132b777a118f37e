"""The judge of a run: vLLM servers that Ray actors look after, or a server that somebody else runs."""

import contextlib
import logging
import math
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import ray
from pydantic import Field, field_validator, model_validator
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from actors.cluster import PlacementRow
from actors.judge_server import JudgeServer, JudgeServerConfig
from actors.processes import admit, enter
from actors.room import room
from actors.waiting import expected, wait_all
from common.config import StrictConfig
from common.errors import ConfigError
from common.role_logs import recorded
from rewards.judge.client import Endpoints, FixedEndpoints, JudgeClient, JudgeClientConfig
from rewards.judge.exchange import Endpoint
from rewards.judge.server_metrics import server_metrics

log = logging.getLogger("omnialpha")

ASK_ACTOR_S = 10.0
"""Longest wait for what an actor of this module knows by heart."""
LOOK_AT_ACTORS_EVERY_S = 5.0
"""How often actors are asked whether they are still there."""
STOP_S = 30.0
"""Longest wait for a server to end."""
SHARE = 0.8
"""Of ``cluster.deadline_s`` that a judge may be silent: who asks it gives up before the driver gives up on who asks."""


class JudgeUrlConfig(StrictConfig):
    """A vLLM server that somebody else runs, with ``--logprobs-mode processed_logprobs``."""

    url: str
    """``http(s)://host[:port]``, with or without ``/v1``."""
    model: str
    """Name under which it serves the model."""
    key_env: str | None = None
    """Name of the environment variable of the run that holds the key; the key itself is nowhere written."""
    start_deadline_s: float = Field(60.0, gt=0)
    """Longest wait for its first answer, when the run begins."""

    @field_validator("url")
    @classmethod
    def _plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server; give http://host:port or https://host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("the address holds more than host, port and path; a key belongs in key_env's variable")
        return url.rstrip("/").removesuffix("/v1")


class JudgeServing(StrictConfig):
    """Who holds the judge's model, and how it is asked."""

    server: JudgeServerConfig | None = None
    """Servers of the run's own."""
    external: JudgeUrlConfig | None = None
    """Or a server that is there already."""
    client: JudgeClientConfig = JudgeClientConfig()
    """How it is asked."""
    missing: Literal["drop", "wait", "fail"] = "wait"
    """A question without an answer for ``client.patience_s``: its score is left out (``drop``), it is asked until it is
    answered or the judge's silence for most of ``cluster.deadline_s`` ends the run (``wait``), or it ends the run
    (``fail``)."""

    compare: bool = True
    """Whether the evaluation has the judge compare GRPO's samples with those of every other policy, pair by pair in
    both orders, on the tasks that it judges."""

    @model_validator(mode="after")
    def _one(self) -> "JudgeServing":
        if (self.server is None) == (self.external is None):
            raise ValueError("give either server, which the run starts, or external, which is there already")
        return self

    @property
    def model(self) -> str:
        """The model's folder or name: what the answers depend on."""
        return self.server.model if self.server else self._external.model

    @property
    def first_patience_s(self) -> float:
        """Longest wait for the first answer; own servers were ready before they are asked."""
        return self.client.patience_s if self.server else self._external.start_deadline_s

    def anchored(self) -> "JudgeServing":
        """With absolute paths."""
        return self.model_copy(update={"server": self.server and self.server.anchored()})

    def check(self) -> None:
        """What can be found out before anything starts.

        Raises:
            ConfigError: the model's folder is not there, or the key is not in the environment.
        """
        if self.external:
            external_endpoint(self.external)
        elif Path(self.model).is_absolute() and not Path(self.model).is_dir():
            raise ConfigError(
                f"judging.server.model {self.model}: no such folder; give a model's, or train one with "
                "`omnialpha judge train judge-small`"
            )

    @property
    def _external(self) -> JudgeUrlConfig:
        assert self.external
        return self.external


def judge_placement(config: JudgeServing) -> list[PlacementRow]:
    """What the judge's servers reserve."""
    server = config.server
    if server is None:
        return []
    gpus = server.replicas * server.tensor_parallel if server.gpus else 0
    return [PlacementRow("judge", server.replicas, server.replicas * server.cpus, gpus)]


@recorded
class JudgeActor:
    """Looks after one server; made into a Ray actor by :class:`JudgePool`. Its server ends when it does, however it
    does; started anew by Ray, it starts its server anew."""

    def __init__(self, config: JudgeServerConfig, name: str, key: str, log_file: Path, number: int) -> None:
        address = ray.util.get_node_ip_address()
        self._server = JudgeServer(config, name, key, log_file, number=number, address=address)

    def ready(self) -> None:
        """Returns when the server was ready for the first time.

        Raises:
            OmniAlphaError: it never will be.
        """
        self._server.wait_ready()

    def endpoint(self) -> Endpoint | None:
        """Where the server answers now; raises as :meth:`ready`."""
        return self._server.endpoint()

    def metrics(self) -> dict[str, float]:
        """What the server counts, and how often it was started again; less of it while it starts."""
        endpoint = self._server.endpoint()
        return {"restarts": float(self._server.restarts)} | (server_metrics(endpoint) if endpoint else {})

    def stop(self) -> None:
        """Ends the server, and returns when nothing of it is left."""
        self._server.stop()


@dataclass(frozen=True)
class ServedEndpoints:
    """Where the servers of some actors are now."""

    actors: tuple[Any, ...]

    def __call__(self) -> Sequence[Endpoint]:
        found, failure = [], None
        for ref in [actor.endpoint.remote() for actor in self.actors]:
            try:
                if endpoint := ray.get(ref, timeout=ASK_ACTOR_S):
                    found.append(endpoint)
            except (RayActorError, GetTimeoutError):
                continue  # Ray starts the actor again
            except RayError as error:
                failure = expected(error, "judge")
        if failure and not found:
            raise failure
        return found


class ActorWatch:
    """Has others make room for actors that Ray starts again: it does not say when it does, and whoever waits for the
    answers of one does not ask."""

    def __init__(self, actors: dict[str, Any]) -> None:
        """Looks until :meth:`close`; ``actors`` by the names that the room knows them by."""
        self._actors, self._over = dict(actors), threading.Event()
        self._thread = threading.Thread(target=self._look, name="judge actors", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns when it looks no more, which must be before the connection to Ray ends."""
        self._over.set()
        self._thread.join(timeout=2 * ASK_ACTOR_S)
        for name in self._actors:
            room.placed(name)

    def _look(self) -> None:
        while self._actors and not self._over.wait(LOOK_AT_ACTORS_EVERY_S):
            asked = {actor.__ray_ready__.remote(): name for name, actor in self._actors.items()}
            for ref in ray.wait(list(asked), num_returns=len(asked), timeout=ASK_ACTOR_S)[0]:
                try:
                    ray.get(ref)
                except ActorUnavailableError:  # Ray starts it again where there is room
                    room.make(asked[ref])
                except RayError:  # it does not come again
                    room.placed(asked[ref])
                    del self._actors[asked[ref]]
                else:
                    room.placed(asked[ref])


class JudgePool:
    """The judge's servers for the length of a run."""

    def __init__(self, config: JudgeServing, logs: Path) -> None:
        """Starts the servers, waits until they are ready, and shows the model a picture.

        Args:
            config: who serves, and how they are asked.
            logs: folder for what servers of the run's own write.

        Raises:
            ConfigError: there is no key in the environment, no environment of the judge, or no vision in the model, or
                the port is taken.
            RewardError: somebody else's server does not answer.
            OmniAlphaError: a server ended or was not ready in time; the message ends with its last lines.
        """
        self._config = config
        self._actors: list[Any] = []
        self._watch: ActorWatch | None = None
        self._endpoints: Endpoints
        try:
            if config.server:
                self._endpoints = self._served(config.server, logs)
            else:
                assert config.external
                self._endpoints = FixedEndpoints((external_endpoint(config.external),))
            self._client(config.first_patience_s).check_vision()
        except BaseException:
            self.close()
            raise

    def asker(self, deadline_s: float = math.inf) -> JudgeClient:
        """A client of the judge, which may be sent to other processes of the cluster. It spreads its questions over the
        servers and finds those that were started again.

        Args:
            deadline_s: longest time that the run waits for whoever asks.
        """
        if self._config.missing == "wait":
            return self._client(self._config.client.patience_s, SHARE * deadline_s)
        return self._client(self._config.client.patience_s)

    def check(self) -> None:
        """
        Raises:
            OmniAlphaError: all servers were given up, and no score may be missing; the message ends with the last lines
                of one.
        """
        if self._config.missing != "drop":
            self._endpoints()

    def metrics(self) -> dict[str, float]:
        """What the servers count (:data:`rewards.judge.server_metrics.METRICS`), summed over them; of a server that
        starts or is lost nothing."""
        if not self._actors:
            pages = [server_metrics(endpoint) for endpoint in self._endpoints()]
        else:
            pages = []
            for ref in [actor.metrics.remote() for actor in self._actors]:
                with contextlib.suppress(RayError, GetTimeoutError):
                    pages.append(ray.get(ref, timeout=ASK_ACTOR_S))
        names = {name for page in pages for name in page}
        return {name: sum(page.get(name, 0.0) for page in pages) for name in sorted(names)}

    def close(self) -> None:
        """Ends the servers of the run's own, and returns when nothing of them is left. To be called before the
        connection to Ray ends; where it is not, they end with their actors."""
        if self._watch:
            self._watch.close()
        stops = [actor.stop.remote() for actor in self._actors]
        ray.wait(stops, num_returns=len(stops), timeout=STOP_S) if stops else None
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
        self._actors = []

    def _client(self, patience_s: float, ends_run_after_s: float | None = None) -> JudgeClient:
        client = self._config.client.model_copy(update={"patience_s": patience_s})
        return JudgeClient(self._endpoints, client, Path(self._config.model).name, ends_run_after_s)

    def _served(self, server: JudgeServerConfig, logs: Path) -> Endpoints:
        # Nobody else knows the name and the key: whoever answers to them is this run's.
        name, key = f"judge-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
        actor = ray.remote(
            num_cpus=server.cpus,
            num_gpus=server.tensor_parallel if server.gpus else 0,
            max_restarts=server.restarts,
            max_concurrency=8,  # questions after the endpoint must not wait behind one that waits for readiness
        )(JudgeActor)
        self._actors = [
            actor.remote(server, name, key, logs / f"judge-{number}.log", number) for number in range(server.replicas)
        ]
        log.info("judge: starting %d servers of %s", server.replicas, server.model)
        # The actors keep the deadline; this one is for Ray, which may have no room for them.
        deadline = server.start_deadline_s * 1.1 + 60.0
        entering = [enter(actor, f"judge-actor-{number}") for number, actor in enumerate(self._actors)]
        for said in wait_all(entering, "judge actors to start", deadline):
            admit(said)
        wait_all([actor.ready.remote() for actor in self._actors], "judge servers to be ready", deadline)
        self._watch = ActorWatch({f"judge-actor-{number}": actor for number, actor in enumerate(self._actors)})
        return ServedEndpoints(tuple(self._actors))


def external_endpoint(config: JudgeUrlConfig) -> Endpoint:
    """Where somebody else's server is, with the key from this process's environment.

    Raises:
        ConfigError: the variable is not set.
    """
    key = None
    if config.key_env and not (key := os.environ.get(config.key_env)):
        raise ConfigError(f"judge: {config.url} needs a key, but the environment variable {config.key_env} is not set")
    return Endpoint(config.url, config.model, key)
