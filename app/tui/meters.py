"""Meters of GPUs and RAM, looked at every few seconds."""

from __future__ import annotations

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import VerticalGroup
from textual.message import Message
from textual.widgets import Static

from app.domain.load import Load, read_load
from app.render.load import gpu_lines, ram_line
from trainer.contract.run_dir import RunDir

INTERVAL_S = 5.0
"""Asking the driver starts a process, so it is not done every second."""
TALL = 32
"""Lines of a window from which on every GPU gets one."""
MANY = 8


class Meters(VerticalGroup):
    """GPUs and RAM of this machine, and what a run takes of them."""

    DEFAULT_CSS = "Meters { height: auto; padding: 0 1; } Meters Static { height: auto; }"

    class Read(Message):
        """The machine was looked at."""

        def __init__(self, run: RunDir | None, load: Load) -> None:
            super().__init__()
            self.run, self.load = run, load

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  (Textual's own name)
        super().__init__(id=id)
        self._run: RunDir | None = None
        self._load: Load | None = None

    def compose(self) -> ComposeResult:
        """Lay out both lines."""
        yield Static("GPU   ...", id="gpus")
        yield Static("RAM   ...", id="ram")

    def on_mount(self) -> None:
        """Look now, and every few seconds while the screen is seen."""
        self.read()
        self.set_interval(INTERVAL_S, self._look_again)

    def watch_run(self, run: RunDir) -> None:
        """Look at the processes and the GPUs of a run."""
        self._run = run
        self.read()

    @work(thread=True, exclusive=True, group="load")
    def read(self) -> None:
        """Look at the machine, in a thread."""
        run = self._run
        self.post_message(self.Read(run, read_load(run)))

    @on(Read)
    def show(self, message: Read) -> None:
        """Show what was seen."""
        if message.run is self._run and message.load != self._load:
            self._load = message.load
            self._write(self._load)

    def on_resize(self) -> None:
        """Use the room that there is now."""
        if self._load is not None:
            self._write(self._load)

    def _look_again(self) -> None:
        if self.screen.is_current:
            self.read()

    def _write(self, load: Load) -> None:
        most = MANY if self.app.size.height >= TALL else 1
        lines = gpu_lines(load, self.size.width, most)
        self.query_one("#gpus", Static).update(_cut("\n".join(lines)))
        self.query_one("#ram", Static).update(_cut(ram_line(load)), layout=False)


def _cut(words: str) -> Text:
    return Text(words, no_wrap=True, overflow="ellipsis")
