"""Trained timesteps as rows with bars, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.domain.timesteps import TrainedRange
from trainer.contract.config import RunConfig
from trainer.contract.timestep_mass import sampler_options

BAR = 30
HEADERS = ("TIMESTEPS", "SHARE", "WEIGHT", "DRAWS")


def headers(ranges: Sequence[TrainedRange]) -> tuple[str, ...]:
    """Return the head of the table; the expert's name comes first where there are experts."""
    return ("EXPERT", *HEADERS) if ranges[0].expert else HEADERS


def rows(ranges: Sequence[TrainedRange]) -> Iterator[tuple[str, ...]]:
    """Yield a row a bin; the bar is as long as the share, the longest one fills the column."""
    for one in ranges:
        largest = max(part.share for part in one.bins) or 1.0
        for number, part in enumerate(one.bins):
            cells = (
                f"{part.low:.0f} - {part.high:.0f}",
                f"{part.share:.1%}",
                f"{part.weight:.2f}",
                "#" * round(BAR * part.share / largest),
            )
            yield (one.expert if number == 0 else "", *cells) if one.expert else cells


def summary(config: RunConfig, ranges: Sequence[TrainedRange]) -> Iterator[str]:
    """Yield what the table is of, then each transformer's range, middle and weight."""
    section = config.objective
    options = ", ".join(f"{name} {value:g}" for name, value in sampler_options(config).items())
    line = f"Sampler {section.timestep_sampler}" + (f" ({options})" if options else "")
    buckets = section.num_timestep_buckets
    if buckets is not None:
        each = (
            "as many buckets as an epoch has items" if buckets == "epoch" else f"{buckets} buckets"
        )
        line += f", in turn from {each}"
    yield f"{line}; weighting {section.weighting}."
    for one in ranges:
        yield _range_words(one)


def _range_words(one: TrainedRange) -> str:
    name = f"{one.expert}: timesteps" if one.expert else "Timesteps"
    words = f"{name} {one.low:g} to {one.high:g}"
    if one.steps_share is not None:
        words += f", {one.steps_share:.1%} of the steps"
    low, middle, high = (one.percentiles[percent] for percent in (5, 50, 95))
    words += f"; half of the draws are below {middle:.0f}, nine of ten from {low:.0f} to {high:.0f}"
    return f"{words}; mean weight {one.mean_weight:.2f}."
