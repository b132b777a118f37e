"""Sharing work items among learner ranks."""

from collections.abc import Sequence


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Item indices per rank: the dearest item first, each to the rank with the least so far (LPT).

    Deterministic; within a rank, items keep their order. Ranks may stay empty if there are fewer items.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]
