"""MagCache (Ma et al., arXiv:2506.09045): by how the size of the blocks' work changes.

γ_i is the size of what the blocks add to the tokens at step i over that at step i - 1, measured
once. Where it stays near 1 for some steps, the direction does, too, and the last one will do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

from torch import Tensor, nn

from trainer.contract.denoising_options import DenoisingOptions
from trainer.sampling.guidance import NEGATIVE, POSITIVE
from trainer.sampling.step_cache.drift import Drift, first_step
from trainer.sampling.step_cache.values import ExpertValues

THRESHOLD: Final = 0.12
MAX_SKIPS: Final = 2
_RETAINED: Final = 0.2


class MagCache:
    """A `StepCacheMethod`."""

    @staticmethod
    def lacks(options: DenoisingOptions, values: ExpertValues, names: Collection[str]) -> bool:
        """Return whether a pass has no ratios."""
        return any(_measured(name) not in values.magcache for name in names)

    @staticmethod
    def drift(
        options: DenoisingOptions,
        values: ExpertValues,
        transformer: nn.Module,
        timesteps_S: Tensor,
    ) -> Drift:
        """Return the drift: Σ |1 - Π γ| over the steps since the last computed one."""
        num_steps = len(timesteps_S)
        ratios = {name: resampled(known, num_steps) for name, known in values.magcache.items()}

        def estimate(name: str, since: int, index: int) -> float:
            product, error = 1.0, 0.0
            for ratio in ratios[_measured(name)][since + 1 : index + 1]:
                product *= ratio
                error += abs(1 - product)
            return error

        threshold, skips = options.step_cache_threshold, options.step_cache_max_skips
        return Drift(
            estimate=estimate,
            threshold=THRESHOLD if threshold is None else threshold,
            max_skips=MAX_SKIPS if skips is None else skips,
            first=first_step(options.step_cache_start, num_steps, math.ceil(_RETAINED * num_steps)),
            last=num_steps,
        )


def resampled(ratios: Sequence[float], num_steps: int) -> list[float]:
    """Return ratios for another number of steps: each step takes those of the nearest one."""
    if num_steps == 1:
        return [ratios[-1]]
    stretch = (len(ratios) - 1) / (num_steps - 1)
    return [ratios[round(index * stretch)] for index in range(num_steps)]


def _measured(name: str) -> str:
    """Return the pass whose ratios are used: what is not negative has the prompt."""
    return NEGATIVE if name == NEGATIVE else POSITIVE
