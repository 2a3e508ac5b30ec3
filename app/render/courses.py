"""The course of a learning rate, drawn and as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.render.curve import Curve, plot

Points = Sequence[tuple[int, float]]

AXIS = 10
"""Characters in front of the curve."""


def drawing(points: Points, width: int, height: int) -> Iterator[str]:
    """Yield the lines of a curve with its axes.

    Args:
        points: steps and learning rates.
        width: characters of a line.
        height: lines, without that of the steps.
    """
    curve = Curve(smoothing=0.0)
    curve.extend((step for step, _ in points), (rate for _, rate in points))
    drawn = plot(curve.points, max(width - AXIS, 4), height, lowest=0.0)
    for number, row in enumerate(drawn.rows):
        label = {0: f"{drawn.high:.3g}", height - 1: f"{drawn.low:.3g}"}.get(number, "")
        yield f"{label:>{AXIS - 2}} |" + "".join(cell.char for cell in row).rstrip()
    first, last = str(drawn.first), str(drawn.last)
    room = max(width - AXIS - len(first), len(last))
    yield " " * AXIS + first + last.rjust(room)


def rows(points: Points, warmup_steps: int, steps: int) -> Iterator[tuple[str, str]]:
    """Yield step and learning rate where something changes, and in between."""
    wanted = {1, warmup_steps, *(round(steps * share) for share in (0.25, 0.5, 0.75)), steps}
    known = dict(points)
    for step in sorted(wanted):
        nearest = min(known, key=lambda other: abs(other - step))
        if step >= 1 and nearest == step:
            yield str(step), f"{known[step]:.4g}"
