"""Contrastive flow matching: push predictions away from other samples' targets.

Stoica et al., arXiv:2506.05350, eq. 4: L = ‖v̂ - v‖² - λ·‖v̂ - ṽ‖², with ṽ the velocity of another
sample of the batch.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.flow import velocity_target
from trainer.core.seams import BuildContext, Maturity, Need, Predict, Technique
from trainer.core.types import Batch, LossTerm, NoisyInput


class ContrastiveFlow(Technique):
    """Subtract a share of the distance to the next sample's velocity."""

    reference: ClassVar[str] = "arXiv:2506.05350"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BATCH_OVER_ONE})

    class Config(Options):
        """Options of `[[techniques]] name = "contrastive_flow"`."""

        weight: float = Field(0.05, gt=0, lt=1)
        """λ, the size of the push relative to the base loss."""

    def __init__(self, config: ContrastiveFlow.Config, build: BuildContext) -> None:
        self.config = config

    def loss_terms(
        self, batch: Batch, noisy: NoisyInput, prediction: Tensor, predict: Predict
    ) -> list[LossTerm]:
        """Return the (negative) contrastive term; it is 0 for a batch of one.

        The last batch of a bucket may be that small, and every rank must report the same terms.
        """
        other = velocity_target(batch.latents_BCFHW, noisy.noise_BCFHW).roll(1, dims=0)
        distance = (prediction.float() - other.float()).square().mean()
        weight = self.config.weight if batch.latents_BCFHW.shape[0] > 1 else 0.0
        return [LossTerm(name="contrastive_flow", value=-weight * distance)]
