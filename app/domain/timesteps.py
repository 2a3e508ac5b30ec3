"""What timesteps a config trains at, how often, and how much they count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.experts import (
    boundary_of,
    expert_timesteps,
    for_expert,
    known_turns,
    trained_experts,
    trains_both,
)
from trainer.contract.loss_weights import Weight, weight_of
from trainer.contract.memory_model.workload import variant_of
from trainer.contract.sigma_distributions import MixtureSigma, SigmaDistribution
from trainer.contract.timestep_mass import (
    base_distribution,
    depends_on_size,
    source_frame_tokens,
    within,
)
from trainer.contract.variants import Variant

PERCENTILES = (5, 25, 50, 75, 95)
_MEAN_POINTS = 400
"""Quantiles that the mean weight is taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A range of timesteps."""

    low: float
    high: float
    share: float
    """Of the transformer's draws, in [0, 1]."""
    weight: float
    """Of the loss in the middle of the range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRange:
    """What one transformer is trained at; timesteps from 0 (clean) to 1000 (noise)."""

    expert: str | None
    low: float
    high: float
    steps_share: float | None
    """Of the run's steps, where two experts take turns."""
    bins: tuple[Bin, ...]
    percentiles: dict[int, float]
    """Timestep that so many percent of the draws are below."""
    mean_weight: float
    """Of the loss over the draws."""

    def to_json(self) -> dict[str, Any]:
        """Return what a script reads."""
        return {
            "expert": self.expert,
            "min_timestep": self.low,
            "max_timestep": self.high,
            "steps_share": self.steps_share,
            "percentiles": {str(key): value for key, value in self.percentiles.items()},
            "mean_weight": self.mean_weight,
            "bins": [
                {"low": one.low, "high": one.high, "share": one.share, "weight": one.weight}
                for one in self.bins
            ],
        }


def trained_ranges(config: RunConfig, num_bins: int) -> tuple[TrainedRange, ...]:
    """Return what each trained transformer is trained at, each range in equal bins.

    Raises:
        ConfigError: it goes by the variant or the dataset, and that cannot be told.
    """
    experts = trained_experts(config)
    variant = variant_of(config) if experts or depends_on_size(config) else None
    if not experts:
        objective = config.objective
        low, high = objective.min_timestep, objective.max_timestep
        ends = (0.0 if low is None else low, 1000.0 if high is None else high)
        return (_range(config, variant, None, ends, None, num_bins),)
    boundary = boundary_of(config, variant)
    turns = known_turns(config, boundary, variant) if trains_both(config) else None
    return tuple(
        _range(
            for_expert(config, expert, boundary),
            variant,
            expert,
            expert_timesteps(config, expert, boundary),
            turns.share_of(expert) if turns else None,
            num_bins,
        )
        for expert in experts
    )


def _range(
    config: RunConfig,
    variant: Variant | None,
    expert: str | None,
    ends: tuple[float, float],
    steps_share: float | None,
    num_bins: int,
) -> TrainedRange:
    low, high = ends
    drawn = within(
        _over_sources(config, variant),
        low / 1000,
        high / 1000,
        preserve_shape=config.objective.preserve_distribution_shape,
    )
    weight = weight_of(config)
    points = ((place + 0.5) / _MEAN_POINTS for place in range(_MEAN_POINTS))
    return TrainedRange(
        expert=expert,
        low=low,
        high=high,
        steps_share=steps_share,
        bins=tuple(_bins(drawn, weight, low, high, num_bins)),
        percentiles={one: 1000 * drawn.quantile(one / 100) for one in PERCENTILES},
        mean_weight=sum(weight(drawn.quantile(point)) for point in points) / _MEAN_POINTS,
    )


def _over_sources(config: RunConfig, variant: Variant | None) -> SigmaDistribution:
    """Return the sampler's distribution; one by size as the mean over the dataset's sources."""
    if not depends_on_size(config):
        return base_distribution(config, 0)
    sizes = source_frame_tokens(config, variant)
    each = [base_distribution(config, size) for size in sizes]
    return each[0] if len(each) == 1 else MixtureSigma(tuple((1 / len(each), e) for e in each))


def _bins(
    drawn: SigmaDistribution, weight: Weight, low: float, high: float, num: int
) -> Iterator[Bin]:
    edges = [low + (high - low) * place / num for place in range(num + 1)]
    for start, end in pairwise(edges):
        yield Bin(
            low=start,
            high=end,
            share=drawn.above(start / 1000) - drawn.above(end / 1000),
            weight=weight((start + end) / 2000),
        )
