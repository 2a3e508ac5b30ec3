"""T-LoRA: LoRA whose rank falls with the noise, so that few clips are not learned by heart.

Soboleva et al., arXiv:2507.05964. On much noise, where the layout of a picture is decided, a LoRA
with all its ranks soon knows the layout of the training clips; with few it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field
from torch import nn
from torch.utils.hooks import RemovableHandle

from trainer.adapters.low_rank_adapter import LowRankAdapter, LowRankOptions
from trainer.adapters.rank_mask import RankMask, RankSchedule, TLoRALinear
from trainer.contract.adapter_start import TLORA_KEY
from trainer.contract.errors import ConfigError
from trainer.core.seams import BuildContext


class TLoRA(LowRankAdapter):
    """Trains a LoRA of which a timestep's share of the ranks acts.

    The file is an ordinary LoRA; that it is a T-LoRA its metadata say.
    """

    kind = "tlora"

    class Config(LowRankOptions):
        """Options of `[adapter] kind = "tlora"`."""

        min_rank: int = Field(1, ge=1)
        """Ranks that act on pure noise; all act on clean data."""
        rank_exponent: float = Field(1.0, gt=0, le=16)
        """Course of the rank between the two: 1 a straight line, more falls faster with noise."""
        full_rank_below: float = Field(0.0, ge=0, lt=1000)
        """All ranks act up to this timestep, beyond it the rank falls; 0 as in the paper."""

    config: TLoRA.Config

    def __init__(self, config: TLoRA.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self._following: RemovableHandle | None = None

    @cached_property
    def schedule(self) -> RankSchedule:
        """How many ranks act; all layers have the same rank, which is known once it is injected."""
        return RankSchedule(
            rank=self.rank_of(next(iter(self.plan))),
            min_rank=self.config.min_rank,
            exponent=self.config.rank_exponent,
            full_rank_below=self.config.full_rank_below,
        )

    @cached_property
    def _mask(self) -> RankMask:
        return RankMask(self.schedule)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same factors under another mask are another update."""
        schedule = self.schedule
        return {
            **super().facts,
            "min_rank": schedule.min_rank,
            "rank_exponent": schedule.exponent,
            "full_rank_below": schedule.full_rank_below,
        }

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Put the layers on, and watch the timesteps of the transformer's forwards.

        Raises:
            ConfigError: the patterns are wrong, or select a layer outside of the blocks.
        """
        super().inject(transformer, seed)
        outside = [name for name in self._layers if not name.startswith("blocks.")]
        if outside:
            self.remove()
            raise ConfigError(
                f"T-LoRA trains layers of the blocks; {outside[0]} is outside of them",
                hint='take it out of adapter.include, or use adapter.kind = "lora"',
            )
        self._following = self._mask.follow(transformer)

    def remove(self) -> None:
        """Take the adapter off the transformer again; the base stays frozen."""
        super().remove()
        if self._following is not None:
            self._following.remove()
            self._following = None

    def make_layer(self, name: str, base: nn.Module, seed: int) -> TLoRALinear:
        """Return a masked branch that adds nothing yet; initial factors are those of LoRA."""
        factors = self.first_factors(name, base, seed)
        scale, dropout = self.scale_of(name), self.config.dropout
        return TLoRALinear(base, *factors, scale, dropout, mask=self._mask)

    def file_metadata(self) -> dict[str, str]:
        """Return the schedule, by which `attach` masks again."""
        return {TLORA_KEY: self.schedule.in_words()}
