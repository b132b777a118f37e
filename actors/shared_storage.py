"""Whether all nodes see the same storage, asked before any actor loads from it.

driver ──token file──▶ node reads it, leaves an answer beside it ──▶ driver reads the answer
"""

import contextlib
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.origin import answer_of, look
from actors.waiting import wait_all
from common.commit import storage_errors
from common.errors import ActorError, ClusterError

REMEDY = "put it on storage that all nodes mount at the same path, and set {key} to it"


@dataclass(frozen=True)
class Question:
    """What a node is asked when an actor starts there; travels with the question to the actor."""

    path: Path
    """The token file in the run folder."""
    dataset: Path
    names: tuple[str, ...]
    """Files at the top of the dataset."""
    known: frozenset[str]
    """Nodes that need not answer any more."""


class SharedStorage:
    """The run folder and the dataset, about which every node is asked once: those that are there by :meth:`check`,
    those that join later when the first actor starts there."""

    def __init__(self, run_dir: Path, dataset: Path) -> None:
        """
        Raises:
            StorageError: the driver itself cannot write into the run folder.
        """
        self._folder, self._dataset, self._digests = run_dir, dataset, top_files(dataset)
        self._token, self._known = secrets.token_hex(16), frozenset[str]()
        for left in run_dir.glob(".shared-*"):  # by a driver that was killed
            left.unlink(missing_ok=True)
        self._question = run_dir / f".shared-{self._token}"
        with storage_errors(self._question):
            self._question.write_text(self._token)

    def close(self) -> None:
        """Removes the question, and answers that nobody took."""
        for path in self._folder.glob(f"{self._question.name}*"):
            with contextlib.suppress(OSError):
                path.unlink()

    @property
    def question(self) -> Question:
        """For the next actor that starts."""
        return Question(self._question, self._dataset, tuple(self._digests), self._known)

    def check(self, deadline_s: float) -> None:
        """Lets every node that can hold an actor read and answer the driver through the run folder, and compare the
        files at the top of the dataset, which may be read-only.

        Raises:
            ClusterError: a node sees another folder than the driver, or none, or cannot write; names node and path.
        """
        nodes = {  # every role reserves CPUs
            node["NodeID"]: node["NodeManagerAddress"]
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) > 0
        }
        asked = self.question
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        try:
            looking = [
                task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                    asked.path, answer_of(asked.path, node), asked.dataset, asked.names
                )
                for node in nodes
            ]
            seen = wait_all(looking, "nodes to look at the shared storage", deadline_s)
        except (ActorError, RayError) as error:
            raise ClusterError(f"the shared storage could not be looked at from every node: {error}") from None
        for node, found in zip(nodes, seen, strict=True):
            self.judge(node, nodes[node], found)

    def judge(self, node: str, address: str, found: dict[str, Any]) -> None:
        """Takes a node's answer.

        Raises:
            ClusterError: as :meth:`check`.
        """
        answer = answer_of(self._question, node)
        judge_look(address, self._token, answer, self._dataset, self._digests, found)
        self._known |= {node}
        with contextlib.suppress(OSError):
            answer.unlink()


def check_shared_storage(run_dir: Path, dataset: Path, deadline_s: float) -> None:
    """Asks all nodes that are there; raises as :meth:`SharedStorage.check`."""
    with contextlib.closing(SharedStorage(run_dir, dataset)) as storage:
        storage.check(deadline_s)


def top_files(folder: Path) -> dict[str, str]:
    """Digests of the JSON files at the top of a folder, by name: a dataset's manifest, with those of the rest."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.json"))}


def judge_look(
    address: str, token: str, answer: Path, dataset: Path, digests: dict[str, str], found: dict[str, Any]
) -> None:
    """Compares what a node saw with what is there.

    Raises:
        ClusterError: it differs.
    """
    folder = answer.parent
    if found["token"] != token or found["error"]:
        reason = found["error"] or "another folder is there"
        raise ClusterError(
            f"node {address} does not share {folder} with the driver ({reason}); {REMEDY.format(key='run_dir')}"
        )
    try:
        said = answer.read_text()
    except OSError:
        said = ""
    if said != token:
        raise ClusterError(
            f"node {address} does not share {folder} with the driver (what the node wrote there did not arrive); "
            f"{REMEDY.format(key='run_dir')}"
        )
    if odd := [name for name, digest in digests.items() if found["files"].get(name) != digest]:
        raise ClusterError(
            f"node {address} does not see the driver's dataset {dataset} ({odd[0]} is missing or differs there); "
            f"{REMEDY.format(key='dataset')}"
        )
