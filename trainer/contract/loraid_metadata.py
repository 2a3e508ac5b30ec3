"""What a LoRA of a slot says about itself in the header of its file, and how it is read back.

Keys: `ss_loraid` (the slot; of a file that several were joined into, all of them), `…_slots`,
`…_granularity`, `…_allocation`, `…_num_blocks`, `…_expert` (none, high or low), `…_units` (numbers
of the units, see `contract.loraid`). `ss_loraid_shared` marks a file that has parts of several
slots blended into it: it is no longer separate from the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

from trainer.contract.errors import ModelFileError
from trainer.contract.loraid import Allocation, Granularity, Partition, numbers_text, parse_numbers

SlotExpert = Literal["none", "high", "low"]
Word = TypeVar("Word", bound=str)
SLOT_EXPERTS: dict[SlotExpert, Literal["high_noise", "low_noise"] | None] = {
    "none": None,
    "high": "high_noise",
    "low": "low_noise",
}
"""Expert as `ss_loraid_expert` has it -> as a config has it."""
KEYS = tuple(
    f"ss_loraid{rest}"
    for rest in ("", "_slots", "_granularity", "_allocation", "_num_blocks", "_expert", "_units",
                 "_shared")
)  # fmt: skip
"""All of them: what a tool that rewrites a LoRA of a slot carries over."""

BLOCKS_OF_OLDER_FILES = 12
"""Whole blocks of a slot where a file says its number only, as the tool did that began with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loraid:
    """What a file says of its slot."""

    ids: tuple[int, ...]
    """The slot, or the slots that were joined in this file."""
    slots: int | None = None
    """None: an older file, which does not say it; nor does it say `num_blocks`."""
    granularity: Granularity = "block"
    allocation: Allocation = "contiguous"
    num_blocks: int | None = None
    expert: SlotExpert = "none"
    units: tuple[int, ...] = ()
    shared: str = ""
    note: str = ""
    """What had to be assumed, in words."""

    @property
    def scheme(self) -> tuple[object, ...]:
        """What has to be equal in files that shall be used together."""
        return (self.slots, self.granularity, self.allocation, self.num_blocks)

    def partition(self, *, image: bool) -> Partition | None:
        """Return who owns what; None for an older file, whose scheme is not known.

        Raises:
            ConfigError: there is no such allocation.
        """
        if self.slots is None or self.num_blocks is None:
            return None
        return Partition(
            num_blocks=self.num_blocks,
            slots=self.slots,
            granularity=self.granularity,
            allocation=self.allocation,
            image=image,
        )


def loraid_metadata(partition: Partition, slot: int, *, expert: str | None) -> dict[str, str]:
    """Return the header of a LoRA of a slot.

    Args:
        partition: who owns what.
        slot: which was trained.
        expert: `high_noise` or `low_noise`; anything else is for a model without experts, or for
            both.

    Raises:
        ConfigError: there is no such slot.
    """
    return as_metadata(
        Loraid(
            ids=(slot,),
            slots=partition.slots,
            granularity=partition.granularity,
            allocation=partition.allocation,
            num_blocks=partition.num_blocks,
            expert=slot_expert(expert),
            units=partition.units(slot),
        )
    )


def as_metadata(loraid: Loraid) -> dict[str, str]:
    """Return the keys of a header that `read_loraid` makes the same of."""
    table = {"ss_loraid": ",".join(map(str, loraid.ids))}
    if loraid.slots is not None:
        table |= {
            "ss_loraid_slots": str(loraid.slots),
            "ss_loraid_granularity": loraid.granularity,
            "ss_loraid_allocation": loraid.allocation,
            "ss_loraid_num_blocks": str(loraid.num_blocks),
            "ss_loraid_expert": loraid.expert,
            "ss_loraid_units": numbers_text(loraid.units),
        }
    if loraid.shared:
        table["ss_loraid_shared"] = loraid.shared
    return table


def read_loraid(metadata: Mapping[str, str], path: Path | str = "the file") -> Loraid | None:
    """Return what a header says of slots; None: it is no LoRA of a slot.

    Args:
        metadata: string table of a safetensors header.
        path: of the file, for errors.

    Raises:
        ModelFileError: a value cannot be what it should be.
    """
    if "ss_loraid" not in metadata:
        return None
    reader = _Reader(metadata, str(path))
    ids = reader.slots()
    shared = metadata.get("ss_loraid_shared", "")
    if not any(key in metadata for key in KEYS[1:6] if key != "ss_loraid_expert"):
        return _older(ids, reader.expert(), shared)
    loraid = Loraid(
        ids=ids,
        slots=reader.number("ss_loraid_slots"),
        granularity=reader.word("ss_loraid_granularity", get_args(Granularity)),
        allocation=reader.word("ss_loraid_allocation", get_args(Allocation)),
        num_blocks=reader.number("ss_loraid_num_blocks"),
        expert=reader.expert(),
        units=reader.units(),
        shared=shared,
    )
    if loraid.slots is not None and ids[-1] > loraid.slots:
        raise reader.wrong("ss_loraid", f"a slot from 1 to {loraid.slots}")
    return loraid


