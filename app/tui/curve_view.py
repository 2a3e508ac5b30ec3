"""Curves with axes, of which only what has changed is drawn again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from app.render.curve import Cell, Plot, Point, overlay, plot, span_of, ticks

AXIS = 9
"""Columns of the vertical axis."""
AXIS_PART = "axis"
CURSOR = " cursor"
"""Ending of the part of a cell that the cursor is on."""
COLOURS = {
    "line": "accent",
    "band": "primary",
    "mark": "success",
    AXIS_PART: "muted",
    "line 0": "accent",
    "line 1": "primary",
    "line 2": "success",
    "line 3": "warning",
}
"""Part of a cell -> colour of the theme; all of them differ in their character, too."""

Row = list[Cell]


class CurveView(Widget):
    """What is drawn in characters, with a vertical axis, and steps below it.

    Args:
        steps_below: the last line has the steps.
    """

    DEFAULT_CSS = "CurveView { height: 1fr; min-height: 3; }"
    logarithmic = reactive(False, repaint=False)
    cursor: reactive[int | None] = reactive(None, repaint=False)
    """Column that is read; None: none."""

    def __init__(self, *, steps_below: bool = True, id: str | None = None) -> None:  # noqa: A002  (Textual's own name)
        super().__init__(id=id)
        self._steps_below = steps_below
        self._rows: list[Row] = []
        self._plot: Plot | None = None
        self._part_styles: dict[tuple[str, str], Style] = {}

    def draw(self, width: int, height: int) -> Plot | None:
        """Lay out what is shown, in so many characters; None: there is nothing yet."""
        raise NotImplementedError

    @property
    def last_step(self) -> int | None:
        """The last step that is shown."""
        raise NotImplementedError

    def redraw(self) -> None:
        """Draw what has changed."""
        before, self._rows = self._rows, self._laid_out()
        if len(before) != len(self._rows):
            self.refresh()
            return
        for number, (old, new) in enumerate(zip(before, self._rows, strict=True)):
            changed = _changed(old, new)
            if changed is not None:
                self.refresh(Region(changed[0], number, changed[1] - changed[0], 1))

    def steps_at_cursor(self) -> tuple[int, int] | None:
        """Return the first and the last step under the cursor; None without one."""
        last = self.last_step
        if self.cursor is None or self._plot is None or last is None:
            return None
        start, end = self._plot.steps_in(self.cursor)
        start = min(max(start, self._plot.first), last)
        return start, min(max(end, start), last)

    def move_cursor(self, by: int) -> None:
        """Move the cursor; it comes from the last step."""
        if self._plot is None or self.last_step is None:
            return
        end = self._plot.column_of(self.last_step)
        start = end + 1 if self.cursor is None and by < 0 else self.cursor or 0
        self.cursor = min(max(start + by, 0), end)

    def watch_logarithmic(self) -> None:
        """Draw with the other axis."""
        self.redraw()

    def watch_cursor(self) -> None:
        """Draw the cursor where it is now."""
        self.redraw()

    def on_resize(self) -> None:
        """Draw for the new size."""
        self.redraw()

    def render_line(self, y: int) -> Strip:
        """Return a line as it was laid out."""
        base = self.rich_style
        width = self.size.width
        if y >= len(self._rows):
            return Strip.blank(width, base)
        segments = [
            Segment("".join(cell.char for cell in cells), base + self._style(part))
            for part, cells in groupby(self._rows[y], key=lambda cell: cell.part)
        ]
        return Strip(segments).adjust_cell_length(width, base)

    def _laid_out(self) -> list[Row]:
        width = self.size.width - AXIS
        height = self.size.height - self._steps_below
        if width < 4 or height < 2:
            return []
        self._plot = self.draw(width, height)
        if self._plot is None:
            return [_cells("no steps yet")]
        labels = _labels(self._plot, height, log=self.logarithmic)
        rows = []
        for number, row in enumerate(self._plot.rows):
            shown = row
            if self.cursor is not None and self.cursor < width:
                shown = row.copy()
                under = shown[self.cursor]
                shown[self.cursor] = Cell(under.char, under.part + CURSOR)
            rows.append([*_cells(f"{labels.get(number, ''):>{AXIS - 2}} |"), *shown])
        if self._steps_below:
            rows.append(_cells(_steps_line(self._plot, width)))
        return rows

    def _style(self, part: str) -> Style:
        key = (self.app.theme, part)
        if key not in self._part_styles:
            name = COLOURS.get(part.removesuffix(CURSOR), "")
            style = colour_style(self.app.theme_variables, name)
            self._part_styles[key] = style + Style(reverse=True) if part.endswith(CURSOR) else style
        return self._part_styles[key]


class SeriesCurve(CurveView):
    """One series: each column's range as a band, an average as the line, measurements as `o`."""

    def __init__(self, *, steps_below: bool = True, id: str | None = None) -> None:  # noqa: A002
        super().__init__(steps_below=steps_below, id=id)
        self._points: Sequence[Point] = ()
        self._marks: Sequence[tuple[int, float]] = ()
        self._span: tuple[int, int] | None = None

    def show(
        self,
        points: Sequence[Point],
        marks: Sequence[tuple[int, float]] = (),
        span: tuple[int, int] | None = None,
    ) -> None:
        """Draw points, and single measurements on them, over the steps of `span`."""
        self._points, self._marks, self._span = points, marks, span
        self.redraw()

    @property
    def last_step(self) -> int | None:
        """The last step that is shown."""
        if self._span is not None:
            return self._span[1]
        return span_of(self._points, self._marks)[1] if self._points or self._marks else None

    def draw(self, width: int, height: int) -> Plot | None:
        """Lay out the series."""
        if not self._points and not self._marks:
            return None
        log = self.logarithmic
        return plot(self._points, width, height, log=log, marks=self._marks, span=self._span)


