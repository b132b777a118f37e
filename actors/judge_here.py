"""A judge for the length of a command that has no cluster: its servers are processes of this one."""

import contextlib
import logging
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from actors.judge import JudgeServing, external_endpoint
from actors.judge_server import JudgeServer, JudgeServerConfig
from rewards.judge.client import FixedEndpoints, JudgeClient
from rewards.judge.exchange import Endpoint

log = logging.getLogger("omnialpha")


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
        if config.server:
            found = _served(config.server, servers)
        else:
            assert config.external
            found = (external_endpoint(config.external),)
        first = config.client.model_copy(update={"patience_s": config.first_patience_s})
        JudgeClient(FixedEndpoints(found), first).check_vision()
        yield JudgeClient(FixedEndpoints(found), config.client, Path(config.model).name)


def _served(config: JudgeServerConfig, servers: contextlib.ExitStack) -> tuple[Endpoint, ...]:
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
    return tuple(endpoint for server in started if (endpoint := server.endpoint()))
