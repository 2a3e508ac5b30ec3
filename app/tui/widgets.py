"""Widgets that several screens use."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Button, DataTable, Label, Static

from app.render.curve import Curve, Plot, plot, ticks
from app.tui.keyed import LISTS, Keyed, key_of

TITLES = {
    "jobs": ("1", "Jobs"),
    "config": ("2", "Config"),
    "monitor": ("3", "Mon"),
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


class LossCurve(Widget):
    """A curve with axes, and a cursor that reads a step exactly."""

    DEFAULT_CSS = "LossCurve { height: 1fr; min-height: 4; color: $primary; }"
    AXIS = 9
    """Columns of the vertical axis."""
    logarithmic = reactive(False)
    cursor: reactive[int | None] = reactive(None)
    """Column that is read; None: none."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  (Textual's own name)
        super().__init__(id=id)
        self._curve = Curve()
        self._marks: tuple[tuple[int, float], ...] = ()

    def show(self, curve: Curve, marks: tuple[tuple[int, float], ...]) -> None:
        """Draw a curve, and single points on it."""
        self._curve, self._marks = curve, marks
        self.refresh()

    def step_at_cursor(self) -> int | None:
        """Return the step under the cursor."""
        points = self._curve.points
        if self.cursor is None or not points:
            return None
        width = max(self.size.width - self.AXIS, 1)
        share = min(max(self.cursor, 0), width - 1) / max(width - 1, 1)
        first, last = points[0].step, points[-1].end
        return round(first + share * (last - first))

    def move_cursor(self, by: int) -> None:
        """Move the cursor; it comes from the right end."""
        width = max(self.size.width - self.AXIS, 1)
        start = width if self.cursor is None and by < 0 else self.cursor or 0
        self.cursor = min(max(start + by, 0), width - 1)

    def render(self) -> RenderResult:
        """Draw it for the size that there is."""
        width, height = self.size.width - self.AXIS, self.size.height - 1
        if width < 4 or height < 2:
            return Text("")
        if not self._curve.points:
            return Text("no steps yet", style=self._style("muted"))
        drawn = plot(self._curve.points, width, height, log=self.logarithmic, marks=self._marks)
        return self._with_axes(drawn, width, height)

    def _with_axes(self, drawn: Plot, width: int, height: int) -> Text:
        colours = {
            "line": self._style("accent"),
            "band": self._style("primary"),
            "mark": self._style("success"),
            "": Style(),
        }
        muted = self._style("muted")
        labels = {0: _short(drawn.high), height - 1: _short(drawn.low)}
        text = Text(no_wrap=True)
        for number, row in enumerate(drawn.rows):
            text.append(f"{labels.get(number, ''):>{self.AXIS - 2}} |", style=muted)
            for column, cell in enumerate(row):
                style = colours[cell.part]
                if column == self.cursor:
                    style += Style(reverse=True)
                text.append(cell.char, style=style)
            text.append("\n")
        return text.append(self._steps(drawn, width), style=muted)

    def _steps(self, drawn: Plot, width: int) -> str:
        line = [" "] * (width + self.AXIS)
        end = 0
        for tick in ticks(drawn.first, drawn.last, max(width // 12, 1)):
            if tick != round(tick):  # there are no halves of steps
                continue
            words = _short(tick)
            share = (tick - drawn.first) / max(drawn.last - drawn.first, 1)
            start = self.AXIS + min(round(share * (width - 1)), width - len(words))
            if start >= end:
                line[start : start + len(words)] = words
                end = start + len(words) + 2
        return "".join(line)

    def _style(self, name: str) -> Style:
        variables = self.app.theme_variables
        colour = variables.get(name) or variables.get("foreground") or ""
        return Style(color=colour) if colour.startswith("#") else Style()


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


class Ask(Keyed, ModalScreen[bool]):
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


class TextView(Keyed, ModalScreen[None]):
    """Text to read and to copy: a command, an error, the end of a log."""

    DEFAULT_CSS = """
    TextView { align: center middle; }
    TextView > Vertical { width: 96%; height: 90%; padding: 0 1; background: $panel; }
    TextView #text { height: 1fr; overflow-y: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "close", "Close"),
        Binding("y", "copy", "Copy"),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """Lay out title, text and keys."""
        with Vertical():
            yield Label(Text(self._title, style="bold"))
            with Vertical(id="text"):
                yield Static(Text(self._text))
            copy = key_of(self.app, "textview.copy", "y")
            close = key_of(self.app, "textview.close", "esc")
            yield Label(Text(f"{copy} copy   {close} close"))

    def action_copy(self) -> None:
        """Copy the text, also over SSH; it can be selected with the mouse, too."""
        self.app.copy_to_clipboard(self._text)
        self.notify("Copied, if this terminal allows it. The text is here, too.")

    def action_close(self) -> None:
        """Go back."""
        self.dismiss()


def _short(value: float) -> str:
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}"
