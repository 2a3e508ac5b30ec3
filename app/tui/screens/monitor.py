"""One training, live: curve, figures, words."""

from __future__ import annotations

import math
from bisect import bisect_left
from threading import Lock
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, RichLog, Static

from app.render.curve import Curve
from app.runs import control
from app.runs.durations import duration
from app.runs.launch import console_tail
from app.runs.metrics import RunLog
from app.runs.state import RunState, State, read_state
from app.tui.keyed import Keyed
from app.tui.widgets import Ask, LossCurve, TextView, Titles
from trainer.contract.errors import MenmaError
from trainer.contract.run_dir import RunDir

POLL_S = 1.0
SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
PART = 5_000
"""Events that are read at a time, so that a long run shows its curve while it is being read."""


class MonitorScreen(Keyed, Screen[None]):
    """A training as it goes on; without one it says how to choose it."""

    DEFAULT_CSS = """
    MonitorScreen #state, MonitorScreen #figures, MonitorScreen #cursor {
        height: 1; padding: 0 1;
    }
    MonitorScreen RichLog { height: 6; background: $surface; padding: 0 1; }
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
        Binding("l", "log", "Log"),
    ]

    class Read(Message):
        """New events were read."""

        def __init__(self, run: RunDir, state: RunState, count: int) -> None:
            super().__init__()
            self.run, self.state, self.count = run, state, count

    class Left(Message):
        """The list of jobs is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self._run: RunDir | None = None
        self._log: RunLog | None = None
        self._curve = Curve()
        self._drawn = 0
        self._smoothing = 3
        self._state: RunState | None = None
        self._said = 0
        self._reading = Lock()
        """Held by the thread that reads events."""
        self._columns = Lock()
        """Held by who adds to the log's columns, or looks at them."""

    def compose(self) -> ComposeResult:
        """Lay out state, curve, figures and words."""
        yield Titles("monitor")
        yield Static("No run is chosen: 1 shows them, Enter opens one.", id="state")
        yield LossCurve(id="loss")
        yield Static(id="cursor")
        yield Static(id="figures")
        yield RichLog(wrap=True, max_lines=200, markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Look for news every second."""
        self.set_interval(POLL_S, self.read)

    def watch_run(self, run: RunDir) -> None:
        """Show another run."""
        self._run, self._log, self._state = run, RunLog(run), None
        self._said = 0
        self._start_curve()
        self.query_one(RichLog).clear()
        self.query_one(LossCurve).cursor = None
        self.query_one(Titles).tell(run.root.name)
        self.read()

    @work(thread=True, exclusive=True, group="events")
    def read(self) -> None:
        """Read the run's state and its new events, in a thread."""
        run, log = self._run, self._log
        if run is None or log is None or not self._reading.acquire(blocking=False):
            return  # the thread of a second ago is still at it
        try:
            count = PART
            while count == PART and log is self._log:
                with self._columns:
                    count = log.read(PART)
                self.post_message(self.Read(run, read_state(run), count))
        finally:
            self._reading.release()

    @on(Read)
    def show(self, message: Read) -> None:
        """Show what is new."""
        if message.run is not self._run or self._log is None:
            return
        changed = message.count > 0 or message.state != self._state
        self._state = message.state
        if not changed:
            return
        with self._columns:
            self._extend_curve(self._log)
            self.query_one(LossCurve).show(self._curve, tuple(self._log.validation))
            self.query_one("#figures", Static).update(_figures(self._log))
            self._say_new(self._log)
            self._read_cursor()
        self.query_one("#state", Static).update(_state_words(message.state))

    def action_back(self) -> None:
        """Go to the list."""
        self.post_message(self.Left())

    def action_cursor(self, by: int) -> None:
        """Move the cursor and read the step under it."""
        self.query_one(LossCurve).move_cursor(by)
        with self._columns:
            self._read_cursor()

    def action_logarithm(self) -> None:
        """Change the vertical axis."""
        curve = self.query_one(LossCurve)
        curve.logarithmic = not curve.logarithmic

    def action_smooth(self, by: int) -> None:
        """Average over more or fewer steps."""
        self._smoothing = min(max(self._smoothing + by, 0), len(SMOOTHINGS) - 1)
        self._start_curve()
        if self._log is not None:
            with self._columns:
                self._extend_curve(self._log)
                self.query_one(LossCurve).show(self._curve, tuple(self._log.validation))
        self.notify(f"smoothing {SMOOTHINGS[self._smoothing]:g}", timeout=2)

    def action_request(self, what: str) -> None:
        """Ask the run to save or to sample."""
        if self._run is None or self._state is None or not self._state.state.is_live:
            self.notify("It does not train.", severity="warning")
            return
        control.request_once(self._run, "save" if what == "save" else "sample")
        self.notify(f"{what} after the current step")

    def action_stop(self) -> None:
        """Stop the run; asked again while it stops: harder."""
        run, state = self._run, self._state
        if run is None or state is None or not state.state.is_live:
            self.notify("It does not train.", severity="warning")
            return
        urgency, words = control.Urgency.SAVE, "finish the step, save a checkpoint, end?"
        if state.state is State.STOPPING:
            urgency = control.Urgency.NOW
            words = "it is stopping already. End it now, without saving?"

        def answered(agreed: bool | None) -> None:
            if not agreed:
                return
            try:
                control.stop(run, urgency)
            except (MenmaError, OSError) as error:
                self.notify(str(error), severity="error", timeout=10)

        self.app.push_screen(Ask(f"{state.name}: {words}", "Stop"), answered)

    def action_log(self) -> None:
        """Show the end of what the run has printed."""
        if self._run is not None:
            lines = console_tail(self._run, 200)
            title = f"Log of {self._run.root.name}"
            self.app.push_screen(TextView(title, "\n".join(lines) or "nothing yet"))

    def _start_curve(self) -> None:
        self._curve, self._drawn = Curve(SMOOTHINGS[self._smoothing]), 0
        self._last = -1

    def _extend_curve(self, log: RunLog) -> None:
        num = len(log.steps)
        redone = num < self._drawn or (self._drawn and log.steps[self._drawn - 1] != self._last)
        if redone:
            self._start_curve()
        if num > self._drawn:
            new = slice(self._drawn, num)
            self._curve.extend(log.steps[new], log.columns["loss"][new])
            self._drawn, self._last = num, log.steps[num - 1]

    def _say_new(self, log: RunLog) -> None:
        messages = list(log.messages)
        words = self.query_one(RichLog)
        for kind, text in messages[self._said :]:
            words.write(text if kind in {"log", "phase"} else f"{kind}: {text}")
        self._said = len(messages)

    def _read_cursor(self) -> None:
        step = self.query_one(LossCurve).step_at_cursor()
        line = self.query_one("#cursor", Static)
        if step is None or self._log is None or not self._log.steps:
            line.update(Text("left and right read single steps", style="dim"))
            return
        place = min(bisect_left(self._log.steps, step), len(self._log.steps) - 1)
        words = [f"step {self._log.steps[place]}"]
        for name, label in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "gradient")):
            value = self._log.columns[name][place]
            if math.isfinite(value):
                words.append(f"{label} {value:.6g}")
        line.update(Text("   ".join(words)))


