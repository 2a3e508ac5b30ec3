"""Random streams without state: every draw is a function of the seed and of a name.

A generator is made anew from (seed, name, numbers…) wherever randomness is needed, so that
resuming needs no saved random state, and a sample gets the same noise on any number of ranks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is loaded by who draws tensors: looking at clips starts without it
    import torch

_MASK = (1 << 63) - 1


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on all arguments and on nothing else."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for one named stream, e.g. `generator(seed, "noise", item)`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *names))
