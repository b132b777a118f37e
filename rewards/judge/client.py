"""Asks a judge that a server holds, over the OpenAI chat-completions protocol as vLLM speaks it.

vLLM alone: ``allowed_token_ids`` keeps the answer to the labels, ``/tokenize`` tells their tokens, and the server must
run with ``--logprobs-mode processed_logprobs``, so that the probabilities are those among the labels.
"""

import base64
import io
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image
from pydantic import Field

from common.config import StrictConfig
from common.errors import ConfigError, RewardError
from rewards.judge.asking import checked
from rewards.judge.exchange import Endpoint, Rejected, Unavailable, WrongAnswer, exchange
from rewards.judge.resilience import AnswerCache, Breaker, content_key, pause_s
from rewards.judge.silence import Silence

log = logging.getLogger("omnialpha")

REFRESH_S = 1.0
"""How often those who wait look for servers that came back."""

Value = TypeVar("Value")
Endpoints = Callable[[], Sequence[Endpoint]]
"""Tells where the model is served now; nowhere while its servers start. Raises an OmniAlphaError where none ever will
be. Picklable, so that a client can be sent to other processes."""


class JudgeClientConfig(StrictConfig):
    """How a judge is asked."""

    concurrency: int = Field(8, ge=1)
    """Questions of one client that may be on their way at once, over all servers."""
    deadline_s: float = Field(60.0, gt=0)
    """Longest wait for one reply; then the question is sent again."""
    patience_s: float = Field(600.0, ge=0)
    """How long a question waits for a server that is busy, restarts or does not answer, all attempts together; then
    its score is missing. Where a restart fits in, a judge that dies loses no score; 0 waits for nothing. A run with
    ``judging.missing: wait`` waits as long as the judge says anything at all."""
    attempts: int = Field(3, ge=1)
    """How often a question may get an answer that is none (garbage, no choice, no probability) before its score is
    missing."""
    backoff_s: float = Field(0.5, gt=0)
    """Longest pause before the second attempt; it doubles with each further one, up to 30 s."""
    breaker_failures: int = Field(5, ge=1)
    """Failures of a server in a row after which it is left alone."""
    breaker_pause_s: float = Field(5.0, gt=0)
    """How long; then one question tries it."""
    cache: int = Field(4096, ge=0)
    """Answers that are kept; the same question is then not sent again."""


@dataclass(frozen=True)
class FixedEndpoints:
    """Servers that stay where they are."""

    endpoints: tuple[Endpoint, ...]

    def __call__(self) -> Sequence[Endpoint]:
        return self.endpoints


@dataclass(eq=False)
class _Server:
    endpoint: Endpoint
    breaker: Breaker
    busy: int = 0


