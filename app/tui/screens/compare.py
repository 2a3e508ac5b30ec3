"""Runs beside one another: curves over one another, figures, and the options that differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from app.domain.comparison import BEST, UNLIKE
from app.domain.run_comparison import ComparedRun, config_rows, figure_rows, read_runs
from app.render.curve import Curve
from app.tui.curve_view import OverlaidCurves
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed
from app.tui.widgets import Titles
from trainer.contract.run_dir import RunDir

LINES = "*+x#%@"
"""Characters of the curves, one a run."""
MARKS = "ABCDEF"
"""Of their validation losses."""
MOST = len(LINES)
SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


class CompareScreen(Fitting, Keyed, ModalScreen[None]):
    """Two runs or more, as they were when the screen was opened."""

    DEFAULT_CSS = """
    CompareScreen #legend { height: auto; max-height: 6; padding: 0 1; }
    CompareScreen #cursor { height: 1; padding: 0 1; }
    CompareScreen #curves { height: 1fr; min-height: 6; }
    CompareScreen VerticalScroll { height: 1fr; min-height: 6; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "close", "Back"),
        Binding("left", "cursor(-1)", "Cursor", show=False),
        Binding("right", "cursor(1)", "Cursor", show=False),
        Binding("shift+left", "cursor(-10)", "Cursor", show=False),
        Binding("shift+right", "cursor(10)", "Cursor", show=False),
        Binding("L", "logarithm", "Log y"),
        Binding("plus", "smooth(1)", "Smoother", key_display="+"),
        Binding("minus", "smooth(-1)", "Rougher", show=False),
        Binding("j", "scroll(1)", "Down", show=False),
        Binding("k", "scroll(-1)", "Up", show=False),
        Binding("r", "read_again", "Read again"),
    ]

    class Read(Message):
        """The runs were read."""

        def __init__(self, found: Sequence[ComparedRun]) -> None:
            super().__init__()
            self.found = found

    def __init__(self, runs: Sequence[RunDir]) -> None:
        super().__init__()
        self._runs = list(runs)[:MOST]
        self._found: Sequence[ComparedRun] = ()
        self._smoothing = 5

    def compose(self) -> ComposeResult:
        """Lay out legend, curves, readings and the table."""
        yield Titles("jobs", f"compare {len(self._runs)} runs")
        yield Static("reading ...", id="legend")
        yield OverlaidCurves(id="curves")
        yield Static(id="cursor")
        with VerticalScroll():
            yield Static(id="table")
        yield Footer()

    def on_mount(self) -> None:
        """Read the runs."""
        self.action_read_again()

    def action_read_again(self) -> None:
        """Read what the runs have told since."""
        self._read()

    @work(thread=True, exclusive=True, group="runs")
    def _read(self) -> None:
        self.post_message(self.Read(read_runs(self._runs)))

    @on(Read)
    def show(self, message: Read) -> None:
        """Show what was read."""
        self._found = message.found
        legend = Text()
        for number, run in enumerate(self._found):
            legend.append("\n" if number else "")
            legend.append(f"{LINES[number]} {run.label}", style="bold")
            validation = f", validation {MARKS[number]}" if run.validation else ""
            note = f"   ({run.note})" if run.note else ""
            legend.append(f"  average of the loss{validation}{note}")
        legend.no_wrap, legend.overflow = True, "ellipsis"
        self.query_one("#legend", Static).update(legend)
        self.query_one("#table", Static).update(_table(self._found))
        self._draw()

    def action_cursor(self, by: int) -> None:
        """Read the runs at a step."""
        self.query_one(OverlaidCurves).move_cursor(by)
        self._read_cursor()

    def action_logarithm(self) -> None:
        """Change the vertical axis."""
        curves = self.query_one(OverlaidCurves)
        curves.logarithmic = not curves.logarithmic

    def action_smooth(self, by: int) -> None:
        """Average over more or fewer steps."""
        self._smoothing = min(max(self._smoothing + by, 0), len(SMOOTHINGS) - 1)
        self._draw()
        self.notify(f"smoothing {SMOOTHINGS[self._smoothing]:g}", timeout=2)

    def action_scroll(self, by: int) -> None:
        """Go through the table by letters, too."""
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)

    def action_close(self) -> None:
        """Go back to the list."""
        self.dismiss()

    def _draw(self) -> None:
        curves, marks = [], []
        for number, run in enumerate(self._found):
            curve = Curve(SMOOTHINGS[self._smoothing])
            curve.extend(run.loss.steps, run.loss.values)
            curves.append((LINES[number], curve.points))
            marks += [(MARKS[number], step, loss) for step, loss in run.validation]
        self.query_one(OverlaidCurves).show(curves, marks)
        self._read_cursor()

    def _read_cursor(self) -> None:
        steps = self.query_one(OverlaidCurves).steps_at_cursor()
        line = self.query_one("#cursor", Static)
        if steps is None:
            line.update(Text("left and right read the runs at a step", style="dim"))
            return
        words = [f"step {steps[1]}"]
        for run in self._found:
            known = run.loss.at(steps[1])
            if known is None or not math.isfinite(known[1]):
                continue
            at = "" if known[0] == steps[1] else f" (step {known[0]})"
            words.append(f"{run.label} {known[1]:.5f}{at}")
        line.update(Text("   ".join(words), no_wrap=True, overflow="ellipsis"))


def _table(found: Sequence[ComparedRun]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("FIGURE", no_wrap=True)
    for run in found:
        table.add_column(Text(run.label), justify="right", no_wrap=True)
    rows = figure_rows(found)
    for row in rows:
        name = row.name + ("" if row.comparable else f" {UNLIKE}")
        table.add_row(Text(name), *map(Text, row.cells))
    options = config_rows(found)
    table.add_row()
    table.add_row(Text("OPTION", style="bold") if options else Text("the configs are the same"))
    for key, values in options:
        table.add_row(Text(key), *map(Text, values))
    if any(BEST in cell for row in rows for cell in row.cells):
        table.add_row()
        table.add_row(Text(f"{BEST} best of its row"))
    if not all(row.comparable for row in rows):
        table.add_row(Text(f"{UNLIKE} not comparable: data, model or loss differ"))
    return table
