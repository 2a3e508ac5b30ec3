"""Whether cached latents look as the VAE makes them: figures of each item, and which stand out.

Latents are stored normalised: over the VAE's own training data every channel has mean 0 and
variance 1. An item is far from that when its clip is unusual (black, a still, noise) or when
something went wrong on the way (NaN, another VAE's normalisation).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEAR_CONSTANT = 0.1
"""Standard deviation below which an item shows next to nothing."""
FAR_FROM_UNIT = 3.0
"""Factor from 1 at which an item's spread is not what the VAE's normalisation should give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFigures:
    """One item; of values that are finite."""

    name: str
    mean: float
    std: float
    low: float
    high: float
    not_finite: int
    """Values that are NaN or infinite."""
    channel_sums: tuple[float, ...]
    channel_squares: tuple[float, ...]
    per_channel: int
    """Values in each channel."""


def figures_of(name: str, latents_CFHW: Tensor) -> LatentFigures:
    """Return the figures of an item, computed in float64."""
    values = latents_CFHW.to(torch.float64).flatten(1)
    finite = torch.isfinite(values)
    clean = torch.where(finite, values, 0.0)
    kept = values[finite]
    if not kept.numel():
        kept = torch.zeros(1, dtype=torch.float64)
    return LatentFigures(
        name=name,
        mean=float(kept.mean()),
        std=float(kept.std(correction=0)),
        low=float(kept.min()),
        high=float(kept.max()),
        not_finite=int((~finite).sum()),
        channel_sums=tuple(clean.sum(1).tolist()),
        channel_squares=tuple(clean.square().sum(1).tolist()),
        per_channel=values.shape[1],
    )


def latent_report(items: Sequence[LatentFigures], z_limit: float) -> dict[str, Any]:
    """Return figures of all items together, of each channel, and the items that stand out.

    An item's z-score is the modified one of Iglewicz and Hoaglin (1993), 0.6745 · (x - median) /
    MAD, of its mean and of its standard deviation among the items; robust, since a few bad items
    do not move median and MAD. It is None where more than half of the items are alike.

    Args:
        items: all with the same number of channels.
        z_limit: items beyond this stand out; 3.5 is the authors' value.
    """
    means, stds = _z_scores([i.mean for i in items]), _z_scores([i.std for i in items])
    rows = [
        {
            "name": item.name,
            "mean": _short(item.mean),
            "std": _short(item.std),
            "min": _short(item.low),
            "max": _short(item.high),
            "not_finite": item.not_finite,
            "z_mean": _short(z_mean),
            "z_std": _short(z_std),
            "findings": list(_findings(item, z_mean, z_std, z_limit)),
        }
        for item, z_mean, z_std in zip(items, means, stds, strict=True)
    ]
    channels = _channels(items)
    count = sum(item.per_channel for item in items)
    total = sum(sum(item.channel_sums) for item in items) / (count * len(channels))
    square = sum(sum(item.channel_squares) for item in items) / (count * len(channels))
    return {
        "mean": _short(total),
        "std": _short(_deviation(total, square)),
        "not_finite": sum(item.not_finite for item in items),
        "channels": channels,
        "items": rows,
        "outliers": sum(bool(row["findings"]) for row in rows),
    }


def _channels(items: Sequence[LatentFigures]) -> list[dict[str, float | None]]:
    count = sum(item.per_channel for item in items)
    sums = [sum(part) for part in zip(*(item.channel_sums for item in items), strict=True)]
    squares = [sum(part) for part in zip(*(item.channel_squares for item in items), strict=True)]
    return [
        {"mean": _short(one / count), "std": _short(_deviation(one / count, two / count))}
        for one, two in zip(sums, squares, strict=True)
    ]


def _findings(
    item: LatentFigures, z_mean: float | None, z_std: float | None, z_limit: float
) -> Iterable[str]:
    if item.not_finite:
        yield f"{item.not_finite} values are NaN or infinite"
    if item.std < NEAR_CONSTANT:
        yield f"shows next to nothing: its standard deviation is {item.std:.3g}"
    elif not 1 / FAR_FROM_UNIT < item.std < FAR_FROM_UNIT:
        yield f"its standard deviation {item.std:.3g} is far from the VAE's 1"
    if z_mean is not None and abs(z_mean) > z_limit:
        yield f"its mean {item.mean:.3g} stands out (z {z_mean:+.1f})"
    if z_std is not None and abs(z_std) > z_limit:
        yield f"its standard deviation {item.std:.3g} stands out (z {z_std:+.1f})"


def _z_scores(values: Sequence[float]) -> list[float | None]:
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    if spread == 0:
        return [None] * len(values)
    return [0.6745 * (value - middle) / spread for value in values]


def _deviation(mean: float, square: float) -> float:
    return math.sqrt(max(square - mean * mean, 0.0))


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
