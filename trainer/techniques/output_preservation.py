"""Differential output preservation: a trigger word learns, its class stays what it was.

A share of the items whose captions have the trigger is shown with the class word in its place, and
their target is what the model without the adapter predicts for that. So the difference between "sks
dog" and "dog" is learned, and not a new look of all dogs. Ostris' ai-toolkit ("differential output
preservation") adds the same distance as a second term to every step; of a share of the items, see
`blank_prompt_preservation`. It takes the place of the class images of DreamBooth (Ruiz et al.,
arXiv:2208.12242), section 3.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.contract.errors import ConfigError
from trainer.contract.options import Options
from trainer.core.preservation import chosen_items, replace_rows
from trainer.core.seams import BuildContext, Maturity, Need, Predict, Technique
from trainer.core.types import Batch, NoisyInput


class OutputPreservation(Technique):
    """Train a share of the items on the untrained model's answer to the class word."""

    reference: ClassVar[str] = "ai-toolkit, diff_output_preservation"
    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL
    needs: ClassVar[frozenset[Need]] = frozenset({Need.BASE_MODEL})

    class Config(Options):
        """Options of `[[techniques]] name = "output_preservation"`."""

        trigger: str = Field(min_length=1)
        """Word or words of the captions that stand for what is learned, as they are written."""
        class_word: str
        """What stands in their place where the model shall stay as it was, e.g. `dog`."""
        class_share: float = Field(0.25, gt=0, lt=1)
        """p: share of the items that keep instead of learn."""

    config: Config

    def __init__(self, config: OutputPreservation.Config, build: BuildContext) -> None:
        self.config = config
        self._build = build
        self._kept: list[bool] = []
        """Which items of the batch that was edited last keep what they were."""

    @classmethod
    def texts(cls, options: Options, captions: Iterable[str]) -> Iterable[str]:
        """Return the captions that have the trigger, with the class word in its place.

        Raises:
            ConfigError: none has it.
        """
        assert isinstance(options, cls.Config)
        found = [other for one in captions if (other := _rewritten(options, one)) is not None]
        if not found:
            raise ConfigError(
                f"no caption of the dataset has the trigger {options.trigger!r}",
                hint="write it as whole words of the captions; upper and lower case are alike",
            )
        return found

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Give the chosen items that have the trigger their captions with the class word."""
        share, seed = self.config.class_share, self._build.seed
        chosen = chosen_items(share, seed, "output preservation", batch.item_seeds)
        others = [
            _rewritten(self.config, caption) if keeps else None
            for keeps, caption in zip(chosen, batch.captions, strict=True)
        ]
        self._kept = [other is not None for other in others]
        context = tuple(
            own if other is None else self._build.encoded(other).to(own)
            for own, other in zip(batch.context, others, strict=True)
        )
        captions = tuple(
            own if other is None else other
            for own, other in zip(batch.captions, others, strict=True)
        )
        return replace(batch, context=context, captions=captions)

    def edit_target(
        self, target: Tensor, batch: Batch, noisy: NoisyInput, predict_base: Predict
    ) -> Tensor:
        """Replace these items' targets by the untrained model's prediction."""
        if not any(self._kept):
            return target
        return replace_rows(target, predict_base(noisy, batch), self._kept)

    def asks_base(self, batch: Batch) -> bool:
        """Tell whether an item of the batch that was edited last keeps what it was."""
        return any(self._kept)


def _rewritten(options: OutputPreservation.Config, caption: str) -> str | None:
    """Return a caption with the class word for the trigger; None: the trigger is not in it."""
    pattern = rf"(?<!\w){re.escape(options.trigger)}(?!\w)"
    other, count = re.subn(pattern, lambda _: options.class_word, caption, flags=re.IGNORECASE)
    return other if count else None
