"""Loss terms: are they finite on every rank, and what is their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.contract.errors import NonFiniteError
from trainer.engine.process_group import World


@dataclass(slots=True)
class TermSums:
    """Adds up the loss terms of one step's microbatches over all ranks."""

    world: World
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, terms: Mapping[str, Tensor], clips: Sequence[str]) -> None:
        """Check and add the terms of one microbatch, each of shape (). A collective call.

        One gather serves both the check and the mean. Every rank must have the same terms.

        Raises:
            NonFiniteError: some term is NaN or infinite on some rank; raised on all of them.
        """
        names = list(terms)
        values = torch.stack([terms[name].detach().float() for name in names])
        by_rank: list[list[float]] = self.world.gather(values).tolist()
        if not all(math.isfinite(value) for row in by_rank for value in row):
            raise self._error(names, by_rank, clips)
        for index, name in enumerate(names):
            mean = sum(row[index] for row in by_rank) / len(by_rank)
            self.sums[name] = self.sums.get(name, 0.0) + mean
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return each term's mean over microbatches and ranks."""
        return {name: total / self.count for name, total in self.sums.items()}

    def _error(
        self, names: list[str], by_rank: list[list[float]], clips: Sequence[str]
    ) -> NonFiniteError:
        clips_by_rank = self.world.gather_texts(", ".join(clips))
        parts = [
            f"loss term {name!r} is {value} on rank {rank}, clips: {clips_by_rank[rank] or '?'}"
            for rank, row in enumerate(by_rank)
            for name, value in zip(names, row, strict=True)
            if not math.isfinite(value)
        ]
        return NonFiniteError(
            "; ".join(parts),
            hint="the weights were not touched. Look at these clips and their captions; if they "
            "are fine, lower the learning rate or resume from an earlier checkpoint",
        )


def gradient_error(norm: float) -> NonFiniteError:
    """Return the error for a gradient that is not finite although the loss was."""
    return NonFiniteError(
        f"the gradient norm is {norm}, though every loss term was finite",
        hint="the weights were not touched. Lower the learning rate, set memory.weight_format = "
        "'fp32', or resume from an earlier checkpoint",
    )
