"""Dropout of text tokens: no single word can carry a caption.

A token's embedding becomes zeros, which is what Wan's padding is, so attention sees a token less.
Other trainers drop whole captions (`caption_dropout` of the dataset does) or, of models with
several text encoders, one encoder's embedding; Wan has one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.rng import generator as stream
from trainer.core.seams import BuildContext, Maturity, Technique
from trainer.core.types import Batch


class TextTokenDropout(Technique):
    """Set the embeddings of randomly chosen text tokens to zero."""

    maturity: ClassVar[Maturity] = Maturity.EXPERIMENTAL

    class Config(Options):
        """Options of `[[techniques]] name = "text_token_dropout"`."""

        token_share: float = Field(0.1, gt=0, lt=1)
        """Probability with which each token is dropped, anew at each appearance of an item."""

    def __init__(self, config: TextTokenDropout.Config, build: BuildContext) -> None:
        self.config = config
        self._seed = build.seed

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Drop tokens of each item, by the item's seed."""
        context = []
        for tokens_TD, item_seed in zip(batch.context, batch.item_seeds, strict=True):
            random = stream(self._seed, "text token dropout", item_seed)
            kept_T1 = torch.rand(tokens_TD.shape[0], 1, generator=random) >= self.config.token_share
            context.append(tokens_TD * kept_T1.to(tokens_TD))
        return replace(batch, context=tuple(context))
