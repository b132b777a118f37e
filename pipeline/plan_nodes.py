"""Which actors fit on which node: a table for ``omnialpha plan``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.cluster import PlacementRow

TINY = 1e-9


@dataclass
class Node:
    """A machine and what is reserved on it."""

    name: str
    cpus: float
    gpus: float
    memory_gib: float
    actors: Counter[str] = field(default_factory=Counter)
    """Number of actors placed here, by role."""
    used_cpus: float = 0.0
    used_gpus: float = 0.0

    def room(self, cpus: float, gpus: float) -> bool:
        """Whether one more actor of this size fits."""
        return self.used_cpus + cpus <= self.cpus + TINY and self.used_gpus + gpus <= self.gpus + TINY


def place(rows: Sequence[PlacementRow], nodes: Sequence[Node]) -> Counter[str]:
    """Puts each actor on the first node with room, those that need most first; returns what found none, by role.

    Ray spreads actors as it likes: this says that a placement exists, not where each will be.
    """
    left: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: (row.gpus / row.actors, row.cpus / row.actors), reverse=True):
        cpus, gpus = row.cpus / row.actors, row.gpus / row.actors
        for _ in range(row.actors):
            node = next((node for node in nodes if node.room(cpus, gpus)), None)
            if node is None:
                left[row.role] += 1
                continue
            node.actors[row.role] += 1
            node.used_cpus, node.used_gpus = node.used_cpus + cpus, node.used_gpus + gpus
    return left


def node_table(rows: Sequence[PlacementRow], nodes: Sequence[Node]) -> str:
    """The placement that :func:`place` finds, a line a node."""
    left = place(rows, nodes)
    cells = [("node", "CPUs", "free", "GPUs", "free", "memory", "actors")]
    for node in nodes:
        free = (node.cpus - node.used_cpus, node.gpus - node.used_gpus)
        actors = ", ".join(f"{role} × {number}" for role, number in node.actors.items()) or "none"
        cells.append(
            (
                *(node.name, f"{node.cpus:g}", f"{free[0]:.3g}", f"{node.gpus:g}", f"{free[1]:.3g}"),
                *(f"{node.memory_gib:.1f} GiB", actors),
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines = ["nodes (one placement that fits; memory is not reserved):"]
    lines += [
        "  "
        + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:6], widths[1:], strict=True))])
        + f"  {line[6]}"
        for line in cells
    ]
    lines += [
        f"  no node has room for {number} of {role}: smaller actors, or larger nodes" for role, number in left.items()
    ]
    return "\n".join(lines)