def of_expert(
    metadata: Mapping[str, str], expert: Literal["high_noise", "low_noise"]
) -> dict[str, str]:
    """Return the header of the part of a file that is for one expert of Wan 2.2.

    What a file with both says of them holds for neither alone.
    """
    table = {**metadata, "menma.expert": expert}
    if "ss_loraid" in table:
        table["ss_loraid_expert"] = slot_expert(expert)
    return table


def slot_expert(expert: str | None) -> SlotExpert:
    """Return an expert as `ss_loraid_expert` has it; `none` for anything that is no expert."""
    return next((name for name, value in SLOT_EXPERTS.items() if value == expert), "none")


def slot_keys(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return those of `KEYS` that a header has."""
    return {key: metadata[key] for key in KEYS if key in metadata}


def joined_loraid(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the keys for a file that LoRAs with these headers were joined into.

    LoRAs of one scheme give all their slots and units; the same slot several times (as when
    checkpoints are averaged) stays that slot. Mixed with others they give a file marked as shared,
    and where none is of a slot there are no keys.

    Raises:
        ModelFileError: a value of a header cannot be what it should be.
    """
    found = [read_loraid(table) for table in tables]
    loraids = [one for one in found if one is not None]
    if not loraids:
        return {}
    ids = tuple(sorted({number for one in loraids for number in one.ids}))
    schemes = {(one.scheme, one.expert) for one in loraids}
    if len(loraids) < len(found) or len(schemes) > 1:
        mixed = f"{','.join(map(str, ids))};mixed"
        return as_metadata(Loraid(ids=ids, shared=mixed))
    units = tuple(sorted({unit for one in loraids for unit in one.units}))
    shared = next((one.shared for one in loraids if one.shared), "")
    return as_metadata(replace(loraids[0], ids=ids, units=units, shared=shared))


def only_held(metadata: Mapping[str, str], modules: Collection[str]) -> dict[str, str]:
    """Return a header without those of its slots of which a file holds no layer any more.

    Args:
        metadata: of a file that several slots were joined into, or any other.
        modules: canonical names of the layers that it holds.

    Raises:
        ModelFileError: a value cannot be what it should be.
    """
    loraid = read_loraid(metadata)
    if loraid is None or loraid.shared or len(loraid.ids) < 2:
        return dict(metadata)
    partition = loraid.partition(image=any(name.endswith("_img") for name in modules))
    if partition is None:
        return dict(metadata)
    there = {partition.slot_of(name) for name in modules}
    ids = tuple(number for number in loraid.ids if number in there)
    if ids in {(), loraid.ids}:
        return dict(metadata)
    units = tuple(sorted(unit for number in ids for unit in partition.units(number)))
    return {**metadata, **as_metadata(replace(loraid, ids=ids, units=units))}


def _older(ids: tuple[int, ...], expert: SlotExpert, shared: str) -> Loraid:
    size = BLOCKS_OF_OLDER_FILES
    units = tuple(unit for k in ids for unit in range(size * (k - 1), size * k))
    note = (
        f"says only that it is LORAID {', '.join(map(str, ids))}: read as {size} whole blocks "
        f"each, {numbers_text(units)}"
    )
    return Loraid(ids=ids, expert=expert, units=units, shared=shared, note=note)


class _Reader:
    def __init__(self, metadata: Mapping[str, str], path: str) -> None:
        self._metadata, self._path = metadata, path

    def wrong(self, key: str, wanted: str) -> ModelFileError:
        value = self._metadata.get(key)
        found = "is missing" if value is None else f"is {value[:80]!r}"
        return ModelFileError(
            f"{self._path}: {key} {found}, it must be {wanted}",
            hint="the header of the file is damaged; export it again",
        )

    def slots(self) -> tuple[int, ...]:
        try:
            ids = parse_numbers(self._metadata["ss_loraid"].strip())
        except ValueError:
            ids = ()
        if not ids or ids[0] < 1:
            raise self.wrong("ss_loraid", "the number of a slot, from 1")
        return ids

    def number(self, key: str) -> int:
        text = self._metadata.get(key, "").strip()
        if not text.isascii() or not text.isdigit() or not 1 <= int(text[:7]) < 10**6:
            raise self.wrong(key, "a whole number from 1")
        return int(text)

    def word(self, key: str, words: tuple[Word, ...]) -> Word:
        found = self._metadata.get(key)
        for word in words:
            if word == found:
                return word
        raise self.wrong(key, f"one of {', '.join(words)}")

    def expert(self) -> SlotExpert:
        if "ss_loraid_expert" not in self._metadata:
            return "none"
        return self.word("ss_loraid_expert", get_args(SlotExpert))

    def units(self) -> tuple[int, ...]:
        try:
            return parse_numbers(self._metadata.get("ss_loraid_units", ""))
        except ValueError:
            raise self.wrong("ss_loraid_units", "numbers such as 0-11,30") from None
