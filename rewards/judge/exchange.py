"""One HTTP request to a judge's server, with a deadline that holds whatever the server does."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LONGEST_REPLY = 8 * 2**20
"""Bytes. A judge's answer has some hundred."""
BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that may answer later."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served."""

    url: str
    """``http(s)://host:port``, with a path where the server stands behind one, without ``/v1``."""
    model: str
    """Name under which the server knows it."""
    key: str | None = field(default=None, repr=False)
    """Sent as bearer token; a secret."""


class Unavailable(Exception):
    """No answer now; there may be one later."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        """``after_s``: how long the server asks to be left alone."""
        super().__init__(reason)
        self.after_s = after_s


class WrongAnswer(Exception):
    """An answer that is none."""


class Rejected(Exception):
    """The server refuses this request, and will do so again."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


def exchange(endpoint: Endpoint, path: str, body: Mapping[str, Any] | None, deadline_s: float) -> bytes:
    """The reply to a POST of ``body`` as JSON, or to a GET where it is None.

    Raises:
        Unavailable: nobody listens, the connection broke, the deadline passed, or a status of :data:`BUSY`.
        WrongAnswer: the reply is longer than :data:`LONGEST_REPLY`, or no HTTP.
        Rejected: any other status than 200. Redirects are not followed: the key would go with them.
    """
    connection, began, overdue = _connection(endpoint.url, deadline_s), time.monotonic(), threading.Event()
    watch = None
    try:
        connection.connect()
        # A socket's own timeout begins anew with every byte: only shutting it from outside ends a trickle. The
        # connection lets go of its socket while the reply is still being read: it is remembered here.
        left = began + deadline_s - time.monotonic()
        watch = threading.Timer(max(0.0, left), _cut, (connection.sock, overdue))
        watch.daemon = True
        watch.start()
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        connection.request(method, urlsplit(endpoint.url).path.rstrip("/") + path, data, _headers(endpoint))
        reply = connection.getresponse()
        text = reply.read(LONGEST_REPLY + 1)
        if reply.length and len(text) <= LONGEST_REPLY:  # cut off: http.client says so only where the whole is read
            raise http.client.IncompleteRead(text)
    except (OSError, http.client.HTTPException) as error:
        if overdue.is_set() or isinstance(error, TimeoutError):
            raise Unavailable(f"no answer within {deadline_s:g} s") from None
        if isinstance(error, OSError | http.client.IncompleteRead | http.client.RemoteDisconnected):
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        raise WrongAnswer(f"the reply is no HTTP ({type(error).__name__})") from None
    finally:
        if watch:
            watch.cancel()
        connection.close()
    if overdue.is_set():  # a reply without a length ends where it is cut
        raise Unavailable(f"no answer within {deadline_s:g} s")
    if reply.status in BUSY:
        raise Unavailable(f"status {reply.status}: {_excerpt(text)}", _seconds(reply.getheader("Retry-After")))
    if reply.status != 200:
        raise Rejected(reply.status, _excerpt(text))
    if len(text) > LONGEST_REPLY:
        raise WrongAnswer(f"the reply is longer than {LONGEST_REPLY} bytes")
    return text


def _connection(url: str, deadline_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    assert parts.hostname, url
    return kind(parts.hostname, parts.port, timeout=deadline_s)


def _headers(endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Connection": "close"}
    return headers | ({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})


def _cut(connected: socket.socket, overdue: threading.Event) -> None:
    overdue.set()
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; its other form, a date, is not read."""
    return float(header) if header and header.isascii() and header.isdigit() else 0.0


def _excerpt(text: bytes) -> str:
    """What a server says of a failure, on one line."""
    said: Any = text.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(text)
        said = said["error"]["message"] if "error" in said else said["message"]
    return " ".join(str(said).split())[:300] or "without a word"
