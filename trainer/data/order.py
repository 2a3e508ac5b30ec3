"""The order of training: an endless stream of microbatches that is a function of seed and position.

There is no state to save: microbatch n of the stream is the same on every rank, after every resume
and on any number of GPUs. Rank r of W takes microbatches r, r + W, r + 2W, …
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

from trainer.contract.errors import DataError, Problem
from trainer.core.rng import derive_seed
from trainer.data.buckets import Bucket
from trainer.data.items import TrainingItem
from trainer.data.strata import quantile_at
from trainer.data.turns import happens, turn_of

Slot = Sequence[TrainingItem]
"""Items that stand for each other; mostly one."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One appearance of an item."""

    item: TrainingItem
    epoch: int
    """From 0."""
    repeat: int
    """Which of the item's appearances in this epoch, from 0."""
    seed: int
    """Fixes its noise and sigma, whatever rank or batch it lands in."""
    other_context: tuple[Path, str] | None = None
    """File and key of the caption of this appearance; None: the item's own."""
    quantile: float | None = None
    """Where in the distribution its sigma is, in [0, 1); None: drawn independently."""

    @property
    def context(self) -> tuple[Path, str]:
        """File and key of the caption that is shown."""
        return self.other_context or (self.item.context, self.item.context_key)


@dataclass(frozen=True, slots=True)
class Group:
    """The items of one source and one bucket; a microbatch is made of one group."""

    appearances: int
    """Items of one epoch, repeats counted."""
    num_repeats: int
    batch_size: int

    def num_batches(self, factor: int = 1) -> int:
        """Return the microbatches of one epoch, with `num_repeats` multiplied."""
        return -(-self.appearances * factor // self.batch_size)

    @property
    def largest_batch(self) -> int:
        """Items of the largest microbatch."""
        return min(self.appearances, self.batch_size)


class BatchOrder:
    """Microbatches of one source and one bucket each, shuffled anew every epoch.

    In an epoch each item appears exactly `num_repeats` times. What does not fill a batch makes a
    smaller one. Every epoch has the same number of microbatches. Items of one slot count as one,
    and take turns, as the captions of an item do: over as many appearances as there are of them,
    each is shown once.
    """

    def __init__(
        self,
        items: Sequence[TrainingItem],
        seed: int,
        *,
        num_timestep_buckets: int | Literal["epoch"] | None = None,
    ) -> None:
        """Sort the items into groups.

        Args:
            items: of the dataset.
            seed: of the run.
            num_timestep_buckets: equally likely parts of the distribution of sigma that items get
                in turn; `epoch`: as many as an epoch has items; None: sigmas are independent.

        Raises:
            DataError: there are no items.
        """
        if not items:
            raise DataError("the dataset has no items to train on")
        self.items = tuple(items)
        self._seed = seed
        self._buckets = num_timestep_buckets
        groups: dict[tuple[int, Bucket], dict[str, list[TrainingItem]]] = {}
        for item in sorted(items, key=lambda item: item.key):
            slots = groups.setdefault((item.source, item.bucket), {})
            slots.setdefault(item.slot or item.key, []).append(item)
        self._groups = [list(groups[group].values()) for group in sorted(groups)]
        # Not a method: an instance's own cache ends with the instance, and is safe among threads.
        self._epoch = lru_cache(maxsize=2)(self._shuffle)
        self._items_before = lru_cache(maxsize=2)(self._count_before)

    @property
    def groups(self) -> tuple[Group, ...]:
        """What the microbatches are made of."""
        return tuple(
            Group(
                sum(slot[0].num_repeats for slot in group),
                max(slot[0].num_repeats for slot in group),
                group[0][0].batch_size,
            )
            for group in self._groups
        )

    @property
    def batches_per_epoch(self) -> int:
        """Microbatches of one epoch, all ranks together."""
        return sum(group.num_batches() for group in self.groups)

    @property
    def items_per_epoch(self) -> int:
        """Items of one epoch, repeats counted."""
        return sum(group.appearances for group in self.groups)

    @property
    def largest_batch(self) -> int:
        """Items of the largest microbatch."""
        return max(group.largest_batch for group in self.groups)

    def epoch_of(self, position: int) -> int:
        """Return which epoch microbatch `position` belongs to, from 0."""
        return position // self.batches_per_epoch

    def batch(self, position: int) -> tuple[Draw, ...]:
        """Return microbatch `position` of the stream, from 0."""
        epoch, place = divmod(position, self.batches_per_epoch)
        draws = [self._draw(slot, epoch, repeat) for slot, repeat in self._epoch(epoch)[place]]
        if self._buckets is None:
            return tuple(draws)
        items = self.items_per_epoch
        size = items if self._buckets == "epoch" else self._buckets
        first = epoch * items + self._items_before(epoch)[place]
        return tuple(
            replace(draw, quantile=quantile_at(self._seed, number, size))
            for number, draw in enumerate(draws, first)
        )

    def _draw(self, slot: Slot, epoch: int, repeat: int) -> Draw:
        appearance = epoch * slot[0].num_repeats + repeat
        item = slot[0]
        if len(slot) > 1:
            item = slot[turn_of(appearance, len(slot), self._seed, "window", item.slot)]
        seed = derive_seed(self._seed, "item", epoch, item.key, repeat)
        return Draw(item, epoch, repeat, seed, self._caption(item, appearance))

    def _count_before(self, epoch: int) -> list[int]:
        """Return how many items of an epoch come before each of its microbatches."""
        return list(accumulate((len(batch) for batch in self._epoch(epoch)), initial=0))

    def _caption(self, item: TrainingItem, appearance: int) -> tuple[Path, str] | None:
        name = item.slot or item.key
        if item.caption_dropout and happens(
            item.caption_dropout, self._seed, "caption dropout", name, appearance
        ):
            return item.empty_context
        if not item.more_contexts:
            return None
        contexts = item.contexts
        return contexts[turn_of(appearance, len(contexts), self._seed, "caption", name)]

    def _shuffle(self, epoch: int) -> list[list[tuple[Slot, int]]]:
        # Random's shuffle of a seeded generator is the same on every platform and Python 3.
        generator = random.Random(derive_seed(self._seed, "order", epoch))
        batches: list[list[tuple[Slot, int]]] = []
        for group in self._groups:
            size = group[0][0].batch_size
            drawn: list[tuple[Slot, int]] = [
                (slot, repeat) for slot in group for repeat in range(slot[0].num_repeats)
            ]
            generator.shuffle(drawn)
            batches += [drawn[start : start + size] for start in range(0, len(drawn), size)]
        generator.shuffle(batches)
        return batches


def require_full_step(
    order: BatchOrder, *, world_size: int, gradient_accumulation_steps: int
) -> None:
    """Refuse a dataset whose epoch is shorter than one step.

    Raises:
        DataError: with the `num_repeats` that cures it.
    """
    problem = step_problem(
        order.groups,
        world_size=world_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    if problem is not None:
        raise DataError(problem.message, hint=problem.hint)


def step_problem(
    groups: Sequence[Group], *, world_size: int, gradient_accumulation_steps: int
) -> Problem | None:
    """Say what is wrong where an epoch of these groups is shorter than one step."""
    needed = world_size * gradient_accumulation_steps
    batches = sum(group.num_batches() for group in groups)
    if not groups or batches >= needed:
        return None
    repeats = max(group.num_repeats for group in groups)
    factor = 1
    while sum(group.num_batches(factor) for group in groups) < needed:
        factor += 1
    items = sum(group.appearances for group in groups)
    return Problem(
        f"the dataset has {items} items in {batches} batches an "
        f"epoch, fewer than one step takes: {needed} ({world_size} processes x "
        f"gradient_accumulation_steps {gradient_accumulation_steps})",
        "training.gradient_accumulation_steps",
        hint=f"set num_repeats = {repeats * factor} in the dataset, add clips, or lower "
        "training.gradient_accumulation_steps",
    )
