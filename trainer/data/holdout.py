"""Which clips are for validation: held out of the dataset, or from sources of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.core.rng import derive_seed
from trainer.data.items import TrainingItem

_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdout:
    """Parts a dataset into training and validation, clip by clip.

    A clip is known by its content, so that all its windows, and copies of it in other sources,
    land on the same side. Each clip's side depends on that and on the seed alone: clips that come
    or go do not move the others (but for the one that is taken where chance would take none, and
    the one that is left where it would take all).
    """

    first_source: int
    """Sources from this number on are for validation as a whole."""
    share: float = 0.0
    """Of the clips of the other sources, in [0, 1)."""
    seed: int = 42

    def clips(self, contents: Iterable[str]) -> frozenset[str]:
        """Return which of these clips of the training sources, by content, are held out.

        At least one where `share` is not 0 and there are any; never all of several.
        """
        if not self.share:
            return frozenset()
        places = {content: self._place(content) for content in contents}
        first = sorted(places, key=places.__getitem__)
        taken = sum(place < self.share * _SEEDS for place in places.values())
        return frozenset(first[: max(1, min(taken, len(first) - 1))])

    def split(
        self, items: Sequence[TrainingItem]
    ) -> tuple[tuple[TrainingItem, ...], tuple[TrainingItem, ...]]:
        """Return the items to train on and those to validate on, each in the given order."""
        held = self.clips(item.clip for item in items if item.source < self.first_source)

        def validates(item: TrainingItem) -> bool:
            return item.source >= self.first_source or item.clip in held

        return (
            tuple(item for item in items if not validates(item)),
            tuple(item for item in items if validates(item)),
        )

    def _place(self, content: str) -> int:
        return derive_seed(self.seed, "validation", "split", content)