class OverlaidCurves(CurveView):
    """The averages of several series over one another, each in its own character."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._curves: Sequence[tuple[str, Sequence[Point]]] = ()
        self._marks: Sequence[tuple[str, int, float]] = ()

    def show(
        self,
        curves: Sequence[tuple[str, Sequence[Point]]],
        marks: Sequence[tuple[str, int, float]] = (),
    ) -> None:
        """Draw series: character and points of each; and measurements: character, step, value."""
        self._curves, self._marks = curves, marks
        self.redraw()

    @property
    def last_step(self) -> int | None:
        """The last step that is shown."""
        ends = [points[-1].end for _, points in self._curves if points]
        return max([*ends, *(step for _, step, _ in self._marks)], default=None)

    def draw(self, width: int, height: int) -> Plot | None:
        """Lay out the series."""
        if self.last_step is None:
            return None
        return overlay(self._curves, width, height, log=self.logarithmic, marks=self._marks)


def short(value: float) -> str:
    """Return a number as it stands at an axis."""
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}"


def colour_style(theme: Mapping[str, str], name: str) -> Style:
    """Return the style of a colour of the theme; none where it is the terminal's own."""
    colour = theme.get(name) or ""
    return Style(color=colour) if colour.startswith("#") else Style()


def _labels(drawn: Plot, height: int, *, log: bool) -> dict[int, str]:
    labels = {0: short(drawn.high), height - 1: short(drawn.low)}
    if height >= 7 and not log:
        middle = (height - 1) // 2
        labels[middle] = short(drawn.high - (drawn.high - drawn.low) * (middle + 0.5) / height)
    return labels


def _steps_line(drawn: Plot, width: int) -> str:
    line = [" "] * (width + AXIS)
    end = 0
    for tick in ticks(drawn.first, drawn.last, max(width // 12, 1)):
        if tick != round(tick):  # there are no halves of steps
            continue
        words = short(tick)
        start = AXIS + min(drawn.column_of(round(tick)), width - len(words))
        if start >= end:
            line[start : start + len(words)] = words
            end = start + len(words) + 2
    return "".join(line)


def _cells(text: str) -> Row:
    return [Cell(char, AXIS_PART) for char in text]


def _changed(old: Row, new: Row) -> tuple[int, int] | None:
    """Return from where to where two rows differ."""
    if old == new:
        return None
    if len(old) != len(new):
        return 0, max(len(old), len(new))
    places = [place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    return places[0], places[-1] + 1
