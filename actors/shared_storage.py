"""Whether all nodes see the same storage, asked before any actor loads from it.

driver ──token file──▶ node reads it, leaves an answer beside it ──▶ driver reads the answer
"""

import contextlib
import hashlib
import secrets
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.origin import look
from actors.waiting import wait_all
from common.commit import storage_errors
from common.errors import ActorError, ClusterError

REMEDY = "put it on storage that all nodes mount at the same path, and set {key} to it"


def check_shared_storage(run_dir: Path, dataset: Path, deadline_s: float) -> None:
    """Lets every node that can hold an actor read and answer the driver through ``run_dir``, and compare the files
    at the top of ``dataset``, which may be read-only.

    Raises:
        ClusterError: a node sees another folder than the driver, or none, or cannot write; names node and path.
    """
    nodes = {  # every role reserves CPUs
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    }
    token, digests = secrets.token_hex(16), top_files(dataset)
    question = run_dir / f".shared-{token}"
    answers = {node: run_dir / f".shared-{token}-{node}" for node in nodes}
    try:
        with storage_errors(question):
            question.write_text(token)
        task = ray.remote(num_cpus=0, max_retries=0)(look)
        asked = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                question, answers[node], dataset, list(digests)
            )
            for node in nodes
        ]
        seen = wait_all(asked, "nodes to look at the shared storage", deadline_s)
        for node, found in zip(nodes, seen, strict=True):
            judge_look(nodes[node], token, answers[node], dataset, digests, found)
    except (ActorError, RayError) as error:
        raise ClusterError(f"the shared storage could not be looked at from every node: {error}") from None
    finally:
        for path in (question, *answers.values()):
            with contextlib.suppress(OSError):
                path.unlink()


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
