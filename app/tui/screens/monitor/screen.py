"""One training, live: curves, figures, meters, words."""

from __future__ import annotations

import time
from threading import Lock
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Footer, RichLog, Static

from app.render.curve import Curve, span_of
from app.runs.metrics import RunLog, overview
from app.runs.samples import Sample
from app.runs.state import RunState, read_state
from app.tui.curve_view import SeriesCurve
from app.tui.meters import Meters
from app.tui.screens.monitor.steering import SteeringScreen
from app.tui.screens.monitor.words import (
    CURSOR_HINT,
    figures,
    reading,
    series_line,
    state_words,
)
from app.tui.widgets import Titles
from trainer.contract.run_dir import RunDir

SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
PART = 5_000
"""Events that are read at a time, so that keys are answered while a long run is being read."""
TELL_S = 0.25
"""How often it is told how much of a long run has been read."""
LOWER = "grad_norm"
"""What the lower curve shows at first."""


class Line:
    """A series as it is drawn: it takes in what its run has told since the last time."""

    def __init__(self, name: str, smoothing: float) -> None:
        self.name, self.smoothing = name, smoothing
        self.curve = Curve(smoothing)
        self._drawn, self._restarts = 0, -1

    def extend(self, log: RunLog) -> Curve:
        """Take in what is new; all of it where steps were taken back."""
        series = log.series(self.name)
        if log.restarts != self._restarts or len(series.steps) < self._drawn:
            self.curve, self._drawn = Curve(self.smoothing), 0
            self._restarts = log.restarts
        new = slice(self._drawn, len(series.steps))
        self.curve.extend(series.steps[new], series.values[new])
        self._drawn = len(series.steps)
        return self.curve


