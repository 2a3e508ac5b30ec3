"""Items that are trained to stay what they were: which ones, and what becomes of their targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.core.rng import derive_seed

_RANGE = 1 << 63


def chosen_items(share: float, seed: int, name: str, item_seeds: Sequence[int]) -> list[bool]:
    """Return which items are chosen, each with the probability `share` by its own seed.

    Args:
        share: in [0, 1].
        seed: of the run.
        name: of what chooses; different names choose independently.
        item_seeds: one an appearance of an item.
    """
    return [derive_seed(seed, name, item) < share * _RANGE for item in item_seeds]


def replace_rows(values: Tensor, others: Tensor, rows: Sequence[bool]) -> Tensor:
    """Return `values` with the rows that are chosen taken from `others`, in the dtype of values."""
    chosen = torch.tensor(rows, device=values.device).view(-1, *([1] * (values.dim() - 1)))
    return torch.where(chosen, others.to(values.dtype), values)
