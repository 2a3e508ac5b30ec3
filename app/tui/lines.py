"""Lists to choose one line from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from app.tui.keyed import LISTS, Keyed


class Lines(Keyed, OptionList):
    """A list in which letters move, too."""

    KEYS_IN = LISTS

    DEFAULT_CSS = """
    Lines { height: auto; border: none; padding: 0; background: $background; }
    Lines { text-wrap: nowrap; text-overflow: ellipsis; }
    Lines:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Choose", id="lines.choose"),
        Binding("j", "cursor_down", "Down", show=False),
        Binding("k", "cursor_up", "Up", show=False),
        Binding("g", "first", "First", show=False),
        Binding("G", "last", "Last", show=False),
    ]

    @property
    def name_in_focus(self) -> str:
        """The name of the line that the cursor is on; "": none."""
        place = self.highlighted
        return "" if place is None else self.get_option_at_index(place).id or ""

    def show(self, lines: Mapping[str, str], name: str = "") -> None:
        """Show other lines.

        Args:
            lines: name -> words.
            name: the line in focus; without one of this name it is the first.
        """
        self.clear_options()
        self.add_options([Option(Text(words), id=id_) for id_, words in lines.items()])
        names = list(lines)
        if names:
            self.highlighted = names.index(name) if name in names else 0
