"""vLLM servers as processes: how one is started, when it is ready, and starting it again when it ends. No Ray here."""

import contextlib
import logging
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

import actors.judge_guard
from common.config import StrictConfig
from common.errors import ActorError, ConfigError, DeadlineError, OmniAlphaError
from rewards.judge.exchange import Endpoint, Rejected, Unavailable, WrongAnswer, exchange
from rewards.judge.resilience import pause_s
from rewards.judge.shipped import named_judge

log = logging.getLogger("omnialpha")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 0.5
TAIL_LINES = 15
STABLE_S = 60.0
"""A server that was ready for so long starts with a clean record when it ends."""
SILENT_S = 60.0
"""A ready server that does not even name its model for so long is started anew."""
FREED_S = 15.0
"""How long a port may still be held by the server of a run that just ended."""


HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class JudgeServerConfig(StrictConfig):
    """vLLM servers of one model, which the run starts and ends."""

    model: str
    """A model's folder, the name of one that comes with the package (judge-small), or one on the Hugging Face hub; it
    must have vision."""
    python: Path | None = None
    """Interpreter of the judge's environment; None takes .venv-judge beside the environment of the run."""
    replicas: int = Field(1, ge=1)
    """Servers that hold the same model; questions are spread over them."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs (or CPU workers) over which each server splits the model; they must be in one machine."""
    gpus: bool = False
    """Serve on GPUs, ``tensor_parallel`` for each server, in the model's own precision; else on CPUs in float32."""
    cpus: float = Field(1.0, gt=0)
    """Ray CPUs reserved by each server; on CPUs also its threads, at least one."""
    memory_gib: int = Field(1, ge=1)
    """KV cache of a server on CPUs."""
    host: str = "127.0.0.1"
    """Address on which the servers listen. Loopback is for one machine; where the judge may be placed on another one,
    0.0.0.0: questions then need the run's key, but the network sees the pictures."""
    port: int | None = Field(None, ge=1024, le=65535)
    """Port of the first server, the others follow; None takes free ones."""
    start_deadline_s: float = Field(600.0, gt=0)
    """Longest time until a server is ready; large models take long to load."""
    restarts: int = Field(5, ge=0)
    """How often in a row a server is started again without having been ready for a minute."""
    arguments: tuple[str, ...] = ()
    """Further arguments of vLLM's server, for example --max-model-len 4096. They are saved with the run: no secrets."""

    def anchored(self) -> "JudgeServerConfig":
        """With absolute paths: the servers' actors work in another directory."""
        path = named_judge(self.model)
        model = self.model if HUB_NAME.fullmatch(self.model) and not path.exists() else str(path.resolve())
        # Not resolved: an environment's interpreter is a link, and knows its environment by where the link is.
        python = self.python and self.python.expanduser().absolute()
        return self.model_copy(update={"model": model, "python": python})


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def vllm_launch(config: JudgeServerConfig, name: str, port: int, key: str) -> Launch:
    """The command of one vLLM server.

    Args:
        config: of the judge.
        name: under which it is to know the model.
        port: to listen on.
        key: that questions must carry; it goes by the environment, for command lines can be seen by everybody.

    Raises:
        ConfigError: the judge's environment is missing.
    """
    python = config.python or Path(sys.prefix).parent / ".venv-judge" / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"judge server: no interpreter {python}; make it with `make judge-env`, or name another one")
    # Its `vllm` command looks up a package of that name, which the CPU build has not.
    options = ["-m", "vllm.entrypoints.openai.api_server", "--model", config.model, "--served-model-name", name]
    options += ["--host", config.host, "--port", str(port), "--tensor-parallel-size", str(config.tensor_parallel)]
    # Probabilities among the allowed labels; without it they are those before the others are masked.
    options += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "64", "--generation-config", "vllm"]
    options += ["--disable-uvicorn-access-log"]  # a line for each question would fill the disk
    # Ours are not for the server: its Python would take them for its own packages and settings.
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("RAY_")}
    environment |= {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONSAFEPATH": "1"}
    if Path(config.model).is_dir():
        environment |= {"HF_HUB_OFFLINE": "1"}
    if not config.gpus:
        options += ["--enforce-eager", "--dtype", "float32"]
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(config.memory_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, int(config.cpus))),
        }
    return Launch((str(python), *options, *config.arguments), environment)


