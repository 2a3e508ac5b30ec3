"""What N slots of a model are: their layers, their size, and the rank that makes one useful."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.contract.loraid import Partition, in_words, numbers_text
from trainer.contract.memory_model.weights import block_layers
from trainer.contract.variants import TransformerConfig

FULL_RANK = 32
"""Rank of an ordinary LoRA of the whole network that a slot is compared with."""
USEFUL_RANK = 256
"""Above this, more rank brings a LoRA little."""
MANY_SLOTS = 40
"""More slots than this leave each so little that no rank makes up for it."""
_FEW_SLOTS = 10
_RANKS_OF_FEW, _RANKS_OF_MORE = (64, 128), (128, 256)
_UNEQUAL = 1.25
_BYTES = 2  # bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlan:
    """One slot."""

    slot: int
    units: tuple[int, ...]
    blocks: tuple[int, ...]
    modules: tuple[str, ...]
    parameters_per_rank: int | None
    """Parameters of a LoRA of rank 1; None where the sizes of the model are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All slots."""

    partition: Partition
    rank: int
    """Rank that parameters are counted at."""
    full_rank: int
    smallest_side: int | None
    """Of the blocks' layers: no LoRA of a higher rank says more."""
    rows: tuple[SlotPlan, ...]

    @property
    def equal_rank(self) -> int:
        """Rank that gives a slot the parameters of a whole LoRA of `full_rank`."""
        return self.full_rank * self.partition.slots

    @property
    def useful_ranks(self) -> tuple[int, int]:
        """Lowest and highest rank worth trying."""
        return useful_ranks(self.partition.slots, self.full_rank)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        parts = self.partition
        return {
            "slots": parts.slots,
            "granularity": parts.granularity,
            "allocation": parts.allocation,
            "num_blocks": parts.num_blocks,
            "num_units": parts.num_units,
            "rank": self.rank,
            "equal_rank": self.equal_rank,
            "useful_ranks": list(self.useful_ranks),
            "notes": list(self.notes()),
            "table": [
                {
                    "slot": row.slot,
                    "units": numbers_text(row.units),
                    "blocks": list(row.blocks),
                    "modules": list(row.modules),
                    "parameters_per_rank": row.parameters_per_rank,
                    "parameters": self.parameters(row),
                    "bytes_bf16": None if (n := self.parameters(row)) is None else _BYTES * n,
                }
                for row in self.rows
            ],
        }

    def parameters(self, row: SlotPlan) -> int | None:
        """Return a slot's parameters at `rank`."""
        return None if row.parameters_per_rank is None else row.parameters_per_rank * self.rank

    def notes(self) -> Iterator[str]:
        """Yield what is worth knowing before many LoRAs are trained on this plan."""
        parts, slots = self.partition, self.partition.slots
        low, high = self.useful_ranks
        ranks = f"{low}" if low == high else f"{low} to {high}"
        yield (
            f"a slot has 1/{slots} of the network: rank {self.equal_rank} would give it the "
            f"parameters of a whole LoRA of rank {self.full_rank}; useful ranks: {ranks}"
        )
        yield from self._sizes()
        if slots > MANY_SLOTS:
            yield f"{slots} slots leave each {1 / slots:.1%} of the network: it learns little"
        if self.rank > USEFUL_RANK:
            yield f"rank {self.rank}: above about {USEFUL_RANK} more rank brings little"
        if self.rank < low:
            yield f"rank {self.rank} is low for so small a part of the network"
        if self.smallest_side is not None and self.rank > self.smallest_side:
            yield f"rank {self.rank} is more than the smallest layer has ({self.smallest_side})"
        if parts.allocation == "contiguous" and slots > 1:
            yield (
                "contiguous slots lie at different depths and learn different things well; "
                'allocation = "spread" gives every slot all depths'
            )

    def _sizes(self) -> Iterator[str]:
        sizes = [n for row in self.rows if (n := row.parameters_per_rank) is not None]
        if not sizes:
            yield "parameters are not known without the model's sizes: name a config or a variant"
            return
        low, high = (self.rank * size for size in (min(sizes), max(sizes)))
        million = f"{low / 1e6:.1f}" if low == high else f"{low / 1e6:.1f} to {high / 1e6:.1f}"
        size = f"{_BYTES * high / 2**20:.0f} MiB"
        yield f"rank {self.rank}: {million} million parameters a slot, up to {size} in bf16"
        if high > _UNEQUAL * low:
            yield f"the largest slot has {high / low:.1f} times the parameters of the smallest"


def useful_ranks(slots: int, full_rank: int = FULL_RANK) -> tuple[int, int]:
    """Return the lowest and the highest rank worth trying in one of so many slots.

    A slot has 1/N of the layers, so rank r₀·N would match a whole LoRA of rank r₀; that is held
    down to where more rank still helps.
    """
    low, high = _RANKS_OF_FEW if slots <= _FEW_SLOTS else _RANKS_OF_MORE
    equal = full_rank * slots
    return min(low, equal), min(high, equal)


def plan_slots(
    partition: Partition,
    shape: TransformerConfig | None,
    *,
    rank: int | None = None,
    full_rank: int = FULL_RANK,
) -> Plan:
    """Return the plan.

    Args:
        partition: who owns what.
        shape: sizes of the model; None: only layers are counted.
        rank: of the slots' LoRAs; None: the lowest useful one.
        full_rank: r₀ of the LoRA to compare with.
    """
    layers = None if shape is None else block_layers(shape)

    def per_rank(modules: tuple[str, ...]) -> int | None:
        if layers is None:
            return None
        return sum(sum(layers[name.split(".", 2)[2]]) for name in modules)

    rows = []
    for slot in range(1, partition.slots + 1):
        units, modules = partition.units(slot), partition.modules(slot)
        rows.append(
            SlotPlan(
                slot=slot,
                units=units,
                blocks=tuple(sorted({unit // len(partition.parts) for unit in units})),
                modules=modules,
                parameters_per_rank=per_rank(modules),
            )
        )
    return Plan(
        partition=partition,
        rank=rank or useful_ranks(partition.slots, full_rank)[0],
        full_rank=full_rank,
        smallest_side=None if layers is None else min(min(sizes) for sizes in layers.values()),
        rows=tuple(rows),
    )


def rows_in_words(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return a row a slot: number, layers, parameters at the plan's rank, where they are."""
    return [
        (
            str(row.slot),
            str(len(row.modules)),
            "" if (number := plan.parameters(row)) is None else f"{number:,}",
            in_words(row.modules),
        )
        for row in plan.rows
    ]
