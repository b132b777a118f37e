"""Whether the cluster is large enough: waited for before anything starts, and looked at again when the actors of a role
find no place, because a node is gone.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.autoscaler.sdk import request_resources

from actors.cluster import PlacementRow, check_cluster
from actors.waiting import REPORT_EVERY_S
from common.errors import PlacementError

log = logging.getLogger("omnialpha")

LOOK_EVERY_S = 1.0


class Room:
    """What the run's actors reserve, and for how long their cluster may be too small."""

    def __init__(self) -> None:
        self._rows: tuple[PlacementRow, ...] = ()
        self._wait = 0.0
        self._short_since: float | None = None
        self._said_at = self._looked_at = 0.0
        self._lock = threading.Lock()
        self._guests: list[weakref.WeakMethod[Any]] = []
        self._missing: set[str] = set()

    @contextmanager
    def kept(self, rows: Sequence[PlacementRow], wait_s: float) -> Iterator[None]:
        """From here on :meth:`look` compares the connected cluster with ``rows``."""
        self._rows, self._wait, self._short_since, self._looked_at = tuple(rows), wait_s, None, 0.0
        try:
            yield
        finally:
            self._rows, self._guests, self._missing = (), [], set()

    def welcome(self, send_away: Callable[[], None]) -> None:
        """Takes in how to be rid of actors that work only where nobody else needs their room: a method, whose object
        may go."""
        self._guests.append(weakref.WeakMethod(send_away))

    def make(self, who: str) -> None:
        """Called by whoever starts an actor in place of one that was lost, for which guests go at once: on a cluster
        that has become smaller it would wait for their room. They stay away until :meth:`placed`."""
        self._missing.add(who)
        for guests in self._guests:
            if send_away := guests():
                send_away()

    def placed(self, who: str) -> None:
        """``who`` has room, or needs none any more."""
        self._missing.discard(who)

    @property
    def short(self) -> bool:
        """Whether somebody who was lost has no place yet: no time for guests."""
        return bool(self._missing)

    def look(self) -> None:
        """Called again and again by whoever waits for actors to be placed; asks the cluster once a second at most.

        Raises:
            PlacementError: the cluster has been too small for longer than ``wait_s``.
        """
        with self._lock:
            now = time.monotonic()
            if not self._rows or now - self._looked_at < LOOK_EVERY_S:
                return
            self._looked_at = now
            try:
                check_cluster(self._rows)
            except PlacementError as error:
                self._short(now, error)
            else:
                self._short_since = None

    def _short(self, now: float, error: PlacementError) -> None:
        if self._short_since is None:
            self._short_since, self._said_at = now, now - REPORT_EVERY_S
        if (waited := now - self._short_since) >= self._wait:
            advice = f"after {waited:.0f} s" if self._wait else "see cluster.wait_s for clusters that grow"
            raise PlacementError(f"{error} ({advice})") from None
        if now - self._said_at >= REPORT_EVERY_S:
            self._said_at = now
            log.info("waiting for a larger cluster: %s; %.0f of %.0f s", error, waited, self._wait)

    def wait(self, wanted: Callable[[], None]) -> None:
        """Waits until the cluster is large enough, and has its autoscaler know what is asked for.

        Args:
            wanted: raises where the wait is to end.

        Raises:
            PlacementError: it was not within ``wait_s``.
        """
        self.look()
        if self._short_since is None:
            return
        each = [({"CPU": row.cpus / row.actors, "GPU": row.gpus / row.actors}, row.actors) for row in self._rows]
        request_resources(bundles=[{k: v for k, v in one.items() if v} for one, count in each for _ in range(count)])
        try:
            while self._short_since is not None:
                wanted()
                time.sleep(LOOK_EVERY_S / 2)
                self.look()
        finally:
            request_resources(bundles=[])
        log.info("the cluster is large enough")


room = Room()
"""Of the run: there is one at a time, as there is one connection to Ray."""
