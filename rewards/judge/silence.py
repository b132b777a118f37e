"""How long a judge has said nothing while it was asked: a line in the log now and then, and at last the run's end."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from common.errors import UnansweredError

log = logging.getLogger("omnialpha")

REPORT_EVERY_S = 30.0
LOOK_EVERY_S = 1.0


class Silence:
    """One client's view of its judge. Safe to use from several threads."""

    def __init__(self, judge: str, ends_run_after_s: float = math.inf) -> None:
        """
        Args:
            judge: its name, for messages.
            ends_run_after_s: silence after which nobody waits any longer.
        """
        self._judge, self._limit = judge, ends_run_after_s
        self._lock = threading.Lock()
        self._open = 0
        self._since = self._reported = time.monotonic()
        self._last = "nothing came back yet"
        self._given_up = False
        self._watcher: threading.Timer | None = None

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While a question waits for its answer."""
        with self._lock:
            if not self._open:
                self._since = time.monotonic()
            self._open += 1
            if self._watcher is None:
                self._watch()
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def heard(self) -> None:
        """The judge said something, be it an answer or a refusal."""
        with self._lock:
            self._since, self._given_up = time.monotonic(), False

    def failed(self, reason: str) -> None:
        """An attempt came to nothing; ``reason`` says where and why."""
        with self._lock:
            self._last = reason

    def left_s(self) -> float:
        """Seconds until nobody waits any longer."""
        with self._lock:
            # Questions that come after it was given up may try once: they would wait as long as all before them.
            return 0.0 if self._given_up else max(0.0, self._since + self._limit - time.monotonic())

    def check(self, pause_s: float) -> None:
        """Whether a pause still fits in.

        Raises:
            UnansweredError: it does not; says who was asked, since when, and what came back last.
        """
        if pause_s < self.left_s():
            return
        with self._lock:
            self._given_up = True
            raise UnansweredError(
                f"the judge {self._judge} has {self._words()}; see whether its server runs and can be reached, then "
                "run the same command again to go on from the last commit; judging.missing: drop goes on without "
                "scores, a longer cluster.deadline_s waits longer"
            )

    def _watch(self) -> None:
        self._watcher = threading.Timer(LOOK_EVERY_S, self._look)
        self._watcher.daemon = True
        self._watcher.start()

    def _look(self) -> None:
        with self._lock:
            if not self._open:
                self._watcher = None
                return
            now = time.monotonic()
            if now - max(self._since, self._reported) >= REPORT_EVERY_S:
                self._reported = now
                log.warning("waiting for the judge %s, which has %s", self._judge, self._words())
            self._watch()

    def _words(self) -> str:
        silent = time.monotonic() - self._since
        since = datetime.fromtimestamp(time.time() - silent, UTC).strftime("%H:%M:%S")
        waiting = "1 question waits" if self._open == 1 else f"{self._open} questions wait"
        return f"answered nothing for {silent:.0f} s (since {since} UTC; {waiting}), at last: {self._last}"
