"""Lists to choose one line from."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widgets import OptionList


class Lines(OptionList):
    """A list in which letters move, too."""

    DEFAULT_CSS = """
    Lines { height: auto; border: none; padding: 0; background: $background; }
    Lines:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Choose"),
        Binding("j", "cursor_down", "Down", show=False),
        Binding("k", "cursor_up", "Up", show=False),
        Binding("g", "first", "First", show=False),
        Binding("G", "last", "Last", show=False),
    ]

    def show(self, lines: list[str], place: int = 0) -> None:
        """Show other lines, the cursor on one of them."""
        from rich.text import Text

        self.clear_options()
        self.add_options([Text(line, no_wrap=True, overflow="ellipsis") for line in lines])
        if lines:
            self.highlighted = min(max(place, 0), len(lines) - 1)
