"""The process of one isolated reward term.

Ray puts what a term's ``runtime_env`` brings before everything else on the import path, where a user's ``data/`` would
be imported in place of ours. So this class reaches the process by value, not by import, and before it reads anything of
the user's it imports our packages, with theirs out of reach.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.base import Scores

OURS = ("common", "data", "policy", "rewards", "actors")
"""Packages of this project that a scorer's process uses."""


class ScorerActor:
    """Builds one scorer and scores one group at a time; made into a Ray actor by :mod:`actors.isolation`.

    Nothing in it may name one of our modules outside a function body: see above.
    """

    def __init__(
        self, name: str, source: str, params: dict[str, Any], threads: int, folders: Sequence[str], gpus: float = 0.0
    ) -> None:
        """``folders``: what the runtime_env makes importable besides what Ray unpacks itself."""
        self._name, self._source, self._params = name, source, params
        self._gpus, self._device = gpus, "cpu"
        self._threads, self._folders = threads, folders
        self._scorer: Any = None

    def prepare(self) -> None:
        """Imports our packages; what comes next is :func:`actors.origin.arrive`, and then :meth:`start`."""
        import_ours_first(self._folders)

    def start(self) -> None:
        """Imports and builds the scorer. Not in the constructor, whose errors reach the driver only as text.

        Raises:
            OmniAlphaError: it cannot be found, imported or built.
        """
        import torch

        from actors.devices import own_device
        from common.errors import OmniAlphaError
        from common.role_logs import recording
        from rewards.base import build

        torch.set_num_threads(self._threads)
        self._device = str(own_device(self._gpus))
        try:
            self._scorer = recording("start", build)(self._source, self._params)
        except OmniAlphaError as error:
            raise type(error)(f"reward term {self._name!r}: {error}") from None

    def score(self, pixels: Any, place: int | None = None, cells: int | None = None) -> "Scores":
        """Scores a group, or the group at ``place`` in a list of them; with ``cells`` its contributions too."""
        from common.role_logs import recording
        from rewards.base import reward_batch, run_scorer

        batch = reward_batch(pixels if place is None else pixels[place], self._device)
        return recording("score", run_scorer)(self._name, self._scorer, batch, cells)


def import_ours_first(folders: Sequence[str]) -> None:
    """Imports our packages while what the runtime_env brought is off the import path; later imports find them there."""
    theirs = {*folders, "", os.getcwd()}
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if entry not in theirs and "runtime_resources" not in entry]
    try:
        for name in OURS:
            importlib.import_module(name)
    finally:
        sys.path[:] = path
