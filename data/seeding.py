"""Seeds as pure functions of names and counters: no generator state travels between processes or checkpoints."""

import hashlib


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, its type and its order.

    ``seed_for(seed, "sample", step, group, member)`` gives the same number in every process and on every platform.

    Raises:
        TypeError: a part is neither int nor str (a float or a bool would hash by its spelling).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"seed_for takes int and str parts, got {part!r}; convert it first")
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)  # lengths keep ("a", "bc") and ("ab", "c") apart
    return int.from_bytes(digest.digest(), "little") >> 1
