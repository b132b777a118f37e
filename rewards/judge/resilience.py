"""When a judge's server is asked again, when it is left alone, and what need not be asked at all. Time is passed in."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from PIL import Image

LONGEST_PAUSE_S = 30.0


def pause_s(failures: int, first_s: float, chance: float) -> float:
    """Seconds until the next attempt: doubles with each failure in a row up to 30, and is spread over its upper half,
    so that those who failed together do not come back together.

    Args:
        failures: how many there were in a row, from 1.
        first_s: longest pause after the first.
        chance: a random number in [0, 1).
    """
    # The exponent is bounded because a float has no 2^1024.
    return min(first_s * 2.0 ** min(failures - 1, 60), LONGEST_PAUSE_S) * (0.5 + 0.5 * chance)


class Breaker:
    """Leaves a failing server alone for a while, then lets one question through to see whether it is back.

    closed ──failures in a row──▶ open ──pause over──▶ probing ──succeeded──▶ closed, ──failed──▶ open
    """

    def __init__(self, failures: int, pause_s: float) -> None:
        self._limit, self._pause = failures, pause_s
        self._open_until: float | None = None
        self._probing = False
        self.failures = 0
        """In a row."""

    def admits(self, now: float) -> bool:
        """Whether a question may go out. After the pause the first one asked is told yes: it is the probe, and whoever
        sends it must tell how it went."""
        if self._open_until is None:
            return True
        if self._probing or now < self._open_until:
            return False
        self._probing = True
        return True

    def left_s(self, now: float) -> float:
        """Seconds until a probe may go out; 0 while one is on its way."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    def succeeded(self) -> None:
        """The server answered as it should."""
        self._open_until, self._probing, self.failures = None, False, 0

    def failed(self, now: float) -> bool:
        """The server did not. Returns whether that opened the breaker.

        Failures of questions that were under way when it opened do not prolong its pause.
        """
        self.failures += 1
        if self._probing or (self._open_until is None and self.failures >= self._limit):
            self._open_until, self._probing = now + self._pause, False
            return True
        return False


class AnswerCache:
    """Answers by what was asked; the least recently used one goes first. Safe to use from several threads."""

    def __init__(self, size: int) -> None:
        """``size``: answers that are kept; 0 keeps none."""
        self._size = size
        self._answers: OrderedDict[bytes, Mapping[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Mapping[str, float] | None:
        """The answer, if it is kept."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: bytes, answer: Mapping[str, float]) -> None:
        """Keeps an answer."""
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)


def content_key(text: str, images: Sequence[Image.Image], labels: Sequence[str]) -> bytes:
    """SHA-256 of a question: equal for equal words, pixels and labels, in their order."""
    shapes = [(image.mode, image.size) for image in images]  # tells where one picture's bytes end
    digest = hashlib.sha256(json.dumps([text, list(labels), shapes]).encode())
    for image in images:
        digest.update(image.tobytes())
    return digest.digest()