def _state_words(state: RunState) -> Text:
    text = Text(f"{state.state.sign} {state.state.value}", style="bold", no_wrap=True)
    if state.step is not None:
        of = f"/{state.total_steps}" if state.total_steps else ""
        text.append(f"   step {state.step}{of}", style="not bold")
    if state.state.is_live and state.eta_s:
        text.append(f"   {duration(state.eta_s)} left", style="not bold")
    if state.why:
        text.append(f"   {state.why}", style="not bold")
    return text


def _figures(log: RunLog) -> Text:
    step = log.last_step
    validation = log.validation[-1][1] if log.validation else None
    shown = [
        ("loss", "{:.4f}", step.get("loss")),
        ("val", "{:.4f}", validation),
        ("lr", "{:.3g}", step.get("lr")),
        ("grad", "{:.3g}", step.get("grad_norm")),
        ("s/step", "{:.2f}", step.get("step_time_s")),
        ("epoch", "{:.2f}", step.get("epoch")),
        ("VRAM", "{:.1f}G", step.get("peak_vram_gib")),
        ("RAM", "{:.1f}G", step.get("rss_gib")),
    ]
    words = [
        f"{name} {form.format(value)}"
        for name, form, value in shown
        if isinstance(value, int | float)
    ]
    return Text("  ".join(words), no_wrap=True, overflow="ellipsis")
