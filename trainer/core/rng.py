"""Random streams without state: every draw is a function of the seed and of a name.

A generator is made anew from (seed, name, numbers…) wherever randomness is needed, so that
resuming needs no saved random state, and a sample gets the same noise on any number of ranks.
"""

from __future__ import annotations

import torch

from trainer.core.seeds import derive_seed

__all__ = ["derive_seed", "generator"]


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator for one named stream, e.g. `generator(seed, "noise", item)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
