"""The files that trainings have written: look into them, sample, merge, convert from here."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from app.queue.adding import job_spec
from app.queue.worker import ensure_worker
from app.runs.child import child_environment
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed
from app.tui.outputs import Output, find_outputs, sampling_command
from app.tui.sources import Sources
from app.tui.widgets import Ask, Rows, TextView, Titles
from trainer.contract.errors import MenmaError

POLL_S = 3.0
INSPECT_TIMEOUT_S = 120
COLUMNS = ("FILE", "RUN", "SIZE", "WRITTEN")


class LibraryScreen(Fitting, Keyed, Screen[None]):
    """Outputs of all runs, the newest first."""

    DEFAULT_CSS = """
    LibraryScreen DataTable { height: 1fr; }
    LibraryScreen #details { height: auto; max-height: 4; padding: 0 1; background: $surface; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "inspect", "Look into it"),
        Binding("v", "job('sample')", "Sample"),
        Binding("m", "job('merge')", "Merge"),
        Binding("c", "job('convert')", "Convert"),
        Binding("y", "copy", "Copy path"),
    ]

    class Found(Message):
        """The files were looked for."""

        def __init__(self, outputs: list[Output]) -> None:
            super().__init__()
            self.outputs = outputs

    class Inspected(Message):
        """A file was looked into."""

        def __init__(self, output: Output, words: str) -> None:
            super().__init__()
            self.output, self.words = output, words

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self._sources = sources
        self._outputs: list[Output] = []
        self._rows: list[tuple[str, str, str, str]] = []

    def compose(self) -> ComposeResult:
        """Lay out the list."""
        yield Titles("library")
        yield Rows()
        yield Static(id="details")
        yield Footer()

    def on_mount(self) -> None:
        """Look now, and again every few seconds."""
        self._lay_out(self.query_one(DataTable))
        self.find()
        self.set_interval(POLL_S, self._look_again)

    def _look_again(self) -> None:
        if self.is_current:
            self.find()

    @work(thread=True, exclusive=True, group="outputs")
    def find(self) -> None:
        """Look for files, in a thread."""
        self.post_message(self.Found(find_outputs(self._sources.runs_dir)))

    @on(Found)
    def show(self, message: Found) -> None:
        """Show the files; the cursor stays where it is."""
        self._outputs = message.outputs
        rows = [(o.file.name, o.run.root.name, o.size, o.age) for o in self._outputs]
        if rows != self._rows:  # also when one has only grown older
            self._rows = rows
            table = self.query_one(DataTable)
            row = table.cursor_row
            self._lay_out(table)
            for name, run, size, age in rows:
                table.add_row(name, run, Text(size, justify="right"), age)
            table.move_cursor(row=min(row, max(len(self._outputs) - 1, 0)))
        self._describe()

    def _lay_out(self, table: DataTable[Text]) -> None:
        """Empty the list and give its columns their widths.

        A table left to find them itself is first painted without them.
        """
        table.clear(columns=True)
        for label, *cells in zip(COLUMNS, *self._rows, strict=True):
            table.add_column(label, width=max(map(cell_len, (label, *cells))))

    @on(DataTable.RowHighlighted)
    def highlighted(self) -> None:
        """Tell about the file that the cursor is on."""
        self._describe()

    @on(DataTable.RowSelected)
    def selected(self) -> None:
        """Look into the file; the table takes Enter for itself."""
        self.action_inspect()

    def action_inspect(self) -> None:
        """Show what is in the file."""
        output = self._output()
        if output is not None:
            self.notify("Looking into it ...", timeout=2)
            self._inspect(output)

    @work(thread=True, exclusive=True, group="inspect")
    def _inspect(self, output: Output) -> None:
        command = [sys.executable, "-m", "app", "lora", "inspect", str(output.file)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=INSPECT_TIMEOUT_S,
                env=child_environment(),
                check=False,
            )
            words = done.stdout if done.returncode == 0 else done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            words = str(error)
        self.post_message(self.Inspected(output, words))

    @on(Inspected)
    def tell(self, message: Inspected) -> None:
        """Show what the tool has said."""
        self.app.push_screen(TextView(message.output.file.name, message.words))

    def action_job(self, kind: str) -> None:
        """Queue something that is done with the file, after a look at the command."""
        output = self._output()
        if output is None:
            return
        argv = _command(kind, output, self._outputs)

        def answered(agreed: bool | None) -> None:
            if agreed:
                self._queue(argv, output.file.stem)

        self.app.push_screen(Ask(f"Queue this?\n\nmenma {shlex.join(argv)}", "Queue"), answered)

    def action_copy(self) -> None:
        """Copy the path of the file."""
        output = self._output()
        if output is not None:
            self.app.copy_to_clipboard(str(output.file.absolute()))
            self.notify(f"Copied, if this terminal allows it: {output.file}")

    def _queue(self, argv: list[str], name: str) -> None:
        store = self._sources.store
        if store is None:
            self.notify("the queue cannot be used: see `menma queue list`", severity="error")
            return
        try:
            number = store.add(job_spec(argv, name=name))
            ensure_worker(store.folder)
        except (MenmaError, OSError) as error:
            self.notify(str(error), severity="error", timeout=10)
            return
        self.notify(f"Queued as job {number}: 1 shows it.")

    def _output(self) -> Output | None:
        row = self.query_one(DataTable).cursor_row
        return self._outputs[row] if 0 <= row < len(self._outputs) else None

    def _describe(self) -> None:
        output = self._output()
        words = "No output files yet: a training writes them." if output is None else output.file
        self.query_one("#details", Static).update(Text(str(words)))


def _command(kind: str, output: Output, outputs: Sequence[Output]) -> list[str]:
    file = output.file
    if kind == "sample":
        return sampling_command(output, outputs)
    if kind == "merge":
        merged = file.with_name(f"{file.stem}-merged.safetensors")
        config = str(output.run.config)
        return ["merge", config, "--lora", str(file), "-o", str(merged)]
    target = file.with_name(f"{file.stem}-kohya.safetensors")
    return ["lora", "convert", str(file), str(target), "--layout", "kohya"]
