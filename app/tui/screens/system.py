"""The machine: GPUs, memory, disk, what is installed and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from app.render.environment import report_lines
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed
from app.tui.meters import Meters
from app.tui.widgets import Titles


class SystemScreen(Fitting, Keyed, Screen[None]):
    """What GPUs and RAM do now, and what `menma doctor` finds."""

    DEFAULT_CSS = "SystemScreen VerticalScroll { padding: 0 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "look", "Look again"),
        Binding("y", "copy", "Copy"),
    ]

    class Looked(Message):
        """The machine was looked at."""

        def __init__(self, found: dict[str, Any]) -> None:
            super().__init__()
            self.found = found

    def __init__(self) -> None:
        super().__init__()
        self._words = ""

    def compose(self) -> ComposeResult:
        """Lay out the report."""
        yield Titles("system")
        yield Meters()
        with VerticalScroll():
            yield Static("Looking at this machine ...", id="report")
        yield Footer()

    def on_mount(self) -> None:
        """Look at the machine; torch and DeepSpeed are tried, which takes seconds."""
        self.action_look()

    def action_look(self) -> None:
        """Look again."""
        self._look()

    def action_copy(self) -> None:
        """Copy the report, for a question or a bug report."""
        self.app.copy_to_clipboard(self._words)
        self.notify("Copied, if this terminal allows it. `menma doctor` prints it, too.")

    @work(thread=True, exclusive=True, group="doctor")
    def _look(self) -> None:
        from app.domain.environment import report

        self.post_message(self.Looked(report(Path.cwd())))

    @on(Looked)
    def show(self, message: Looked) -> None:
        """Show the report; what is missing comes first."""
        found = message.found
        self._words = "\n".join(report_lines(found))
        text = Text()
        for problem in found["problems"]:
            text.append(f"error: {problem}\n", style="bold")
        for warning in found["warnings"]:
            text.append(f"warning: {warning}\n", style="bold")
        self.query_one("#report", Static).update(text.append(self._words))
