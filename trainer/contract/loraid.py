"""LORAID: disjoint parts of a transformer for numbered LoRAs, the same parts in every run.

The network is cut into units. N slots share the units out among themselves, so that LoRAs of
different slots never write to the same matrix: merged together they do not overwrite each other.
How many blocks there are is told by the model; nothing here knows a number of them.

B blocks of U units make T = B·U. Unit u = U·b + s is part s of block b. Slots are k = 1 … N.

`contiguous`: slot k owns the units ⌊(k−1)·T/N⌋ … ⌊k·T/N⌋ − 1, for every N from 1 to T.
`spread`: every slot gets as many units as the others, from all depths. N divides B: unit (b, s)
belongs to slot 1 + ((b + 3·s) mod N). N = m·B where m divides U: to slot
1 + m·((b + 3·⌊s/m⌋) mod B) + (s mod m). There is no such allocation for another N.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic import Field

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.options import Options

Granularity = Literal["pair", "block", "module", "linear"]
Allocation = Literal["contiguous", "spread"]

_SELF = tuple(f"self_attn.{name}" for name in "qkvo")
_CROSS = tuple(f"cross_attn.{name}" for name in "qkvo")
_IMAGE = ("cross_attn.k_img", "cross_attn.v_img")
_FEED_FORWARD = ("ffn.0", "ffn.2")
_ALL = (*_SELF, *_CROSS, *_IMAGE, *_FEED_FORWARD)
_UNITS: dict[Granularity, tuple[tuple[str, ...], ...]] = {
    "pair": (
        ("self_attn.q", "self_attn.k"),
        ("self_attn.v", "self_attn.o"),
        ("cross_attn.q", "cross_attn.k", "cross_attn.k_img"),
        ("cross_attn.v", "cross_attn.o", "cross_attn.v_img"),
        ("ffn.0",),
        ("ffn.2",),
    ),
    "block": (_ALL,),
    "module": (_SELF, (*_CROSS, *_IMAGE), _FEED_FORWARD),
    "linear": tuple((name,) for name in _ALL),
}
_STRIDE = 3
"""Blocks between the parts of a slot in `spread`: parts of different kind lie at other depths."""
_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,3})\.(.+)")
_KEY = "adapter.loraid"
_LONGEST_RANGE = 10_000


class LoraidOptions(Options):
    """Train one numbered part of the network, so that LoRAs of other parts can be merged with it.

    See docs/loraid.md. What `include` and `exclude` choose is narrowed to the slot.
    """

    slot: int = Field(ge=1)
    """Number of the part that is trained, from 1."""
    slots: int = Field(ge=1)
    """How many parts the network is cut into. The same for all LoRAs that are to be merged."""
    granularity: Granularity = "pair"
    """What is dealt out whole: six groups of one or two linear layers a block (`pair`), whole
    blocks, modules (self-attention, cross-attention, feed-forward) or single linear layers."""
    allocation: Allocation = "contiguous"
    """`contiguous`: neighbouring units; `spread`: every slot sees all depths and kinds of layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Which unit of a model belongs to which slot.

    Raises:
        ConfigError: there is no such allocation; the hint names the numbers of slots there are.
    """

    num_blocks: int
    slots: int
    granularity: Granularity = "pair"
    allocation: Allocation = "contiguous"
    image: bool = False
    """The model has an image branch (`k_img` and `v_img`: Wan 2.1 image to video)."""

    def __post_init__(self) -> None:
        legal = legal_slots(self.num_blocks, self.granularity, self.allocation, image=self.image)
        if self.slots in legal:
            return
        hint = f"use {', '.join(map(str, legal))}"
        if self.allocation == "contiguous":
            hint = (
                f"use 1 to {self.num_units}" if self.num_units else "there is nothing to deal out"
            )
        elif 1 <= self.slots <= self.num_units:
            hint += '; allocation = "contiguous" takes any number'
        raise ConfigError(
            f"{self.num_blocks} blocks cannot be dealt out to {self.slots} slots "
            f"({self.granularity}, {self.allocation})",
            hint=hint,
        )

    @property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """The units of a block, each the names of its linear layers inside the block."""
        return block_units(self.granularity, image=self.image)

    @property
    def num_units(self) -> int:
        """T: units of the whole model."""
        return self.num_blocks * len(self.parts)

    def units(self, slot: int) -> tuple[int, ...]:
        """Return the units of a slot, ascending.

        Raises:
            ConfigError: there is no such slot.
        """
        if not 1 <= slot <= self.slots:
            raise ConfigError(
                f"there is no slot {slot} of {self.slots}", hint=f"use 1 to {self.slots}"
            )
        return _units_by_slot(self)[slot - 1]

    def modules(self, slot: int) -> tuple[str, ...]:
        """Return the canonical names of a slot's linear layers, by block.

        Raises:
            ConfigError: there is no such slot.
        """
        return tuple(name for unit in self.units(slot) for name in self.modules_of_unit(unit))

    def modules_of_unit(self, unit: int) -> tuple[str, ...]:
        """Return the canonical names of a unit's linear layers."""
        block, part = divmod(unit, len(self.parts))
        return tuple(f"blocks.{block}.{name}" for name in self.parts[part])

    def slot_of(self, module: str) -> int | None:
        """Return the slot that owns a linear layer; None: it is not one of the blocks'."""
        return _slot_by_module(self).get(module)


