"""A choice out of a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, OptionList

from app.tui.fitting import Fitting
from app.tui.keyed import Keyed, key_of


class Choose(Fitting, Keyed, ModalScreen[int | None]):
    """Lines to choose from; the answer is the place of one, or None."""

    DEFAULT_CSS = """
    Choose { align: center middle; }
    Choose > Vertical { width: 96%; height: auto; max-height: 90%; padding: 0 1; }
    Choose > Vertical { background: $panel; }
    Choose OptionList { height: auto; max-height: 16; background: $panel; border: none; }
    Choose OptionList:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "close", "Cancel"),
        Binding("j", "move('down')", "Down", show=False),
        Binding("k", "move('up')", "Up", show=False),
    ]

    def __init__(self, title: str, lines: Sequence[str]) -> None:
        super().__init__()
        self._title, self._lines_to_choose = title, tuple(lines)

    def compose(self) -> ComposeResult:
        """Lay out title, lines and keys."""
        with Vertical():
            yield Label(Text(self._title, style="bold"))
            yield OptionList(*(Text(line) for line in self._lines_to_choose))
            cancel = key_of(self.app, "choose.cancel", "esc")
            yield Label(Text(f"enter choose   {cancel} cancel"))

    def on_mount(self) -> None:
        """Begin on the list."""
        self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Answer with the line."""
        self.dismiss(event.option_index)

    def action_move(self, way: str) -> None:
        """Move the cursor."""
        lines = self.query_one(OptionList)
        if way == "down":
            lines.action_cursor_down()
        else:
            lines.action_cursor_up()

    def action_close(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)
