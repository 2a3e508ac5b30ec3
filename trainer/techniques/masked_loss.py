"""Masked loss: learn what a mask marks, and leave the rest to itself, or to the untrained model.

With m the mask (1: learn), v the clip's velocity and v₀ that of the model before training, the loss
is the mean of a·ℓ(v̂, v) + b·ℓ(v̂, v₀), where a = o + (1 - o)·m, b = p·(1 - m), o `outside_weight`
and p `prior_weight`; with `normalize` a and (1 - m) are each divided by their mean over the clip.
It is computed as (a + b)·ℓ(v̂, (a·v + b·v₀) / (a + b)): where a or b is 0 that is the same; where
both count it is the same for the squared error but for a number that v̂ has no part in, since
a(x - v)² + b(x - v₀)² = (a + b)(x - (a·v + b·v₀)/(a + b))² + ab/(a + b)·(v - v₀)².

That the untrained model's prediction is the target outside of the mask is known from OneTrainer as
masked prior preservation. Shape letters: B batch, F latent frames, H/W latent height and width.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.loss_maps import normalised_map
from trainer.core.seams import BuildContext, Maturity, Need, Predict, Technique
from trainer.core.types import Batch, NoisyInput


class MaskedLoss(Technique):
    """Weigh the loss by the items' masks; items without one are trained as ever."""

    maturity: ClassVar[Maturity] = Maturity.VALUED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MASKS})

    class Config(Options):
        """Options of `[[techniques]] name = "masked_loss"`."""

        outside_weight: float = Field(0.0, ge=0, le=1)
        """Weight of what is outside of the mask, beside 1 inside; 0: it is not learned at all."""
        prior_weight: float = Field(0.0, ge=0, le=100)
        """How strongly the model is held, outside of the mask, to what it predicted before
        training; costs one more forward a step. 0: not at all."""
        normalize: bool = True
        """Let a clip with a small mask count as much as one with a large one."""

    config: Config

    def __init__(self, config: MaskedLoss.Config, build: BuildContext) -> None:
        self.config = config

    @classmethod
    def needs_of(cls, options: Options) -> frozenset[Need]:
        """Return `needs`, and the model without its adapter where there is a `prior_weight`."""
        assert isinstance(options, cls.Config)
        more = frozenset({Need.BASE_MODEL}) if options.prior_weight else frozenset()
        return cls.needs | more

    def edit_target(
        self, target: Tensor, batch: Batch, noisy: NoisyInput, predict_base: Predict
    ) -> Tensor:
        """Mix in the untrained model's velocity outside of the mask."""
        if not self.asks_base(batch):
            return target
        assert batch.mask_B1FHW is not None
        learned, kept = self._weights(batch.mask_B1FHW)
        total = learned + kept
        share = kept / total.where(total > 0, 1.0)
        return target.lerp(predict_base(noisy, batch).to(target.dtype), share)

    def asks_base(self, batch: Batch) -> bool:
        """Tell whether there are masks, and a prior for what is outside of them."""
        return batch.mask_B1FHW is not None and self.config.prior_weight > 0

    def loss_map(self, batch: Batch, noisy: NoisyInput) -> Tensor | None:
        """Return a + b."""
        if batch.mask_B1FHW is None:
            return None
        learned, kept = self._weights(batch.mask_B1FHW)
        return learned + kept

    def _weights(self, mask_B1FHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b, (B, 1, F, H, W)."""
        outside = 1 - mask_B1FHW
        learned = mask_B1FHW + self.config.outside_weight * outside
        if self.config.normalize:
            learned, outside = normalised_map(learned), normalised_map(outside)
        return learned, self.config.prior_weight * outside
