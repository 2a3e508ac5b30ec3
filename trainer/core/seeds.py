"""Seeds that are functions of a name. Without torch, for those who need no more than a number."""

from __future__ import annotations

import hashlib

_MASK = (1 << 63) - 1


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on all arguments and on nothing else."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK
