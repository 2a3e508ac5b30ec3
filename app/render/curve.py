"""A curve of many points in braille: the range of each column as a band, a smooth line on it.

Each character is 2 x 4 dots. The band goes from the smallest to the largest value of a column of
dots, so that a spike is seen however many steps there are; the line is an exponential average.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of a dot in its character: row, column."""
BRAILLE = 0x2800


@dataclass(frozen=True, slots=True)
class Cell:
    """One character of a curve."""

    char: str
    part: str
    """What is in it: `line`, `band`, `mark`, or empty."""


@dataclass(slots=True)
class Plot:
    """A curve laid out for so many characters.

    Attributes:
        rows: characters from top to bottom.
        low: value at the lower edge.
        high: value at the upper edge.
        first: step at the left edge.
        last: step at the right edge; there may be room behind the last step.
        per_column: steps in a character.
    """

    rows: list[list[Cell]]
    low: float
    high: float
    first: int
    last: float
    per_column: float

    def column_of(self, step: int) -> int:
        """Return the column of characters that a step is in."""
        return int((step - self.first) / self.per_column)

    def steps_in(self, column: int) -> tuple[int, int]:
        """Return the first and the last step in a column; of a narrow one, the nearest step."""
        start = self.first + column * self.per_column
        first = math.ceil(start - 1e-9)
        last = math.ceil(start + self.per_column - 1e-9) - 1
        return (first, last) if last >= first else (round(start), round(start))


@dataclass(slots=True)
class Point:
    """Neighbouring steps of a curve."""

    step: int
    """The first of them."""
    low: float
    """Smallest of their finite values; NaN where there is none."""
    high: float
    mean: float
    """The average when they were over."""
    end: int
    """The last of them."""


class Curve:
    """A series that grows, kept in a few thousand points however many steps it has.

    The average is exponential: 0 follows the values, 0.99 is very smooth. Its start is corrected as
    Adam's moments are, so that the first value does not weigh more. What is not finite is left out.
    """

    def __init__(self, smoothing: float = 0.9, most: int = 2048) -> None:
        self.points: list[Point] = []
        self._smoothing, self._most = smoothing, most
        self._per_point, self._in_last = 1, 0
        self._average = self._correction = 0.0

    def extend(self, steps: Iterable[int], values: Iterable[float]) -> None:
        """Add steps and their values."""
        weight, average, correction = self._smoothing, self._average, self._correction
        isfinite = math.isfinite
        for step, value in zip(steps, values, strict=True):
            finite = isfinite(value)
            if finite:
                average = weight * average + (1 - weight) * value
                correction = weight * correction + (1 - weight)
            mean = average / correction if correction else math.nan
            if not self.points or self._in_last == self._per_point:
                if len(self.points) == self._most:
                    self._halve()
                low = value if finite else math.nan
                self.points.append(Point(step, low, low, mean, step))
                self._in_last = 1
                continue
            self._in_last += 1
            point = self.points[-1]
            point.mean, point.end = mean, step
            if finite:
                _widen(point, value, value)
        self._average, self._correction = average, correction

    def _halve(self) -> None:
        pairs = zip(self.points[::2], self.points[1::2], strict=True)
        self.points = [_joined(first, second) for first, second in pairs]
        self._per_point *= 2
        self._in_last = self._per_point


