"""All options as one list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from app.domain.config_options import Option
from app.tui.widgets import Rows

COLUMNS = {"OPTION": 34, "VALUE": 22, "DEFAULT": 14}
"""Title -> width; they fit 80 columns."""


class OptionsTable(Rows):
    """One line an option: `*` where the file sets it, `!` where something is wrong with it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._options: tuple[Option, ...] = ()
        self._marks: tuple[str, ...] = ()

    def on_mount(self) -> None:
        """Make the columns."""
        for title, width in COLUMNS.items():
            self.add_column(title, width=width)

    @property
    def option(self) -> Option | None:
        """The option that the cursor is on."""
        row = self.cursor_row
        return self._options[row] if 0 <= row < len(self._options) else None

    def show(self, options: Sequence[Option], wrong: frozenset[str]) -> None:
        """Show options; the cursor stays on its own.

        Args:
            options: in their order.
            wrong: keys that problems name.
        """
        marks = tuple(_mark(option, wrong) for option in options)
        if tuple(options) == self._options and marks == self._marks:
            return
        before, row = self.option, self.cursor_row
        self._options, self._marks = tuple(options), marks
        self.clear()
        for option, mark in zip(options, marks, strict=True):
            self.add_row(*_cells(option, mark), key=option.key)
        keys = [option.key for option in options]
        if before is not None and before.key in keys:
            row = keys.index(before.key)
        self.move_cursor(row=min(row, max(len(keys) - 1, 0)))

    def go_to(self, key: str) -> None:
        """Put the cursor on an option, if it is in the list."""
        keys = [option.key for option in self._options]
        if key in keys:
            self.move_cursor(row=keys.index(key))


def _mark(option: Option, wrong: frozenset[str]) -> str:
    if option.key in wrong:
        return "!"
    return "*" if option.is_changed else " "


def _cells(option: Option, mark: str) -> list[Text]:
    style = "bold" if mark != " " else ""
    words = (f"{mark} {option.key}", option.value_words, option.default_words)
    return [
        Text(_cut(word, width), style=style if place < 2 else "")
        for place, (word, width) in enumerate(zip(words, COLUMNS.values(), strict=True))
    ]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
