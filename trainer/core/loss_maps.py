"""Weights per element of the loss, as techniques give them to the step."""

from __future__ import annotations

from torch import Tensor


def normalised_map(weights_B1FHW: Tensor) -> Tensor:
    """Return weights divided by their mean over each item: w / mean(w); all 0 stays all 0.

    An item with a small mask then counts as much as one with a large mask.
    """
    mean_B = weights_B1FHW.flatten(1).mean(dim=1)
    safe_B = mean_B.where(mean_B > 0, 1.0)
    return weights_B1FHW / safe_B.view(-1, *([1] * (weights_B1FHW.dim() - 1)))