def plot(
    points: Sequence[Point],
    width: int,
    height: int,
    *,
    log: bool = False,
    marks: Sequence[tuple[int, float]] = (),
    lowest: float | None = None,
    span: tuple[int, int] | None = None,
) -> Plot:
    """Lay out a curve.

    A column of dots holds a round number of steps, counted from the first: while steps are added,
    only the last column changes, until all are laid out anew. So there is room on the right.

    Args:
        points: of a `Curve`.
        width: characters.
        height: characters.
        log: the vertical axis is logarithmic; what is not positive is not drawn.
        marks: further points (step, value), each drawn as one character.
        lowest: value that the axis reaches down to; None: the smallest one.
        span: steps that are drawn; None: from the first to the last one of points and marks.
    """
    first, last = span or span_of(points, marks)
    columns = _Columns(first, last, width * 2)
    band: list[tuple[float, float] | None] = [None] * (width * 2)
    line: list[float] = [math.nan] * (width * 2)
    for point in points:
        column = columns.of(point.step)
        if _drawn(point.low, log):
            known = band[column]
            low, high = known or (point.low, point.high)
            band[column] = (min(low, point.low), max(high, point.high))
        line[column] = point.mean
    edges = [value for _, value in marks] + ([] if lowest is None else [lowest])
    low, high = _limits(band, line, edges, log=log)
    scale = _Scale(low, high, height * 4, log)
    bits = _draw(band, line, scale, width, height)
    cells = [[_cell(*bits[row][column]) for column in range(width)] for row in range(height)]
    for step, value in marks:
        if _drawn(value, log):
            cells[scale.row(value) // 4][columns.of(step) // 2] = Cell("o", "mark")
    return Plot(cells, low, high, first, columns.end, columns.per_dot * 2)


def overlay(
    curves: Sequence[tuple[str, Sequence[Point]]],
    width: int,
    height: int,
    *,
    log: bool = False,
    marks: Sequence[tuple[str, int, float]] = (),
) -> Plot:
    """Lay out the averages of several curves over one another, each in a character of its own.

    Args:
        curves: character and points of each; a later one is drawn over an earlier one.
        width: characters.
        height: characters.
        log: the vertical axis is logarithmic.
        marks: further points: character, step, value.
    """
    spans = [span_of(points, ()) for _, points in curves if points]
    spans += [(step, step) for _, step, _ in marks]
    first, last = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else (0, 1)
    columns = _Columns(first, last, width)
    lines = [_means(points, columns, width) for _, points in curves]
    values = [value for line in lines for value in line] + [value for _, _, value in marks]
    low, high = _limits((), values, (), log=log)
    scale = _Scale(low, high, height, log)
    cells = [[Cell(" ", "")] * width for _ in range(height)]
    for number, (char, _) in enumerate(curves):
        cell = Cell(char, f"line {number}")
        for column, start, end in _pieces(lines[number], scale):
            for row in range(min(start, end), max(start, end) + 1):
                cells[row][column] = cell
    for char, step, value in marks:
        if _drawn(value, log):
            cells[scale.row(value)][columns.of(step)] = Cell(char, "mark")
    return Plot(cells, low, high, first, columns.end, columns.per_dot)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`, at most `most` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low or most < 1:
        return [low] if math.isfinite(low) and most >= 1 else []
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= rough)
    start = math.ceil(low / step - 1e-9)
    places = range(start, start + most)
    # A product may be off by the spacing of floats, which counts where the range is that small.
    return [
        min(max(place * step, low), high) for place in places if place * step <= high + step * 1e-9
    ]


class _Columns:
    """Which column of dots a step is in."""

    def __init__(self, first: int, last: int, num: int) -> None:
        self._first, self._num = first, num
        self.per_dot = _round_up(max(last - first + 1, 1) / num)
        self.end = first + self.per_dot * num - 1

    def of(self, step: int) -> int:
        return min(max(int((step - self._first) / self.per_dot), 0), self._num - 1)


def _round_up(value: float) -> float:
    """Return the next number of 4, 5, 6, 7, 8 times a power of two."""
    power = 2.0 ** (math.floor(math.log2(value)) - 2)
    return math.ceil(value / power - 1e-9) * power


class _Scale:
    """Which row of dots a value is in, 0 at the top."""

    def __init__(self, low: float, high: float, num: int, log: bool) -> None:
        self._log, self._num = log, num
        self._low, high = self._place(low), self._place(high)
        self._height = high - self._low or 1.0

    def row(self, value: float) -> int:
        share = (self._place(value) - self._low) / self._height
        return min(max(round((1 - share) * (self._num - 1)), 0), self._num - 1)

    def _place(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self._log else value


def _widen(point: Point, low: float, high: float) -> None:
    if not low >= point.low:  # smaller, or the first value that is finite
        point.low = low
    if not high <= point.high:
        point.high = high


def _joined(first: Point, second: Point) -> Point:
    if math.isfinite(second.low):
        _widen(first, second.low, second.high)
    first.mean, first.end = second.mean, second.end
    return first


def span_of(points: Sequence[Point], marks: Sequence[tuple[int, float]]) -> tuple[int, int]:
    """Return the first and the last step of points and marks."""
    known = [step for step, _ in marks]
    known += [points[0].step, points[-1].end] if points else []
    return (min(known), max(known)) if known else (0, 1)


def _means(points: Sequence[Point], columns: _Columns, num: int) -> list[float]:
    line = [math.nan] * num
    for point in points:
        line[columns.of(point.step)] = point.mean
    return line


def _drawn(value: float, log: bool) -> bool:
    return math.isfinite(value) and (not log or value > 0)


def _limits(
    band: Sequence[tuple[float, float] | None],
    line: Sequence[float],
    marks: Sequence[float],
    *,
    log: bool,
) -> tuple[float, float]:
    known = [value for pair in band if pair for value in pair]
    known += [value for value in (*line, *marks) if _drawn(value, log)]
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return (low / 2, high * 2) if log else (low - room, high + room)
    return low, high


def _draw(
    band: Sequence[tuple[float, float] | None],
    line: Sequence[float],
    scale: _Scale,
    width: int,
    height: int,
) -> list[list[list[int]]]:
    """Return the dots of band and line of each character."""
    bits = [[[0, 0] for _ in range(width)] for _ in range(height)]

    def dot(column: int, row: int, layer: int) -> None:
        bits[row // 4][column // 2][layer] |= _DOTS[row % 4][column % 2]

    for column, pair in enumerate(band):
        if pair is not None:
            for row in range(scale.row(pair[1]), scale.row(pair[0]) + 1):
                dot(column, row, 0)
    for column, start, end in _pieces(line, scale):
        for row in range(min(start, end), max(start, end) + 1):
            dot(column, row, 1)
    return bits


def _pieces(line: Sequence[float], scale: _Scale) -> Iterator[tuple[int, int, int]]:
    """Yield column and rows of a line without gaps, also over columns that have no point."""
    before: tuple[int, int] | None = None
    for column, value in enumerate(line):
        if not math.isfinite(value):
            continue
        row = scale.row(value)
        if before is None:
            yield column, row, row
        else:
            past, last = before
            for between in range(past + 1, column + 1):
                now = round(last + (row - last) * (between - past) / (column - past))
                then = round(last + (row - last) * (between - 1 - past) / (column - past))
                yield between, then, now
        before = column, row


def _cell(band: int, line: int) -> Cell:
    if not band and not line:
        return Cell(" ", "")
    return Cell(chr(BRAILLE + (band | line)), "line" if line else "band")
