"""Taking turns: which of several alternatives an appearance of an item shows."""

from __future__ import annotations

import random

from trainer.core.rng import derive_seed

_SEEDS = 1 << 63


def turn_of(appearance: int, num: int, seed: int, *names: str | int) -> int:
    """Return which of `num` alternatives is shown, from 0.

    Of `num` appearances in a row (0 to num - 1, num to 2·num - 1, …) each alternative has one, in
    an order that is drawn anew. It depends on the arguments alone.
    """
    cycle, place = divmod(appearance, num)
    order = list(range(num))
    random.Random(derive_seed(seed, *names, cycle)).shuffle(order)
    return order[place]


def happens(probability: float, seed: int, *names: str | int) -> bool:
    """Tell whether something of this probability happens; it depends on the arguments alone."""
    return derive_seed(seed, *names) < probability * _SEEDS
