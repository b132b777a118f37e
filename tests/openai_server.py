"""A server that speaks the part of vLLM's protocol that a judge needs, and misbehaves on request.

As a program, ``openai_server.py PORT MODEL KEY [MARK [LIVES]]``, it stands where the supervisor expects vLLM. MARK
tells whose it is. With LIVES, a file in which its lives are counted, it ends the first three of them at their third
question, and likes bright pictures.
"""

import base64
import contextlib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageStat

Misbehaviour = Callable[["Handler"], None]


class OpenAIServer(ThreadingHTTPServer):
    """Each character is a token. The answer to every question is the last label, with the probability :attr:`likes`,
    where that does not give a probability for each label."""

    daemon_threads = True

    def __init__(self, port: int = 0, model: str = "judge", key: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.key = model, key
        self.script: list[Misbehaviour | None] = []
        """What is done to the next questions instead of answering them (None: nothing); emptied from the front."""
        self.likes: Callable[[dict[str, Any]], float | list[float]] = lambda body: 0.7
        """Probability of the last label, or of every label, by the question's body."""
        self.asked: list[dict[str, Any]] = []
        """Bodies of all questions, also of those that were not answered."""
        self.most_at_once = self.at_once = 0
        self.delay_s = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: OpenAIServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply({"data": [{"id": self.server.model}]} if self.allowed() else {"error": "no"})
        elif self.path == "/metrics":
            self.send(200, b'# HELP x\nvllm:num_requests_running{engine="0",model_name="m"} 3.0\n')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            self.reply({"error": {"message": "Unauthorized"}}, 401)
        elif self.path == "/tokenize":
            self.reply({"tokens": [ord(letter) for letter in body["prompt"]]})
        else:
            self.question(body)

    def question(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            misbehave = server.script.pop(0) if server.script else None
        try:
            time.sleep(server.delay_s)
            if misbehave:
                misbehave(self)
            else:
                likes, ids = server.likes(body), body["allowed_token_ids"]
                self.reply(told(ids, likes) if isinstance(likes, list) else answer(ids, likes, rest=1 - likes))
        finally:
            with server.lock:
                server.at_once -= 1

    def allowed(self) -> bool:
        return self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def reply(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode())

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)


def answer(ids: list[int], last: float = 0.7, rest: float = 0.3) -> dict[str, Any]:
    """A reply in which the last label has probability ``last`` and the others share ``rest``."""
    return told(ids, [rest / max(1, len(ids) - 1)] * (len(ids) - 1) + [last])


def told(ids: list[int], shares: list[float]) -> dict[str, Any]:
    """A reply with the probability of every label."""
    tops = [
        {"token": f"token_id:{k}", "logprob": math.log(share) if share > 0 else -9999.0}
        for k, share in zip(ids, shares, strict=True)
    ]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": tops}]}}]}


def brightness(body: dict[str, Any], place: int = 0) -> float:
    """Mean of one picture of a question, 0 to 1."""
    data = body["messages"][0]["content"][place]["image_url"]["url"].partition(",")[2]
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return sum(ImageStat.Stat(picture).mean) / (3 * 255)


def brighter(first_place: float = 0.0) -> Callable[[dict[str, Any]], list[float]]:
    """A taste for the brighter one of two pictures, and ``first_place`` more for the first; 0.1 of it for neither."""

    def likes(body: dict[str, Any]) -> list[float]:
        odds = 8 * (brightness(body, 0) - brightness(body, 1)) + first_place
        first = 0.9 / (1 + math.exp(-odds))
        return [first, 0.9 - first, 0.1]

    return likes


def mortal(server: OpenAIServer, lives: str) -> Callable[[dict[str, Any]], float | list[float]]:
    """:func:`brightness`, until in one of the first three lives the third question comes."""
    with open(lives, "a") as file:
        file.write("x")
        life = file.tell()

    def likes(body: dict[str, Any]) -> float:
        if life <= 3 and len(server.asked) >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return brightness(body)

    return likes


def status(code: int, **headers: str) -> Misbehaviour:
    return lambda handler: handler.send(code, b'{"error": {"message": "out of order"}}', **headers)


def says(text: str) -> Misbehaviour:
    return lambda handler: handler.send(200, text.encode())


def hang(handler: Handler) -> None:
    """Half an answer, byte by byte, for ever: each byte begins a socket's timeout anew."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.02)


def hang_up(handler: Handler) -> None:
    """Half an answer, then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[OpenAIServer]:
    """A server in a thread."""
    with OpenAIServer(**settings) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    sys.stdout.write(f"starting {sys.argv[1]} {sys.argv[2]}\n")
    sys.stdout.flush()
    # vLLM's engine, too, is a process of its own, and ignores polite requests while it computes.
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    with OpenAIServer(int(sys.argv[1]), sys.argv[2], sys.argv[3]) as served:
        if sys.argv[5:]:
            served.likes = mortal(served, sys.argv[5])
        served.serve_forever()
