"""Keeps what the blocks added to the tokens at the last computed step, and uses it again.

All decisions depend on timesteps and on what is known of the model, never on the latents: ranks
that share a video decide alike, each for its own tokens.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.contract.denoising_options import DenoisingOptions
from trainer.contract.variants import Expert
from trainer.models.block_stack import Around
from trainer.sampling.guidance import Pass, Step
from trainer.sampling.step_cache.drift import Drift, StepCacheMethod
from trainer.sampling.step_cache.values import ExpertValues


class BlockObserver(Protocol):
    """Sees what the blocks do in the passes of a video, and may stand in for them."""

    def begin(self, step: Step, transformer: nn.Module, timesteps_S: Tensor) -> None:
        """Prepare for a step.

        Args:
            step: the step.
            transformer: its expert.
            timesteps_S: of all steps of this expert.
        """
        ...

    def stands_in(self, step: Step, name: str, what: Pass) -> bool:
        """Return whether the blocks need not run for pass `name`."""
        ...

    def around(self, step: Step, group: Mapping[str, Pass], stands_in: bool) -> Around:
        """Return what surrounds the blocks for passes that run as one batch, in this order."""
        ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the blocks added to the tokens, (B, L, D), and the expert's step at which."""

    residual_BLD: Tensor
    step: int


class StepCache:
    """A `BlockObserver` for one video."""

    def __init__(
        self,
        method: type[StepCacheMethod],
        options: DenoisingOptions,
        values: Mapping[Expert, ExpertValues],
    ) -> None:
        self._method = method
        self._options = options
        self._values = values
        self._expert: Expert | None = None
        self._first_index = 0
        self._drift: Drift | None = None
        self._kept: dict[tuple[str, Pass], _Kept] = {}

    def begin(self, step: Step, transformer: nn.Module, timesteps_S: Tensor) -> None:
        """Forget everything where another expert takes over."""
        if step.expert == self._expert:
            return
        self._expert, self._first_index, self._kept = step.expert, step.index, {}
        self._drift = self._method.drift(
            self._options, self._values[step.expert], transformer, timesteps_S
        )

    def stands_in(self, step: Step, name: str, what: Pass) -> bool:
        """Return whether pass `name` may use what it computed last.

        Steps at which guidance did not ask for it count as skipped.
        """
        kept = self._kept.get((name, what))
        if kept is None or self._drift is None:
            return False
        return self._drift.allows(name, kept.step, step.index - self._first_index)

    def around(self, step: Step, group: Mapping[str, Pass], stands_in: bool) -> Around:
        """Return what adds the kept residuals, or keeps those that the blocks make."""
        keys = list(group.items())

        def reuse(tokens_BLD: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            return tokens_BLD + torch.cat([self._kept[key].residual_BLD for key in keys])

        def keep(tokens_BLD: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            for key in keys:  # the old ones would be in memory for nothing
                self._kept.pop(key, None)
            result = run(tokens_BLD)
            self._keep(keys, result - tokens_BLD, step.index - self._first_index)
            return result

        return reuse if stands_in else keep

    def _keep(self, keys: Sequence[tuple[str, Pass]], residual_BLD: Tensor, step: int) -> None:
        for key, part in zip(keys, residual_BLD.chunk(len(keys)), strict=True):
            self._kept[key] = _Kept(part, step)