class GuardedProcess:
    """A command that ends with this process, whatever ends this process."""

    def __init__(self, launch: Launch, log_file: Path) -> None:
        """Starts it; its output is added to ``log_file``."""
        self._guard = subprocess.Popen(
            [sys.executable, "-I", actors.judge_guard.__file__, str(log_file), *launch.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(launch.environment),
            start_new_session=True,
        )
        self._guard.wait()  # the guard itself goes on as nobody's child
        assert self._guard.stdin
        assert self._guard.stdout
        self._alive, self._said = self._guard.stdin, self._guard.stdout
        line = self._said.readline()
        if not line:
            raise ActorError(
                f"judge server: {launch.command[0]} cannot be started; see the worker's log in Ray's folder"
            )
        self.pid = int(line)
        self._code = b""

    def ended(self, within_s: float) -> str | None:
        """How it ended, if it does so in time; its guard may have been killed as well."""
        if not select.select([self._said], [], [], within_s)[0]:
            return None
        self._code = self._code or self._said.readline().strip()
        if not self._code:
            return "its guard was killed"
        code = int(self._code)
        return f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}"

    def stop(self) -> None:
        """Ends it, and returns when nothing of it is left."""
        self._alive.close()
        self._code = self._code or self._said.readline()
        self._said.close()
        if not self._code:  # the guard was killed before it could do it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class JudgeServer:
    """One server, started again when it ends, until :meth:`stop`."""

    def __init__(
        self,
        config: JudgeServerConfig,
        name: str,
        key: str,
        log_file: Path,
        *,
        number: int = 0,
        address: str | None = None,
        launch: Callable[[JudgeServerConfig, str, int, str], Launch] = vllm_launch,
    ) -> None:
        """Starts it; :meth:`wait_ready` waits.

        Args:
            config: of the judge.
            name: under which the server is to know the model. It must tell this run's judge from others.
            key: that questions must carry.
            log_file: what the server writes.
            number: among the replicas.
            address: under which others reach this machine, where the server listens on more than loopback.
            launch: makes the command.
        """
        self._config, self._name, self._key, self._log, self._number = config, name, key, log_file, number
        self._address = config.host if config.host in LOOPBACK or address is None else address
        self._launch = launch
        self._endpoint: Endpoint | None = None
        self._failure: OmniAlphaError | None = None
        self._claim: socket.socket | None = None
        self._stopping, self._settled = threading.Event(), threading.Event()
        self.restarts = 0
        """How often it was started again."""
        log_file.parent.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._run, name=f"judge server {number}", daemon=True)
        self._thread.start()

    def endpoint(self) -> Endpoint | None:
        """Where it answers now; None while it starts.

        Raises:
            OmniAlphaError: it never will.
        """
        if self._failure:
            raise self._failure
        return self._endpoint

    def wait_ready(self) -> None:
        """Returns when it was ready for the first time.

        Raises:
            OmniAlphaError: it ended, or was not ready within ``start_deadline_s``.
        """
        self._settled.wait()
        self.endpoint()

    def stop(self) -> None:
        """Ends it, and returns when nothing of it is left."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._supervise()
        except OmniAlphaError as error:
            self._failure = error
        except Exception as error:  # nobody hears what a thread raises
            self._failure = ActorError(f"judge server {self._number}: {type(error).__name__}: {error}")
        finally:
            self._endpoint = None
            self._settled.set()
            if self._claim:
                self._claim.close()

    def _supervise(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            port = self._port()
            began = time.monotonic()
            process = GuardedProcess(self._launch(self._config, self._name, port, self._key), self._log)
            try:
                self._until_ready(process, port)
                ready = time.monotonic()
                reason = self._until_lost(process)
            except _NotReady as error:
                if not self._settled.is_set():  # it never worked, so it will not the next time either
                    raise DeadlineError(self._told(str(error))) from None
                reason = str(error)
            else:
                failures = 0 if time.monotonic() - ready > STABLE_S else failures
            finally:
                self._endpoint = None
                process.stop()
            if self._stopping.is_set():
                return
            failures += 1
            if failures > self._config.restarts:
                raise ActorError(self._told(f"{reason}, as it did {failures} times in a row"))
            pause = 0.0 if failures == 1 else pause_s(failures - 1, 1.0, random.random())
            lived = time.monotonic() - began
            log.warning("judge server %d: %s after %.0f s; it is started again", self._number, reason, lived)
            self.restarts += 1
            self._stopping.wait(pause)

    def _until_ready(self, process: GuardedProcess, port: int) -> None:
        end = time.monotonic() + self._config.start_deadline_s
        here = "127.0.0.1" if self._config.host == "0.0.0.0" else self._config.host
        asked = Endpoint(_url(here, port), self._name, self._key)
        while not self._stopping.is_set():
            if reason := process.ended(POLL_S):
                raise _NotReady(f"{reason} before it was ready")
            if _answers(asked):
                self._endpoint = Endpoint(_url(self._address, port), self._name, self._key)
                self._settled.set()
                return
            if time.monotonic() > end:
                raise _NotReady(f"it was not ready after {self._config.start_deadline_s:g} s (start_deadline_s)")

    def _until_lost(self, process: GuardedProcess) -> str:
        """Waits for its end; returns how it came."""
        heard = time.monotonic()
        while not self._stopping.is_set():
            if reason := process.ended(POLL_S):
                return reason
            endpoint = self._endpoint
            if endpoint and time.monotonic() - heard > SILENT_S / 4:
                if _answers(endpoint):
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENT_S:
                    return f"it did not answer for {SILENT_S:g} s"
        return "it was stopped"

    def _port(self) -> int:
        """The port to listen on.

        Raises:
            ConfigError: somebody else has it.
        """
        if self._config.port is None:
            with socket.socket() as probe:
                probe.bind((self._config.host, 0))
                return int(probe.getsockname()[1])
        port, end = self._config.port + self._number, time.monotonic() + FREED_S
        while not self._claimed(port) or not _free(self._config.host, port):
            if time.monotonic() > end:
                raise ConfigError(
                    f"judge server {self._number}: port {port} of {self._config.host} is taken, perhaps by another "
                    "run's judge; set another port, or none to take a free one"
                )
            self._stopping.wait(POLL_S)
        return port

    def _claimed(self, port: int) -> bool:
        """Whether no other run of this machine means to use the port: two that look together both see it free.

        The claim is the name of a socket that no file stands for; it goes with this process.
        """
        if self._claim is None:
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0omnialpha-judge-{port}")
            except OSError:
                claim.close()
                return False
            self._claim = claim
        return True

    def _told(self, reason: str) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        tail = "\n  ".join(line[:300] for line in lines).replace(self._key, "***") or "(nothing)"
        return (
            f"judge server {self._number}: {reason}; mend the judge's settings, or see {self._log}, which ends with\n  "
            + tail
        )


class _NotReady(Exception):
    """A server that did not come up."""


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers(endpoint: Endpoint) -> bool:
    """Whether this very model is served there: on a port that two want, another run's server may answer."""
    try:
        return endpoint.model.encode() in exchange(endpoint, "/v1/models", None, SILENT_S / 4)
    except (Unavailable, WrongAnswer, Rejected):
        return False


def _free(host: str, port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
