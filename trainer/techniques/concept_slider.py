"""Concept sliders: an adapter whose strength moves videos from one description towards another.

Gandikota et al., arXiv:2311.12092, eq. 7: with the predictions v of the model without the adapter
the target of the prompt t is v(t) + η·(v(positive) - v(negative)). Clips of the dataset give the
noisy latents; what they show and their captions do not count. Used with a strength below 0 the
adapter goes the other way, which is not trained but follows where its effect is linear.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, Maturity, Need, Predict, Technique
from trainer.core.types import Batch, NoisyInput


class ConceptSlider(Technique):
    """Train the prompt's prediction towards what is positive and away from what is negative."""

    reference: ClassVar[str] = "arXiv:2311.12092"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE_MODEL})

    class Config(Options):
        """Options of `[[techniques]] name = "concept_slider"`."""

        positive: str
        """What more strength shall bring, e.g. `a very old person`."""
        negative: str
        """What it shall take away, e.g. `a very young person`; may be empty."""
        target: str = ""
        """Prompt that is moved, e.g. `a person`; empty: whatever the model shows without one."""
        slider_scale: float = Field(2.0, gt=0, le=100)
        """η: how far strength 1 goes, in differences of the two."""

    config: Config

    def __init__(self, config: ConceptSlider.Config, build: BuildContext) -> None:
        self.config = config
        self._build = build

    @classmethod
    def texts(cls, options: Options, captions: Iterable[str]) -> Iterable[str]:
        """Return the three prompts."""
        assert isinstance(options, cls.Config)
        return (options.target, options.positive, options.negative)

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Give every item the target prompt."""
        return self._with(batch, self.config.target)

    def edit_target(
        self, target: Tensor, batch: Batch, noisy: NoisyInput, predict_base: Predict
    ) -> Tensor:
        """Return v(t) + η·(v(positive) - v(negative)); the clip's own velocity does not count."""

        def predicted(prompt: str) -> Tensor:
            return predict_base(noisy, self._with(batch, prompt)).to(target.dtype)

        towards = predicted(self.config.positive)
        towards -= predicted(self.config.negative)
        return predicted(self.config.target).add_(towards, alpha=self.config.slider_scale)

    def _with(self, batch: Batch, prompt: str) -> Batch:
        context = tuple(self._build.encoded(prompt).to(own) for own in batch.context)
        return replace(batch, context=context, captions=(prompt,) * len(context))
