"""Weighted sums of LoRAs, module by module, exact or cut to a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.adapters.base import AdapterFile, LoRAFactors, Update
from trainer.adapters.difference import WeightDifference
from trainer.adapters.low_rank import Cut, Truncated, factorise, truncate, weighted_sum
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.jobs import CutOptions
from trainer.jobs.base import MAX_LISTED
from trainer.jobs.lora_files import is_plain, union

_ROUNDING = 1e-5
"""What is left of parts that cancel, relative to the largest: float32 sums of products."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file's update of a module, and what it is multiplied with."""

    path: Path
    update: Update
    weight: float


@dataclass(slots=True)
class Energies:
    """What is left of ‖D‖² after cutting, of each module and of all together."""

    kept: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, cut: Truncated) -> None:
        """Count one module."""
        self.kept[name], self.totals[name] = cut.energy, cut.total

    @property
    def overall(self) -> float:
        """Share of the sum over all modules, in [0, 1]."""
        total = sum(self.totals.values())
        if not total:
            return 1.0
        return sum(self.kept[name] * part for name, part in self.totals.items()) / total

    def fields(self) -> dict[str, Any]:
        """Return what an event says: `energy` is the overall share, None where nothing was cut."""
        if not self.kept:
            return {"energy": None, "energy_by_module": {}}
        listed = sorted(self.kept.items(), key=lambda item: item[1])[:MAX_LISTED]
        return {
            "energy": self.overall,
            "energy_by_module": {name: round(share, 6) for name, share in listed},
        }


def cut_of(options: CutOptions) -> Cut:
    """Return the limits that a request sets.

    Raises:
        ConfigError: two shares at once.
    """
    if options.energy is not None and options.frobenius is not None:
        raise ConfigError(
            "energy and frobenius are given, which say the same in two ways",
            hint="a share F of the Frobenius norm is a share F² of the energy; give one of them",
        )
    energy = options.energy if options.frobenius is None else options.frobenius**2
    return Cut(max_rank=options.rank, energy=energy, ratio=options.ratio)


def sum_module(name: str, parts: Sequence[Part], cut: Cut, energies: Energies) -> Update | None:
    """Return Σ weight · update of one module, None where no part has a weight.

    None also where a cut is wanted and the parts cancel but for the rounding of their sum, and
    where whole differences do.

    Plain LoRAs are concatenated, exactly; what is beyond the cut is taken off by a singular value
    decomposition. A module that one file alone has, with weight 1, is kept as it is, whatever its
    kind. With a whole difference among the parts the sum is one, too. Other kinds need a cut: their
    sum is formed as a matrix and decomposed.

    Raises:
        ModelFileError: a kind that has no factors, and no cut; names file, module and kind.
    """
    kept = [part for part in parts if part.weight]
    if not kept:
        return None
    update = _summed(name, kept, cut, energies)
    whole = isinstance(update, WeightDifference)
    if whole and any(part.weight < 0 for part in kept) and not update.norm():
        return None
    if cut.limits and any(part.weight < 0 for part in kept):
        largest = max(abs(part.weight) * part.update.norm() for part in kept)
        if update.norm() <= _ROUNDING * largest:
            return None
    return update


def _summed(name: str, kept: Sequence[Part], cut: Cut, energies: Energies) -> Update:
    if all(is_plain(part.update) for part in kept):
        pairs = [(_factors(part.update), part.weight) for part in kept]
        return _cut(name, weighted_sum(pairs), cut, energies)
    if len(kept) == 1 and kept[0].weight == 1.0 and not cut.limits:
        return kept[0].update
    whole = any(isinstance(part.update, WeightDifference) for part in kept)
    if not cut.limits and not whole:
        other = next(part for part in kept if not is_plain(part.update))
        raise ModelFileError(
            f"{other.path}: {name} is a {other.update.kind} update, which has no factors that "
            "could be joined to others",
            hint="give --rank R: the sum is formed as a matrix and cut to a plain LoRA",
        )
    total: Tensor | None = None
    for part in kept:
        delta = delta_of(part.path, name, part.update) * part.weight
        total = delta if total is None else total.add_(delta)
    assert total is not None
    if not cut.limits:
        return WeightDifference(total)
    result = factorise(total, cut)
    energies.add(name, result)
    return result.factors


def delta_of(path: Path, name: str, update: Update) -> Tensor:
    """Return an update as a matrix (O, I), float32.

    Raises:
        ModelFileError: it depends on the base's weights, so that it has none by itself.
    """
    try:
        return update.delta()
    except ModelFileError as error:
        raise ModelFileError(
            f"{path}: the {update.kind} update of {name} depends on the weights of the base model",
            hint="merge it into its base with `menma merge`, then use `menma lora extract`",
        ) from error


def sum_differences(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ weight · diff of the parameters that are no weights of linear layers.

    One that a single file has, with weight 1, keeps every bit; sums are float32, formed in the
    order of the files. What has no weight, or cancels, is left out.
    """
    found: dict[str, Tensor] = {}
    for name in union(adapter.differences for adapter in adapters):
        parts = [
            (adapter.differences[name], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if weight and name in adapter.differences
        ]
        if len(parts) == 1 and parts[0][1] == 1.0:
            found[name] = parts[0][0]
            continue
        total = sum(weight * tensor.float() for tensor, weight in parts)
        cancels = any(weight < 0 for _, weight in parts)
        if isinstance(total, Tensor) and (bool(total.any()) or not cancels):
            found[name] = total
    return found


def weighted_parts(
    adapters: Sequence[AdapterFile], weights: Sequence[float], name: str
) -> list[Part]:
    """Return the parts that the files have in one module."""
    return [
        Part(adapter.path, adapter[name], weight)
        for adapter, weight in zip(adapters, weights, strict=True)
        if name in adapter
    ]


def rank_counts(updates: Mapping[str, Update]) -> dict[str, int]:
    """Return rank -> number of modules, by rising rank."""
    whole = WeightDifference.kind
    counted = Counter(update.rank for update in updates.values() if update.kind != whole)
    return {str(rank): counted[rank] for rank in sorted(counted)}


def _cut(name: str, factors: LoRAFactors, cut: Cut, energies: Energies) -> LoRAFactors:
    by_values = cut.energy is not None or cut.ratio is not None
    if not by_values and (cut.max_rank is None or factors.rank <= cut.max_rank):
        return factors
    result = truncate(factors, cut)
    energies.add(name, result)
    return result.factors


def _factors(update: Update) -> LoRAFactors:
    assert isinstance(update, LoRAFactors)
    return update