class MonitorScreen(SteeringScreen):
    """A training as it goes on; without one it says how to choose it."""

    DEFAULT_CSS = """
    MonitorScreen #state, MonitorScreen #figures, MonitorScreen #cursor, MonitorScreen #chosen {
        height: 1; padding: 0 1;
    }
    MonitorScreen #lower { height: 4; }
    MonitorScreen .hidden { display: none; }
    MonitorScreen RichLog { height: 4; background: $surface; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Jobs"),
        Binding("S", "stop", "Stop"),
        Binding("b", "request('save')", "Save"),
        Binding("s", "request('sample')", "Sample"),
        Binding("left", "cursor(-1)", "Cursor", show=False),
        Binding("right", "cursor(1)", "Cursor", show=False),
        Binding("shift+left", "cursor(-10)", "Cursor", show=False),
        Binding("shift+right", "cursor(10)", "Cursor", show=False),
        Binding("L", "logarithm", "Log y"),
        Binding("plus", "smooth(1)", "Smoother", key_display="+"),
        Binding("minus", "smooth(-1)", "Rougher", show=False),
        Binding("m", "metrics", "Metrics"),
        Binding("v", "samples", "Samples"),
        Binding("l", "log", "Log"),
        Binding("e", "failure", "Error", show=False),
    ]

    class Read(Message):
        """New events were read."""

        def __init__(
            self, run: RunDir, state: RunState | None, share_read: float, problem: str
        ) -> None:
            super().__init__()
            self.run, self.state = run, state
            self.share_read, self.problem = share_read, problem

    class Glanced(Message):
        """A long log was looked over."""

        def __init__(self, run: RunDir, curve: Curve) -> None:
            super().__init__()
            self.run, self.curve = run, curve

    class Left(Message):
        """The list of jobs is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self._log: RunLog | None = None
        self._smoothing = 3
        self._loss = Line("loss", SMOOTHINGS[self._smoothing])
        self._lower = Line(LOWER, SMOOTHINGS[self._smoothing])
        self._shown: dict[str, Text] = {}
        """What stands in the lines, so that only what has changed is written."""
        self._said = 0
        self._reading = Lock()
        """Held by the thread that reads events."""
        self._columns = Lock()
        """Held by who adds to the log's columns, or looks at them."""

    def compose(self) -> ComposeResult:
        """Lay out state, curves, figures, meters and words."""
        yield Titles("monitor")
        yield Static("No run is chosen: 1 shows them, Enter opens one.", id="state")
        yield SeriesCurve(id="loss")
        yield Static(id="cursor")
        yield Static(id="chosen")
        yield SeriesCurve(steps_below=False, id="lower")
        yield Static(id="figures")
        yield Meters()
        yield RichLog(wrap=True, max_lines=200, markup=False)
        yield Footer()

    def watch_run(self, run: RunDir) -> None:
        """Show another run."""
        self._run, self._log, self._state = run, RunLog(run), None
        self._said = 0
        self._start_lines()
        self._shown.clear()
        self.query_one(RichLog).clear()
        for curve in self.query(SeriesCurve):
            curve.cursor = None
            curve.show(())
        self._write("state", Text("reading ..."))
        for name in ("cursor", "chosen", "figures"):
            self._write(name, Text(""))
        self.query_one(Titles).tell(run.root.name)
        self.query_one(Meters).watch_run(run)
        self.look()

    @work(thread=True, exclusive=True, group="events")
    def look(self) -> None:
        """Read the run's state and its new events, in a thread."""
        run, log = self._run, self._log
        if run is None or log is None or not self._reading.acquire(blocking=False):
            return  # the thread of a second ago is still at it
        try:
            if not log.steps:
                self._glance(run)
            count, told = PART, 0.0
            while count == PART and log is self._log:
                with self._columns:
                    count = log.read(PART)
                if count < PART or time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    share = log.share_read if count == PART else 1.0
                    problem = "" if run.root.is_dir() else f"{run.root.name} is gone"
                    state = None if problem else read_state(run)
                    self.post_message(self.Read(run, state, share, problem))
        finally:
            self._reading.release()

    def _glance(self, run: RunDir) -> None:
        """Show the shape of a long log before all of it is read."""
        steps, losses = overview(run)
        if steps:
            curve = Curve(self._loss.smoothing)
            curve.extend(steps, losses)
            self.post_message(self.Glanced(run, curve))

    @on(Glanced)
    def show_shape(self, message: Glanced) -> None:
        """Show the shape of a long log."""
        if message.run is self._run:
            self.query_one("#loss", SeriesCurve).show(message.curve.points)

    @on(Read)
    def show(self, message: Read) -> None:
        """Show what is new."""
        log = self._log
        if message.run is not self._run or log is None:
            return
        if message.problem or message.state is None:
            self._write(
                "state", Text(f"x {message.problem} from the disk; this is what was read of it")
            )
            return
        self._state = message.state
        with self._columns:
            bad = log.bad_lines
            if message.share_read == 1.0:  # until then the shape of the whole is on the screen
                self._draw(log)
                self._say_new(log)
        self._write("state", state_words(message.state, message.share_read, bad))

    def action_back(self) -> None:
        """Go to the list."""
        self.post_message(self.Left())

    def action_cursor(self, by: int) -> None:
        """Move the cursor and read the step under it."""
        loss = self.query_one("#loss", SeriesCurve)
        loss.move_cursor(by)
        self.query_one("#lower", SeriesCurve).cursor = loss.cursor
        if self._log is not None:
            with self._columns:
                self._read_cursor(self._log)

    def action_logarithm(self) -> None:
        """Change the vertical axes."""
        for curve in self.query(SeriesCurve):
            curve.logarithmic = not curve.logarithmic

    def action_smooth(self, by: int) -> None:
        """Average over more or fewer steps."""
        self._smoothing = min(max(self._smoothing + by, 0), len(SMOOTHINGS) - 1)
        self._start_lines()
        if self._log is not None:
            with self._columns:
                self._draw(self._log)
        self.notify(f"smoothing {SMOOTHINGS[self._smoothing]:g}", timeout=2)

    def action_metrics(self) -> None:
        """Choose what the lower curve shows."""
        from app.tui.screens.monitor.metric_list import MetricList

        if self._log is None:
            return
        with self._columns:
            names = self._log.names

        def chosen(name: str | None) -> None:
            if name is None or self._log is None:
                return
            self._lower = Line(name, SMOOTHINGS[self._smoothing])
            for part in ("#chosen", "#lower"):
                self.query_one(part).set_class(not name, "hidden")
            with self._columns:
                self._draw(self._log)

        self.app.push_screen(MetricList(names, self._lower.name), chosen)

    def action_samples(self) -> None:
        """Show the samples of the run."""
        from app.tui.screens.monitor.gallery import GalleryScreen

        if self._log is not None:
            self.app.push_screen(GalleryScreen(self._samples, self.look))

    def _samples(self) -> list[Sample]:
        with self._columns:
            if self._log is None:
                return []
            return [*self._log.samples, *self._log.previews.values()]

    def _start_lines(self) -> None:
        smoothing = SMOOTHINGS[self._smoothing]
        self._loss, self._lower = Line("loss", smoothing), Line(self._lower.name, smoothing)

    def _draw(self, log: RunLog) -> None:
        """Draw curves and figures. Whoever calls holds the log's columns."""
        points = self._loss.extend(log).points
        span = span_of(points, log.validation) if points or log.validation else None
        self.query_one("#loss", SeriesCurve).show(points, tuple(log.validation), span)
        if self._lower.name:
            lower = self.query_one("#lower", SeriesCurve)
            lower.show(self._lower.extend(log).points, span=span)
            self._write("chosen", series_line(self._lower.name, log.series(self._lower.name)))
        self._write("figures", figures(log))
        self._read_cursor(log)

    def _say_new(self, log: RunLog) -> None:
        num = min(log.num_messages - self._said, len(log.messages))
        words = self.query_one(RichLog)
        for kind, text in list(log.messages)[len(log.messages) - num :]:
            words.write(text if kind in {"log", "phase"} else f"{kind}: {text}")
        self._said = log.num_messages

    def _read_cursor(self, log: RunLog) -> None:
        steps = self.query_one("#loss", SeriesCurve).steps_at_cursor()
        if steps is None:
            self._write("cursor", Text(CURSOR_HINT, style="dim"))
        else:
            self._write("cursor", reading(log, self._lower.name, steps))

    def _write(self, name: str, text: Text) -> None:
        """Write a line, if it says something else than before."""
        before = self._shown.get(name)
        if before is None or before.plain != text.plain:
            self._shown[name] = text
            self.query_one(f"#{name}", Static).update(text, layout=False)
