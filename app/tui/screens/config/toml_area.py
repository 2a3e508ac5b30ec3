"""The text of a config, with colours and marked problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.style import Style
from rich.text import Text
from textual.message import Message
from textual.widgets import TextArea

from app.domain.toml_spans import scan
from app.render.toml_parts import Parts, toml_parts

COLOURS = {"header": "accent", "key": "primary", "text": "success", "comment": "muted"}


class TomlArea(TextArea):
    """Edits the text; what is typed and what is undone goes through the document."""

    class Turned(Message):
        """Undo or redo is wanted."""

        def __init__(self, back: bool) -> None:
            super().__init__()
            self.back = back

    def __init__(self, **attributes: Any) -> None:
        super().__init__(
            theme="css", show_line_numbers=True, soft_wrap=False, compact=True, **attributes
        )
        self._parts: Parts = {}
        self._problems: frozenset[int] = frozenset()

    def show(self, text: str, *, anew: bool = False) -> None:
        """Show a text; only the lines that differ are replaced, so that the cursor stays.

        Args:
            text: the new text.
            anew: it is another file: the cursor goes to its start.
        """
        if anew:
            self.load_text(text)
        else:
            self._replace_lines(_lines(self.text), _lines(text))
        self.colour()

    def colour(self) -> None:
        """Find out again what has which colour."""
        text = self.text
        self._parts = toml_parts(text, scan(text))
        self.notify_style_update()
        self.refresh()

    def mark(self, lines: Iterable[int]) -> None:
        """Mark the lines with problems, counted from 1."""
        problems = frozenset(line - 1 for line in lines)
        if problems != self._problems:
            self._problems = problems
            self.notify_style_update()
            self.refresh()

    def get_line(self, line_index: int) -> Text:
        """Return a line with its colours."""
        line = super().get_line(line_index)
        for start, end, name in self._parts.get(line_index, ()):
            line.stylize(self._style(name), start, end)
        if line_index in self._problems:
            line.stylize(self._style("problem") + Style(underline=True))
        return line

    def action_undo(self) -> None:
        """Undo in the document: there is one history."""
        self.post_message(self.Turned(back=True))

    def action_redo(self) -> None:
        """Redo in the document."""
        self.post_message(self.Turned(back=False))

    def go_to(self, line: int) -> None:
        """Put the cursor on a line, counted from 1."""
        self.move_cursor((max(min(line, self.document.line_count) - 1, 0), 0), center=True)

    def _replace_lines(self, old: list[str], new: list[str]) -> None:
        if old == new:
            return
        first = 0
        while first < min(len(old), len(new)) and old[first] == new[first]:
            first += 1
        last = 0
        while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
            last += 1
        before, after = old[first : len(old) - last], new[first : len(new) - last]
        newline = self.document.newline
        if before and after:
            end = (first + len(before) - 1, len(before[-1]))
            self.replace(newline.join(after), (first, 0), end)
        elif last:  # whole lines in front of one that stays
            inserted = "".join(line + newline for line in after)
            self.replace(inserted, (first, 0), (first + len(before), 0))
        else:  # behind the last line that stays
            start = (first - 1, len(old[first - 1]))
            end = (len(old) - 1, len(old[-1]))
            self.replace("".join(newline + line for line in after), start, end)

    def _style(self, name: str) -> Style:
        variables = self.app.theme_variables
        colour = variables.get("error" if name == "problem" else COLOURS[name], "")
        style = Style(color=colour) if colour.startswith("#") else Style()
        return style + Style(bold=True) if name == "header" else style


def _lines(text: str) -> list[str]:
    """Return the lines as the widget counts them: an end of the last one opens a further one."""
    lines = text.splitlines()
    if not text or text[-1:] in "\r\n":
        lines.append("")
    return lines
