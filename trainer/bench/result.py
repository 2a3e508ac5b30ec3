"""What a benchmark found, and how two ways of doing a thing are timed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Timed = tuple[float, float]
"""Seconds of processor time, seconds of the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One figure, its limit, and the figures behind it."""

    name: str
    what: str
    value: float
    unit: Literal["ratio", "s"]
    limit: float | None
    """`value` should be at most this; None: it is only recorded."""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def fine(self) -> bool:
        """Whether the limit holds."""
        return self.limit is None or self.value <= self.limit

    @property
    def fields(self) -> dict[str, Any]:
        """Everything, for an event."""
        return {
            "name": self.name,
            "what": self.what,
            "value": round(self.value, 4),
            "unit": self.unit,
            "limit": self.limit,
            "fine": self.fine,
            **self.figures,
        }


def timed_in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int
) -> list[tuple[Timed, Timed]]:
    """Time both once a pair, so that load on the machine hits both alike; who starts alternates.

    Returns:
        (ours, theirs) for each pair.
    """
    results = []
    for index in range(pairs):
        if index % 2:
            first = _timed(ours)
            results.append((first, _timed(theirs)))
        else:
            first = _timed(theirs)
            results.append((_timed(ours), first))
    return results


def _timed(step: Callable[[], object]) -> Timed:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall
