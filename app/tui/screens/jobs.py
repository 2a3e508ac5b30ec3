"""The list of runs and jobs, and what can be done with them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.message import Message
from textual.widgets import DataTable, Footer, Static

from app.queue.look import job_run
from app.queue.worker import ensure_worker
from app.runs import control
from app.runs.failure import Failure
from app.runs.launch import console_tail
from app.tui.keyed import key_of
from app.tui.live import LiveScreen
from app.tui.overview import BAD, Entry, Overview
from app.tui.screens.failure import FailureView
from app.tui.sources import Sources
from app.tui.widgets import Ask, Rows, TextView, Titles
from trainer.contract.errors import MenmaError
from trainer.contract.run_dir import RunDir

WIDTHS = {
    "ID": 4, "KIND": 6, "NAME": 0, "STATE": 11, "STEP": 13, "ETA": 6, "GPU": 3, "LOSS": 6,
}  # fmt: skip
"""Columns in characters; the name gets what is left."""
PADDING = 2
SHORTEST_NAME = 8
LOG_LINES = 200


class JobsScreen(LiveScreen):
    """What runs, what is next, what broke and why."""

    DEFAULT_CSS = """
    JobsScreen DataTable { height: 1fr; }
    JobsScreen #details { height: auto; max-height: 7; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open"),
        Binding("S", "stop", "Stop"),
        Binding("b", "request('save')", "Save"),
        Binding("s", "request('sample')", "Sample"),
        Binding("l", "log", "Log"),
        Binding("c", "command", "Command"),
        Binding("r", "retry", "Queue again", show=False),
        Binding("x", "cancel", "Cancel job", show=False),
        Binding("J", "move(1)", "Later", show=False),
        Binding("K", "move(-1)", "Sooner", show=False),
        Binding("m,space", "mark", "Mark", show=False),
        Binding("equals_sign", "compare", "Compare", key_display="="),
        Binding("P", "pause", "Pause", show=False),
        Binding("n", "new", "New"),
    ]

    class Read(Message):
        """The list was read."""

        def __init__(self, overview: Overview) -> None:
            super().__init__()
            self.overview = overview

    class Explained(Message):
        """Why the run or job of a line failed was read."""

        def __init__(self, entry: Entry, failure: Failure) -> None:
            super().__init__()
            self.entry, self.failure = entry, failure

    class Opened(Message):
        """A run is to be shown."""

        def __init__(self, run: RunDir) -> None:
            super().__init__()
            self.run = run

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self._sources = sources
        self._overview = Overview(())
        self._marked: list[str] = []
        """Keys of the lines that are to be compared, in the order they were marked."""

    def compose(self) -> ComposeResult:
        """Lay out the list, and what is known of the line in focus."""
        yield Titles("jobs")
        yield Rows()
        yield Static(id="details")
        yield Footer()

    def on_mount(self) -> None:
        """Show an empty list until it is read."""
        self._lay_out(self.query_one(DataTable))

    @work(thread=True, exclusive=True, group="overview")
    def look(self) -> None:
        """Read the list, in a thread."""
        self.post_message(self.Read(self._sources.overview()))

    @on(Read)
    def show(self, message: Read) -> None:
        """Show the list; the cursor stays on its line."""
        before, self._overview = self._overview, message.overview
        if message.overview != before or not self.query_one(DataTable).row_count:
            self._fill()
        paused = "  queue paused" if message.overview.paused else ""
        self.query_one(Titles).tell(f"{message.overview.num_live} live{paused}")
        self._describe()

    def on_resize(self) -> None:
        """Fit the columns to the new width."""
        self._fill()

    @on(DataTable.RowHighlighted)
    def highlighted(self) -> None:
        """Tell about the line that the cursor is on."""
        self._describe()

    @on(DataTable.RowSelected)
    def selected(self) -> None:
        """Open the line; the table takes Enter for itself."""
        self.action_open()

    def action_open(self) -> None:
        """Show why it failed; else the run of the line, or what the job has printed."""
        entry = self._entry()
        if entry is None:
            return
        if entry.state in BAD:
            self._read_failure(entry)
        elif entry.run_dir is not None:
            self.post_message(self.Opened(entry.run_dir))
        else:
            self.action_log()

    @work(thread=True, exclusive=True, group="failure")
    def _read_failure(self, entry: Entry) -> None:
        failure = self._sources.failure_of(entry)
        if failure is not None:
            self.post_message(self.Explained(entry, failure))

    @on(Explained)
    def explain(self, message: Explained) -> None:
        """Show why it failed."""
        run = message.entry.run_dir
        opener = None if run is None else lambda: self.post_message(self.Opened(run))
        self.app.push_screen(FailureView(message.failure, opener))

    def action_log(self) -> None:
        """Show the end of what it has printed."""
        entry = self._entry()
        if entry is None or entry.run is None:
            self.notify("It has not been started yet.")
            return
        lines = console_tail(RunDir(entry.run.root), LOG_LINES)
        self.app.push_screen(TextView(f"Log of {entry.name}", "\n".join(lines) or "nothing yet"))

    def action_command(self) -> None:
        """Show the command line."""
        entry = self._entry()
        if entry is None:
            return
        if entry.job is not None:
            spec = entry.job.job.spec
            text = f"cd {shlex.quote(str(spec.cwd))}\nmenma {shlex.join(spec.argv)}"
        else:
            text = self._sources.command_of(entry)
        self.app.push_screen(TextView(f"Command of {entry.name}", text))

    def action_request(self, what: str) -> None:
        """Ask a training to save or to sample."""
        entry = self._entry()
        if entry is None or entry.run_dir is None or not entry.live:
            self.notify("Nothing trains on this line.", severity="warning")
            return
        control.request_once(entry.run_dir, "save" if what == "save" else "sample")
        self.notify(f"{entry.name}: {what} after the current step.")

    def action_stop(self) -> None:
        """Stop what runs on this line; asked again while it stops: harder."""
        entry = self._entry()
        if entry is None or not entry.live or entry.run is None:
            self.notify("Nothing runs on this line.", severity="warning")
            return
        urgency, words = _how_hard(entry)
        run = job_run(entry.job.job.claim) if entry.job and entry.job.job.claim else None
        target = run or RunDir(entry.run.root)
        self._ask(f"{entry.name}: {words}", "Stop", lambda: control.stop(target, urgency))

    async def action_new(self) -> None:
        """Make a training, step by step, from a model to the queue."""
        await self.app.run_action("new")

    def action_mark(self) -> None:
        """Mark a training for a comparison, or take the mark away."""
        entry = self._entry()
        if entry is None or entry.run_dir is None:
            self.notify("Only trainings can be compared.", severity="warning")
            return
        if entry.key in self._marked:
            self._marked.remove(entry.key)
        else:
            self._marked.append(entry.key)
        self._fill()
        self.query_one(DataTable).action_cursor_down()

    def action_compare(self) -> None:
        """Compare the trainings that are marked."""
        from app.tui.screens.compare import MOST, CompareScreen

        by_key = {entry.key: entry.run_dir for entry in self._overview.entries}
        runs = [run for key in self._marked if (run := by_key.get(key)) is not None]
        if not 2 <= len(runs) <= MOST:
            words = f"Mark two to {MOST} trainings with space first: {len(runs)} are marked."
            self.notify(words, severity="warning")
            return
        self.app.push_screen(CompareScreen(runs))

    def action_cancel(self) -> None:
        """Take a job that waits out of the queue."""
        entry = self._entry()
        store = self._sources.store
        if entry is None or entry.job is None or store is None or not entry.waits:
            self.notify("Only a job that waits can be cancelled; S stops one that runs.")
            return
        number = entry.job.job.id
        self._ask(f"Cancel job {number}, {entry.name}?", "Cancel job", lambda: store.cancel(number))

    def action_retry(self) -> None:
        """Queue a job again that has ended."""
        entry, store = self._entry(), self._sources.store
        if entry is None or entry.job is None or store is None or entry.live or entry.waits:
            self.notify("Only a job of the queue that has ended can be queued again.")
            return
        job = entry.job.job

        def again() -> None:
            new = store.add(job.spec)
            store.replace(job.id, new)
            ensure_worker(store.folder)
            self.notify(f"Queued as job {new}.")

        self._try(again)

    def action_move(self, by: int) -> None:
        """Let a job that waits start sooner or later."""
        entry, store = self._entry(), self._sources.store
        if entry is None or entry.job is None or store is None or not entry.waits:
            return
        number = entry.job.job.id
        waiting = [e.job.job.id for e in self._overview.entries if e.waits and e.job]
        place = waiting.index(number)
        target = place - 1 if by < 0 else place + 2
        if target < 0 or place + by >= len(waiting):
            return
        before = waiting[target] if target < len(waiting) else None
        self._try(lambda: store.move(number, before=before))

    def action_pause(self) -> None:
        """Stop starting jobs, or go on."""
        store = self._sources.store
        if store is None:
            return

        def toggle() -> None:
            store.paused = not store.paused
            if not store.paused:
                ensure_worker(store.folder)

        self._try(toggle)

    def _ask(self, question: str, yes: str, act: Callable[[], None]) -> None:
        def answered(agreed: bool | None) -> None:
            if agreed:
                self._try(act)

        self.app.push_screen(Ask(question, yes), answered)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (MenmaError, OSError) as error:
            self.notify(str(error), severity="error", timeout=10)
        self.look()

    def _entry(self) -> Entry | None:
        row = self.query_one(DataTable).cursor_row
        entries = self._overview.entries
        return entries[row] if 0 <= row < len(entries) else None

    def _fill(self) -> None:
        table = self.query_one(DataTable)
        row = table.cursor_row
        key = (
            table.coordinate_to_cell_key(Coordinate(row, 0)).row_key.value
            if table.row_count
            else None
        )
        self._lay_out(table)
        for entry in self._overview.entries:
            table.add_row(*_cells(entry, entry.key in self._marked), key=entry.key)
        keys = [entry.key for entry in self._overview.entries]
        table.move_cursor(row=keys.index(key) if key in keys else min(row, max(len(keys) - 1, 0)))

    def _lay_out(self, table: DataTable[Text]) -> None:
        """Empty the list and give its columns their widths."""
        table.clear(columns=True)
        rest = self.size.width - sum(WIDTHS.values()) - PADDING * len(WIDTHS) - PADDING
        for label, width in WIDTHS.items():
            table.add_column(label, width=width or max(rest, SHORTEST_NAME))

    def _describe(self) -> None:
        entry = self._entry()
        if entry is None:
            words = self._overview.problem or (
                f"Nothing here yet. {key_of(self.app, 'jobs.new', 'n')} makes a training, step by "
                "step: model, data, start.\n"
                "On the command line: `menma train CONFIG` trains, `menma queue add …` queues."
            )
            self.query_one("#details", Static).update(Text(words))
            return
        text = Text(f"{entry.name}: {entry.state}", style="bold")
        text.append(f"  {entry.why}" if entry.why else "", style="")
        if entry.job is not None:
            text.append(f"\nmenma {shlex.join(entry.job.job.spec.argv)}", style="not bold")
        if entry.run is not None:
            text.append(f"\n{entry.run.root}", style="not bold")
        self.query_one("#details", Static).update(text)


def _cells(entry: Entry, marked: bool) -> list[Text]:
    number = str(entry.job.job.id) if entry.job else ""
    style = "bold" if entry.live else ("underline" if entry.state in BAD else "")
    words = (
        number,
        entry.kind,
        f"* {entry.name}" if marked else entry.name,
        f"{entry.sign} {entry.state}",
        entry.step,
        entry.eta,
        entry.gpu,
        entry.loss,
    )
    right = {0, 4, 5, 7}
    return [
        Text(word, style=style if place == 3 else "", justify="right" if place in right else "left")
        for place, word in enumerate(words)
    ]


def _how_hard(entry: Entry) -> tuple[control.Urgency, str]:
    if entry.state == "stopping":
        return control.Urgency.NOW, "it is stopping already. End it now, without saving?"
    if entry.run_dir is None:
        return control.Urgency.SAVE, "end it?"
    return control.Urgency.SAVE, "finish the step, save a checkpoint, end?"
