"""Rank and module dropout: samples that are trained without some ranks, or some whole layers.

As in kohya's sd-scripts and musubi-tuner (`rank_dropout`, `module_dropout`), but drawn for each
sample: B diag(m) A with m_r = Bernoulli(1 - p) / (1 - p) for the ranks, and m = 0 for all ranks of
a layer that is left out, which is not scaled up in return.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.adapters.lora_linear import LoRALinear
from trainer.core.rng import generator as seeded
from trainer.core.seams import Technique
from trainer.core.types import Batch


class BranchDropout(Technique):
    """Gives the layers the masks of each microbatch before it runs.

    A sample's masks depend on the run's seed and the sample alone. They are the same in a
    recomputation, for all parts of its tokens, in another batch and after a restart.
    """

    def __init__(
        self,
        layers: Iterable[LoRALinear],
        rank_dropout: float,
        module_dropout: float,
        *,
        seed: int,
    ) -> None:
        self._layers = tuple(layers)
        self._rank_dropout = rank_dropout
        self._module_dropout = module_dropout
        self._seed = seed

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw the masks; the batch stays as it is."""
        masks_BN = torch.stack([self._draw(seed) for seed in batch.item_seeds])
        masks_BN = masks_BN.to(batch.latents_BCFHW.device, non_blocking=True)
        widths = [layer.down.shape[0] for layer in self._layers]
        for layer, mask_BR in zip(self._layers, torch.split(masks_BN, widths, dim=1), strict=True):
            layer.mask_BR = mask_BR
        return batch

    def _draw(self, item_seed: int) -> Tensor:
        """Return the masks of all layers for one sample, one behind the other, float32."""
        widths = torch.tensor([layer.down.shape[0] for layer in self._layers])
        random = seeded(self._seed, "rank_dropout", item_seed)
        ranks = torch.rand(int(widths.sum()), generator=random) >= self._rank_dropout
        random = seeded(self._seed, "module_dropout", item_seed)
        layers = torch.rand(len(widths), generator=random) >= self._module_dropout
        kept = ranks & layers.repeat_interleave(widths)
        return kept / (1 - self._rank_dropout)
