"""What is shown where there is no room for a screen."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Static

from app.tui.fitting import Fitting

WIDTH, HEIGHT = 60, 15
"""The least that every screen can be read in; they are made for 80 by 24."""


def is_too_small(size: Size) -> bool:
    """Tell whether a terminal has too few columns or lines."""
    return size.width < WIDTH or size.height < HEIGHT


class TooSmall(Fitting, ModalScreen[None]):
    """Words in place of a torn layout; the app takes it away once there is room."""

    DEFAULT_CSS = """
    TooSmall { background: $background; }
    TooSmall Static { width: 100%; height: 100%; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("q", "app.quit", "Quit", system=True)]

    def compose(self) -> ComposeResult:
        """Lay out the words."""
        yield Static()

    class Uncovered(Message):
        """Whatever was shown over it is gone: the app is to look again."""

    def on_mount(self) -> None:
        """Say it, and again: what is painted while the app starts may never be seen."""
        self.on_resize()
        self.set_interval(1.0, self.on_resize)

    def on_resize(self) -> None:
        """Say it for the new size."""
        self.query_one(Static).update(Text(words(self.app.size)))

    def on_screen_resume(self) -> None:
        """Tell the app."""
        self.post_message(self.Uncovered())


def words(size: Size) -> str:
    """Return what is said, the most important first: few lines may be all that there is."""
    return (
        f"{size.width} x {size.height} is too small: make it {WIDTH} x {HEIGHT} or larger. "
        "q leaves. `menma runs list` needs no room."
    )
