"""From the loss of every element to one number: the one place where weights of the data enter.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor


def reduce_loss(
    pointwise_BCFHW: Tensor,
    *,
    maps: Iterable[Tensor | None] = (),
    sigma_weight_B: Tensor,
    item_weight_B: Tensor | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Return mean_b( item_weight_b · w(σ_b) · mean( pointwise_b · Π maps_b ) ), shape ().

    A map that shall not change how much an item counts as a whole has a mean of 1 over the item
    (`loss_maps.normalised_map`). What is not there multiplies nothing: its absence changes no bit.

    Args:
        pointwise_BCFHW: loss of every element, float32.
        maps: weights per element, broadcastable to the loss; None stands for none.
        sigma_weight_B: of `objective.weighting`.
        item_weight_B: of the items' sources (`Batch.loss_weight_B`); None: all count the same.
        observe: told of each item's loss, shape (B,), before these two weights.
    """
    for weights in maps:
        if weights is not None:
            pointwise_BCFHW = pointwise_BCFHW * weights
    per_item_B = pointwise_BCFHW.flatten(1).mean(dim=1)
    if observe is not None:
        observe(per_item_B)
    per_item_B = sigma_weight_B * per_item_B
    if item_weight_B is not None:
        per_item_B = item_weight_B * per_item_B
    return per_item_B.mean()
