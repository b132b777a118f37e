"""A judge for the length of a command that has no cluster: its servers are processes of this one.

A server that is started again listens on another port. Whoever asks may be a child of the command: where the servers
are now stands in a file, which this process keeps true.
"""

import contextlib
import json
import logging
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.judge import JudgeServing, external_endpoint
from actors.judge_server import POLL_S, JudgeServer, JudgeServerConfig
from common.commit import write_atomic
from common.errors import ActorError, OmniAlphaError
from rewards.judge.client import Endpoints, FixedEndpoints, JudgeClient
from rewards.judge.exchange import Endpoint

log = logging.getLogger("omnialpha")

PLACES = "places.json"


@dataclass(frozen=True)
class EndpointsOnFile:
    """Where the command's servers are now, as :func:`_keep_true` wrote it."""

    path: Path
    model: str
    key: str = field(repr=False)
    """Not in the file: a secret."""

    def __call__(self) -> Sequence[Endpoint]:
        said = json.loads(self.path.read_text())
        if said["failure"] and not said["urls"]:
            raise ActorError(said["failure"])
        return [Endpoint(url, self.model, self.key) for url in said["urls"]]


@contextlib.contextmanager
def judge_here(config: JudgeServing) -> Iterator[JudgeClient]:
    """A client of the judge, which may be sent to processes of this machine. What the servers wrote is kept if the
    command fails.

    Raises:
        ConfigError: there is no model or no vision in it, no key, no environment of the judge, or the port is taken.
        RewardError: somebody else's server does not answer.
        OmniAlphaError: a server ended or was not ready in time; the message ends with its last lines.
    """
    config.check()
    with contextlib.ExitStack() as servers:
        found: Endpoints
        if config.server:
            found = _served(config.server, servers)
        else:
            assert config.external
            found = FixedEndpoints((external_endpoint(config.external),))
        first = config.client.model_copy(update={"patience_s": config.first_patience_s})
        JudgeClient(found, first).check_vision()
        yield JudgeClient(found, config.client, Path(config.model).name)


def _served(config: JudgeServerConfig, servers: contextlib.ExitStack) -> EndpointsOnFile:
    logs = Path(tempfile.mkdtemp(prefix="omnialpha-judge-"))
    servers.push(lambda kind, *_: None if kind else shutil.rmtree(logs))
    name, key = f"judge-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
    log.info("judge: starting %d servers of %s", config.replicas, config.model)
    started = []
    for number in range(config.replicas):
        started.append(JudgeServer(config, name, key, logs / f"judge-{number}.log", number=number))
        servers.callback(started[-1].stop)
    for server in started:
        server.wait_ready()
    _write_places(logs / PLACES, started)
    ended = threading.Event()
    watcher = threading.Thread(
        target=_keep_true, args=(logs / PLACES, started, ended), name="judge places", daemon=True
    )
    watcher.start()
    servers.callback(watcher.join)
    servers.callback(ended.set)
    return EndpointsOnFile(logs / PLACES, name, key)


def _keep_true(path: Path, servers: Sequence[JudgeServer], ended: threading.Event) -> None:
    while not ended.wait(POLL_S):
        _write_places(path, servers)


def _write_places(path: Path, servers: Sequence[JudgeServer]) -> None:
    """Writes where the servers answer now, and why one never will again, where that is new."""
    urls, failure = [], ""
    for server in servers:
        try:
            if endpoint := server.endpoint():
                urls.append(endpoint.url)
        except OmniAlphaError as error:
            failure = str(error)
    text = json.dumps({"urls": urls, "failure": failure})
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)
