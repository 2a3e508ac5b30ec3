"""The list of everything that a run has measured, to choose what the lower curve shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, OptionList
from textual.widgets.option_list import Option

from app.tui.fitting import Fitting
from app.tui.keyed import Keyed

NONE = "none: the loss alone"


class MetricList(Fitting, Keyed, ModalScreen[str | None]):
    """Gives the name of a series, empty for none; None where the choice stays as it was."""

    DEFAULT_CSS = """
    MetricList { align: center middle; }
    MetricList > Vertical {
        width: 50; max-width: 96%; height: auto; max-height: 90%; padding: 0 1; background: $panel;
    }
    MetricList OptionList { height: auto; max-height: 18; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,m", "close", "Close"),
        Binding("j", "move(1)", "Down", show=False),
        Binding("k", "move(-1)", "Up", show=False),
    ]

    def __init__(self, names: Sequence[str], chosen: str) -> None:
        super().__init__()
        self._names, self._chosen = ["", *names], chosen

    def compose(self) -> ComposeResult:
        """Lay out the list; the series that is shown is marked."""
        with Vertical():
            yield Label("Lower curve")
            yield OptionList(
                *(
                    Option(f"{'*' if name == self._chosen else ' '} {name or NONE}")
                    for name in self._names
                ),
                markup=False,
            )
            yield Label("enter take   esc leave it")

    def on_mount(self) -> None:
        """Begin at the series that is shown."""
        options = self.query_one(OptionList)
        options.focus()
        if self._chosen in self._names:
            options.highlighted = self._names.index(self._chosen)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take the series."""
        self.dismiss(self._names[event.option_index])

    def action_move(self, by: int) -> None:
        """Go to the next or the previous one."""
        options = self.query_one(OptionList)
        options.action_cursor_down() if by > 0 else options.action_cursor_up()

    def action_close(self) -> None:
        """Leave the choice."""
        self.dismiss(None)