def block_units(granularity: Granularity, *, image: bool = False) -> tuple[tuple[str, ...], ...]:
    """Return the units of one block, each the names of its linear layers inside the block."""
    units = _UNITS[granularity]
    if not image:
        units = tuple(tuple(name for name in unit if name not in _IMAGE) for unit in units)
    return tuple(unit for unit in units if unit)


def legal_slots(
    num_blocks: int, granularity: Granularity, allocation: Allocation, *, image: bool = False
) -> tuple[int, ...]:
    """Return the numbers of slots that an allocation exists for, ascending."""
    per_block = len(block_units(granularity, image=image))
    if allocation == "contiguous":
        return tuple(range(1, num_blocks * per_block + 1))
    whole = {count for count in range(1, num_blocks + 1) if num_blocks % count == 0}
    parts = {m * num_blocks for m in range(1, per_block + 1) if per_block % m == 0}
    return tuple(sorted(whole | parts))


def partition_of(options: LoraidOptions, names: Iterable[str]) -> Partition:
    """Return the partition of a model that has linear layers of these canonical names.

    Raises:
        ConfigError: the options do not fit the model; with the key of what does not.
    """
    blocks: set[int] = set()
    image = False
    for name in names:
        if (match := _BLOCK.fullmatch(name)) is not None:
            blocks.add(int(match[1]))
            image = image or match[2] in _IMAGE
    return partition_for(options, num_blocks=max(blocks, default=-1) + 1, image=image)


def partition_for(options: LoraidOptions, *, num_blocks: int, image: bool) -> Partition:
    """Return the partition of a model of this many blocks.

    Raises:
        ConfigError: the options do not fit the model; with the key of what does not.
    """
    if options.slot > options.slots:
        raise ConfigError(problems=[beyond(options)])
    try:
        return Partition(
            num_blocks=num_blocks,
            slots=options.slots,
            granularity=options.granularity,
            allocation=options.allocation,
            image=image,
        )
    except ConfigError as error:
        raise ConfigError(
            problems=[Problem(error.message, f"{_KEY}.slots", hint=error.hint)]
        ) from None


def beyond(options: LoraidOptions) -> Problem:
    """Return the problem of a slot that is none of the slots."""
    return Problem(
        f"there is no slot {options.slot} of {options.slots}",
        f"{_KEY}.slot",
        hint=f"slots count from 1 to adapter.loraid.slots = {options.slots}",
    )


