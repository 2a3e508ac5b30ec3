"""Keep what the model makes of an empty prompt.

A share of the items is shown with the empty caption, and their target is what the model without the
adapter predicts for it. Ostris' ai-toolkit ("blank prompt preservation") adds the same distance as
a second term to every step, with two forwards more and the activations of two at once; a share of
the items has the same expected gradient, (1 - p) of learning and p of keeping, for one forward now
and then. Classifier-free guidance subtracts the empty prompt's prediction, so its drift is seen in
samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.options import Options
from trainer.core.preservation import chosen_items, replace_rows
from trainer.core.seams import BuildContext, Maturity, Need, Predict, Technique
from trainer.core.types import Batch, NoisyInput


class BlankPromptPreservation(Technique):
    """Train a share of the items on the untrained model's answer to the empty prompt."""

    reference: ClassVar[str] = "ai-toolkit, blank_prompt_preservation"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE_MODEL})

    class Config(Options):
        """Options of `[[techniques]] name = "blank_prompt_preservation"`."""

        blank_share: float = Field(0.1, gt=0, lt=1)
        """p: share of the items that keep instead of learn."""

    config: Config

    def __init__(self, config: BlankPromptPreservation.Config, build: BuildContext) -> None:
        self.config = config
        self._build = build

    @classmethod
    def texts(cls, options: Options, captions: Iterable[str]) -> Iterable[str]:
        """Return the empty one."""
        return ("",)

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Give the chosen items the empty caption."""
        rows = self._chosen(batch)
        if not any(rows):
            return batch
        blank = self._build.encoded("").to(batch.context[0])
        context = tuple(blank if c else own for c, own in zip(rows, batch.context, strict=True))
        captions = tuple("" if c else own for c, own in zip(rows, batch.captions, strict=True))
        return replace(batch, context=context, captions=captions)

    def edit_target(
        self, target: Tensor, batch: Batch, noisy: NoisyInput, predict_base: Predict
    ) -> Tensor:
        """Replace the targets of the chosen items by the untrained model's prediction."""
        rows = self._chosen(batch)
        return replace_rows(target, predict_base(noisy, batch), rows) if any(rows) else target

    def asks_base(self, batch: Batch) -> bool:
        """Tell whether an item of the batch is a chosen one."""
        return any(self._chosen(batch))

    def _chosen(self, batch: Batch) -> list[bool]:
        share, seed = self.config.blank_share, self._build.seed
        return chosen_items(share, seed, "blank prompt preservation", batch.item_seeds)
