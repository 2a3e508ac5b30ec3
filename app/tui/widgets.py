"""Widgets that several screens use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, DataTable, Label, Static

from app.tui.fitting import Fitting
from app.tui.keyed import LISTS, Keyed, key_of
from trainer.contract.files import write_text

TITLES = {
    "jobs": ("1", "Jobs"),
    "config": ("2", "Config"),
    "monitor": ("3", "Mon"),
    "data": ("4", "Data"),
    "library": ("5", "Lib"),
    "system": ("6", "Sys"),
}
"""Mode -> the key that shows it, its title."""


class Titles(Static):
    """The first line: the screens, the one that is shown in capitals."""

    DEFAULT_CSS = "Titles { height: 1; background: $panel; color: $foreground; }"

    def __init__(self, mode: str, right: str = "") -> None:
        super().__init__()
        self._mode, self._right = mode, right

    def on_mount(self) -> None:
        """Write the line."""
        self.tell(self._right)

    def tell(self, right: str) -> None:
        """Write what stands at the right end."""
        self._right = right
        text = Text(" menma ", style="bold", no_wrap=True, overflow="ellipsis")
        for mode, (key, title) in TITLES.items():
            shown = title.upper() if mode == self._mode else title
            text.append(
                f"  {key_of(self.app, f'show-{mode}', key)} {shown}",
                style="bold" if mode == self._mode else "",
            )
        looks = "look only  " if getattr(self.app, "read_only", False) else ""
        text.append(f"   {looks}{right}")
        self.update(text)


class Rows(Keyed, DataTable[Text]):
    """A list whose lines are gone through by arrows or letters."""

    KEYS_IN = LISTS
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", "Down", show=False),
        Binding("k", "cursor_up", "Up", show=False),
        Binding("g", "scroll_top", "First", show=False),
        Binding("G", "scroll_bottom", "Last", show=False),
        Binding("ctrl+d", "page_down", "Page down", show=False),
        Binding("ctrl+u", "page_up", "Page up", show=False),
    ]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(cursor_type="row", **attributes)


class Ask(Fitting, Keyed, ModalScreen[bool]):
    """A question before something that cannot be taken back. Cancel has the focus."""

    DEFAULT_CSS = """
    Ask { align: center middle; }
    Ask > Vertical { width: 64; max-width: 96%; height: auto; padding: 1 2; background: $panel; }
    Ask Horizontal { height: auto; margin-top: 1; }
    Ask Button { margin-right: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "Cancel"),
        Binding("y", "answer(True)", "Yes"),
    ]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self._question, self._yes = question, yes

    def compose(self) -> ComposeResult:
        """Lay out the question and its two answers."""
        with Vertical():
            yield Label(self._question)
            with Horizontal():
                yield Button("Cancel", id="no")
                yield Button(self._yes, id="yes", variant="error")

    def on_mount(self) -> None:
        """Put the focus where nothing happens."""
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer with the button."""
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """Answer by a key."""
        self.dismiss(yes)


class TextView(Fitting, Keyed, ModalScreen[None]):
    """Text to read, to copy and to keep: a command, an error, the end of a log."""

    DEFAULT_CSS = """
    TextView { align: center middle; }
    TextView > Vertical { width: 96%; height: 90%; padding: 0 1; background: $panel; }
    TextView #text { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "close", "Close"),
        Binding("y", "copy", "Copy"),
        Binding("w", "write", "Write to a file"),
        Binding("j", "scroll(1)", "Down", show=False),
        Binding("k", "scroll(-1)", "Up", show=False),
    ]
    MORE_KEYS = ""
    """Keys of a kind of text, for the last line."""

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """Lay out title, text and keys."""
        with Vertical():
            yield Label(Text(self._title, style="bold"))
            with VerticalScroll(id="text"):
                yield Static(Text(self._text))
            copy = key_of(self.app, "textview.copy", "y")
            write = key_of(self.app, "textview.write-to-a-file", "w")
            close = key_of(self.app, "textview.close", "esc")
            words = f"{copy} copy   {write} write to a file   {self.MORE_KEYS}{close} close"
            yield Label(Text(words))

    def action_copy(self) -> None:
        """Copy the text, also over SSH; it can be selected with the mouse, too."""
        self.app.copy_to_clipboard(self._text)
        self.notify("Copied, if this terminal allows it. The text is here, too.")

    def action_write(self) -> None:
        """Write the text into the folder that the app was started in; nothing is overwritten."""
        name = re.sub(r"[^\w.-]+", "-", self._title).strip("-.").lower() or "text"
        names = (f"{name}.txt", *(f"{name}-{number}.txt" for number in range(2, 1000)))
        path = next((path for each in names if not (path := Path(each)).exists()), None)
        if path is None:
            self.notify(f"there are too many files like {names[0]} here", severity="error")
            return
        write_text(path, f"{self._title}\n\n{self._text}\n")
        self.notify(f"Written: {path.absolute()}", markup=False)

    def action_scroll(self, by: int) -> None:
        """Go through the text by letters, too."""
        self.query_one("#text", VerticalScroll).scroll_relative(y=by, animate=False)

    def action_close(self) -> None:
        """Go back."""
        self.dismiss()