def in_slot(
    chosen: Sequence[str], names: Iterable[str], options: LoraidOptions | None
) -> tuple[str, ...]:
    """Return those of the chosen linear layers that the slot owns; all where there is no slot.

    Args:
        chosen: canonical names that `include` and `exclude` leave.
        names: canonical names of all linear layers of the model.
        options: of `[adapter.loraid]`, if it is there.

    Raises:
        ConfigError: the slot does not fit the model, nothing is left, or layers were chosen that
            belong to no slot.
    """
    if options is None:
        return tuple(chosen)
    partition = partition_of(options, names)
    owners = {name: partition.slot_of(name) for name in chosen}
    outside = [name for name, owner in owners.items() if owner is None]
    if outside:
        problem = Problem(
            f"{outside[0]} belongs to no slot: only the blocks' own layers are dealt out",
            "adapter.include",
            hint="leave it out, or train without [adapter.loraid]",
        )
        raise ConfigError(problems=[problem])
    kept = tuple(name for name, owner in owners.items() if owner == options.slot)
    if not kept:
        problem = Problem(
            f"slot {options.slot} of {options.slots} owns none of the {len(chosen)} layers that "
            "adapter.include and adapter.exclude leave",
            f"{_KEY}.slot",
            hint="it owns " + in_words(partition.modules(options.slot)),
        )
        raise ConfigError(problems=[problem])
    return kept


def in_words(modules: Iterable[str]) -> str:
    """Return linear layers of blocks in few words, e.g. `self_attn.q, self_attn.k in block 0`."""
    layers: dict[str, list[int]] = {}
    for name in modules:
        if (match := _BLOCK.fullmatch(name)) is not None:
            layers.setdefault(match[2], []).append(int(match[1]))
    places: dict[str, list[str]] = {}
    for layer, blocks in layers.items():
        word = "block" if len(blocks) == 1 else "blocks"
        places.setdefault(f"{word} {numbers_text(sorted(blocks))}", []).append(layer)
    return "; ".join(f"{', '.join(inner)} in {place}" for place, inner in places.items())


def include_patterns(modules: Iterable[str]) -> tuple[str, ...]:
    """Return regular expressions that match exactly these layers of blocks, one for each kind.

    They are what `adapter.include` means, and musubi-tuner's `include_patterns` as well.
    """
    layers: dict[str, list[str]] = {}
    for name in modules:
        if (match := _BLOCK.fullmatch(name)) is not None:
            layers.setdefault(match[2], []).append(match[1])
    return tuple(
        rf"blocks\.(?:{'|'.join(blocks)})\.{re.escape(layer)}" for layer, blocks in layers.items()
    )


def numbers_text(numbers: Iterable[int]) -> str:
    """Return a compact text of ascending whole numbers: `0-3,8,10-11`.

    Raises:
        ValueError: they do not ascend, or one is negative.
    """
    runs: list[tuple[int, int]] = []
    last = -1
    for number in numbers:
        if number <= last:
            raise ValueError(f"{number} after {last}")
        if runs and number == last + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
        last = number
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a text as `numbers_text` makes it, ascending; "" is none.

    Those of several texts, joined by commas in any order, are read as one list.

    Raises:
        ValueError: it is no such text.
    """
    numbers: set[int] = set()
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        if match is None:
            raise ValueError(f"{part!r} is no number and no range of numbers")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low or high - low >= _LONGEST_RANGE:
            raise ValueError(f"{part!r} is no range of units")
        numbers.update(range(low, high + 1))
    return tuple(sorted(numbers))


def _owners(partition: Partition) -> Iterator[int]:
    """Yield the slot of each unit; the formulas are at the top of this file."""
    slots, blocks, per_block = partition.slots, partition.num_blocks, len(partition.parts)
    several = max(1, slots // blocks)
    for unit in range(blocks * per_block):
        block, part = divmod(unit, per_block)
        if partition.allocation == "contiguous":
            yield -(-(unit + 1) * slots // (blocks * per_block))
        elif slots <= blocks:
            yield 1 + (block + _STRIDE * part) % slots
        else:
            group, rest = divmod(part, several)
            yield 1 + several * ((block + _STRIDE * group) % blocks) + rest


@lru_cache(maxsize=32)
def _units_by_slot(partition: Partition) -> tuple[tuple[int, ...], ...]:
    units: list[list[int]] = [[] for _ in range(partition.slots)]
    for unit, slot in enumerate(_owners(partition)):
        units[slot - 1].append(unit)
    return tuple(tuple(own) for own in units)


@lru_cache(maxsize=32)
def _slot_by_module(partition: Partition) -> dict[str, int]:
    return {
        name: slot
        for unit, slot in enumerate(_owners(partition))
        for name in partition.modules_of_unit(unit)
    }
