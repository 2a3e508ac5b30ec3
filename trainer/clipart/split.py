"""Which scenes are trained on, and which are held out.

Every sixth combination of colour, shape and direction is never trained on: no clip and no caption
of it enters any stage. Its colour, its shape and its direction are each seen in other company.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import numpy as np

from trainer.clipart.scenes import CALM, COLOURS, DIRECTIONS, SHAPES, Scene, Staging, random_scene

Triple = tuple[str, str, str]

_TRIPLES: Final = tuple(product(COLOURS, SHAPES, DIRECTIONS))


def _held_out(index: int) -> bool:
    colour, rest = divmod(index, len(SHAPES) * len(DIRECTIONS))
    shape, direction = divmod(rest, len(DIRECTIONS))
    return (colour + 2 * shape + direction) % 6 == 0


HELD_OUT: Final[tuple[Triple, ...]] = tuple(
    triple for index, triple in enumerate(_TRIPLES) if _held_out(index)
)
TRAINED: Final[tuple[Triple, ...]] = tuple(t for t in _TRIPLES if t not in HELD_OUT)


def training_scene(rng: np.random.Generator, staging: Staging = CALM) -> Scene:
    """Return a random scene that may be trained on."""
    return random_scene(rng, TRAINED[rng.integers(len(TRAINED))], staging=staging)


def held_out_scene(rng: np.random.Generator) -> Scene:
    """Return a random scene that may not."""
    return random_scene(rng, HELD_OUT[rng.integers(len(HELD_OUT))])