class JudgeClient:
    """Answers by asking servers that hold the same model; an :class:`rewards.judge.asking.Asker`.

    Safe to use from several threads. Pickled, it loses its cache and what it knows of the servers' state.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        config: JudgeClientConfig,
        name: str = "judge",
        ends_run_after_s: float | None = None,
    ) -> None:
        """
        Args:
            endpoints: where the model is served.
            config: how it is asked.
            name: what the judge is called in reports.
            ends_run_after_s: waits for answers without regard to ``config.patience_s``, until the judge has said
                nothing for so long; None lets scores be missing.
        """
        self.name, self.concurrency = name, config.concurrency
        self._endpoints, self._config, self._ends_run_after_s = endpoints, config, ends_run_after_s
        self._patience = config.patience_s if ends_run_after_s is None else math.inf
        self._silence = Silence(name, math.inf if ends_run_after_s is None else ends_run_after_s)
        self._cache = AnswerCache(config.cache)
        self._ids: dict[str, tuple[int, ...]] = {}
        self._servers: list[_Server] = []
        self._look_at = 0.0
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(config.concurrency)

    def __reduce__(self) -> Any:
        return JudgeClient, (self._endpoints, self._config, self.name, self._ends_run_after_s)

    def ask(self, text: str, images: Sequence[Image.Image], labels: Sequence[str]) -> Mapping[str, float]:
        """Probability of each label as the answer's only token; they sum to 1.

        Args:
            text: the question.
            images: shown before it.
            labels: each a single token of the model.

        Raises:
            ConfigError: a label is not a single token.
            RewardError: no answer can be had; says why.
            UnansweredError: the judge said nothing for ``ends_run_after_s``.
        """
        key = content_key(text, images, labels)
        if (known := self._cache.get(key)) is not None:
            return known
        ids = self.label_ids(labels)
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
        body = {
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            "max_tokens": 1,
            "allowed_token_ids": ids,
            "logprobs": True,
            "top_logprobs": len(ids),
            "return_tokens_as_token_ids": True,
            # The model's own distribution: nothing that its folder or the server may set for sampling.
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        answer = self._send("/v1/chat/completions", body, lambda reply: probabilities(reply, labels, ids))
        self._cache.put(key, answer)
        return answer

    def label_ids(self, labels: Sequence[str]) -> list[int]:
        """The token of each label.

        Raises:
            ConfigError: one is not a single token, or two are the same.
            RewardError: the server cannot be asked.
        """
        several = [label for label in labels if self.tokens(label) != 1]
        ids = [self._tokenized(label)[0] for label in labels if label not in several]
        if several or len(set(ids)) < len(ids):
            raise ConfigError(
                f"judge: the labels {', '.join(labels)} must each be a token of their own for the served model"
                + (f", but {', '.join(map(repr, several))} is none; " if several else ", but two are the same; ")
                + "choose others in the template, digits or single letters"
            )
        return ids

    def tokens(self, text: str) -> int:
        """Number of tokens of a text, as the served model counts them."""
        return len(self._tokenized(text))

    def check_vision(self) -> None:
        """Shows the model a picture.

        Raises:
            ConfigError: it takes none.
            RewardError: no server answers.
        """
        try:
            self.ask("Is this picture empty?", [Image.new("RGB", (64, 64), "grey")], ("0", "1"))
        except _Misplaced as error:
            raise ConfigError(f"{error}; it was shown a picture: serve a model with vision") from None

    def _tokenized(self, text: str) -> tuple[int, ...]:
        if text not in self._ids:
            body = {"prompt": text, "add_special_tokens": False}
            self._ids[text] = self._send("/tokenize", body, _token_ids)
        return self._ids[text]

    def _send(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], Value]) -> Value:
        """What ``read`` makes of the reply, however many attempts it takes.

        Raises:
            RewardError: the question is refused, or attempts or patience are used up.
        """
        with self._places, self._silence.asking():
            until, failures, wrong, reason = time.monotonic() + self._patience, 0, 0, "no server is ready"
            while True:
                server, at_least = self._admitted(until, reason), 0.0
                try:
                    deadline = min(self._config.deadline_s, max(REFRESH_S, self._silence.left_s()))
                    reply = exchange(server.endpoint, path, {"model": server.endpoint.model, **body}, deadline)
                    value = read(reply)
                except Rejected as error:
                    self._release(server, good=True)
                    self._silence.heard()
                    kind = _Misplaced if error.status in (400, 422) else RewardError
                    raise kind(f"judge: the server at {server.endpoint.url} answered {error}") from None
                except Unavailable as error:
                    reason, at_least = f"{server.endpoint.url}: {error}", error.after_s
                except WrongAnswer as error:
                    self._silence.heard()
                    reason, wrong = str(error), wrong + 1
                except BaseException:  # whatever it is, a probe must not stay out for ever
                    self._release(server, good=False)
                    raise
                else:
                    self._release(server, good=True)
                    self._silence.heard()
                    return value
                self._release(server, good=False)
                failures += 1
                if wrong >= self._config.attempts:
                    raise RewardError(
                        f"the judge at {server.endpoint.url} gave {wrong} answers that are none, the last one: {reason}"
                        "; is it vLLM with --logprobs-mode processed_logprobs?"
                    )
                log.debug("judge: %s; asked again", reason)
                pause = max(at_least, pause_s(failures, self._config.backoff_s, random.random()))
                self._pause(pause, until, reason)

    def _admitted(self, until: float, reason: str) -> _Server:
        """The server to ask, counted as busy: one that does not fail if there is one, with the fewest questions."""
        while True:
            self._look()
            now = time.monotonic()
            with self._lock:
                for server in sorted(self._servers, key=lambda server: (server.breaker.failures > 0, server.busy)):
                    if server.breaker.admits(now):
                        server.busy += 1
                        return server
                pauses = [server.breaker.left_s(now) or REFRESH_S for server in self._servers]
            self._pause(min([*pauses, REFRESH_S]), until, reason)

    def _pause(self, seconds: float, until: float, reason: str) -> None:
        self._silence.failed(reason)
        self._silence.check(seconds)
        if time.monotonic() + seconds > until:
            raise self._out_of_patience(reason)
        time.sleep(seconds)

    def _look(self) -> None:
        """Asks where the servers are, now and then, and at once after a failure: a restart may have moved one."""
        with self._lock:
            failing = any(server.breaker.failures for server in self._servers)
            if self._servers and not failing and time.monotonic() < self._look_at:
                return
        found, config = self._endpoints(), self._config
        with self._lock:
            known = {server.endpoint: server for server in self._servers}
            new = {e: _Server(e, Breaker(config.breaker_failures, config.breaker_pause_s)) for e in found}
            self._servers = [known.get(endpoint, new[endpoint]) for endpoint in found]
            self._look_at = time.monotonic() + REFRESH_S

    def _release(self, server: _Server, good: bool) -> None:
        with self._lock:
            server.busy -= 1
            if good:
                server.breaker.succeeded()
            elif server.breaker.failed(time.monotonic()):
                log.warning("the judge at %s fails; it is left alone for a while", server.endpoint.url)

    def _out_of_patience(self, reason: str) -> RewardError:
        return RewardError(
            f"the judge did not answer within {self._config.patience_s:g} s (patience_s), at last because: {reason}; "
            "see the servers' logs, or give them longer"
        )


class _Misplaced(RewardError):
    """The server takes the question itself for a mistake."""


def data_url(image: Image.Image) -> str:
    """A picture as a PNG in a URL, to the bit."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def probabilities(reply: bytes, labels: Sequence[str], ids: Sequence[int]) -> dict[str, float]:
    """Probability of each label, from a reply whose tokens are named ``token_id:N``.

    Raises:
        WrongAnswer: the reply holds no such thing.
    """
    try:
        first = json.loads(reply)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = {top["token"]: math.exp(top["logprob"]) for top in first}
        return checked({label: found[f"token_id:{k}"] for label, k in zip(labels, ids, strict=True)}, labels)
    except RewardError as error:
        raise WrongAnswer(str(error)) from None
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise WrongAnswer(f"no probabilities of the labels in {_start(reply)} ({type(error).__name__})") from None


def _token_ids(reply: bytes) -> tuple[int, ...]:
    try:
        ids = json.loads(reply)["tokens"]
        if not ids or not all(type(token) is int for token in ids):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise WrongAnswer(f"no token ids in {_start(reply)}") from None
    return tuple(ids)


def _start(reply: bytes) -> str:
    text = " ".join(reply[:400].decode(errors="replace").split())
    return repr(text[:160])
