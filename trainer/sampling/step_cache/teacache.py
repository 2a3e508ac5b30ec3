"""TeaCache (Liu et al., arXiv:2411.19108): by how far the timestep's embedding moves.

The distance of the embeddings of two steps, through a polynomial, estimates that of what the
blocks make of them; it is summed up until a step is worth computing.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import accumulate
from typing import Final

from torch import Tensor, nn

from trainer.contract.denoising_options import DenoisingOptions
from trainer.sampling.step_cache.drift import Drift, first_step, input_distances
from trainer.sampling.step_cache.values import ExpertValues, Form

THRESHOLD: Final = 0.15
"""For values without one of their own: those that were measured."""
_RETAINED: Final = 0.1


class TeaCache:
    """A `StepCacheMethod`."""

    @staticmethod
    def lacks(options: DenoisingOptions, values: ExpertValues, names: Collection[str]) -> bool:
        """Return whether there is no polynomial; it is one for all passes."""
        return _form(options) not in values.teacache

    @staticmethod
    def drift(
        options: DenoisingOptions,
        values: ExpertValues,
        transformer: nn.Module,
        timesteps_S: Tensor,
    ) -> Drift:
        """Return the drift: the sum of the polynomial over the steps since the last computed one.

        Plain, the first and the last step are always computed; with retention a tenth at the start.
        """
        form, num_steps = _form(options), len(timesteps_S)
        polynomial = values.teacache[form]
        distances = input_distances(transformer, timesteps_S, form)
        sums = list(accumulate(polynomial(distance) for distance in distances))
        threshold = options.step_cache_threshold
        if threshold is None:
            threshold = values.teacache_threshold
        retained = math.ceil(_RETAINED * num_steps) if form == "retention" else 1
        return Drift(
            estimate=lambda _name, since, index: sums[index] - sums[since],
            threshold=THRESHOLD if threshold is None else threshold,
            max_skips=options.step_cache_max_skips,
            first=first_step(options.step_cache_start, num_steps, retained),
            last=num_steps if form == "retention" else num_steps - 1,
        )


def _form(options: DenoisingOptions) -> Form:
    return "retention" if options.step_cache_retention else "plain"
