"""The GPU that a config is estimated for while it is written."""

from __future__ import annotations

from app.domain.cards import Card, choose_card
from trainer.contract.memory_model import gpu_of_memory

SIZES_GIB = (None, 12, 16, 24, 32, 48, 80)
"""GPUs one after the other; None: this machine's."""


class CardChoice:
    """One of the sizes; each GPU is looked for once."""

    def __init__(self) -> None:
        self._place = 0
        self._cards: dict[int, Card | None] = {}

    def next(self) -> None:
        """Take the next size."""
        self._place = (self._place + 1) % len(SIZES_GIB)

    def card(self) -> Card | None:
        """Return the GPU; None: this machine has none. Asking the driver may take a second."""
        place = self._place
        if place not in self._cards:
            size = SIZES_GIB[place]
            card = choose_card(None, None) if size is None else Card(gpu=gpu_of_memory(size))
            self._cards[place] = card
        return self._cards[place]
