"""Presets as a list that can be filtered, with room for what is known of the one in focus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import DataTable, Input, Static

from app.domain.preset_choice import Changes
from app.domain.preset_offers import Offer
from app.domain.toml_text import toml_value
from app.tui.keyed import Keyed, key_of
from app.tui.widgets import Rows

COLUMNS = {"PRESET": 31, "GB": 5, "HERE": 5, "FOR": 30}
NO_PRESET = "none"
_WIDEST = 300


class PresetTable(Rows):
    """One line a preset."""

    KEYS_IN = "presets"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Choose"),
    ]


class PresetPane(Keyed, Vertical):
    """The list, its filter, and below it what choosing a preset would change."""

    DEFAULT_CSS = """
    PresetPane { height: 1fr; }
    PresetPane #preset-filter { height: 1; }
    PresetPane #preset-list { height: 1fr; min-height: 5; }
    PresetPane #preset-scroll { height: 45%; min-height: 8; background: $surface; padding: 0 1; }
    """
    KEYS_IN = "presets"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter"),
        Binding("d", "scroll(1)", "More"),
        Binding("u", "scroll(-1)", "Back up", show=False),
    ]

    class Looked(Message):
        """Another preset is in focus; None: none of them."""

        def __init__(self, offer: Offer | None) -> None:
            super().__init__()
            self.offer = offer

    class Chosen(Message):
        """A preset is taken; None: none of them."""

        def __init__(self, offer: Offer | None) -> None:
            super().__init__()
            self.offer = offer

    def __init__(self, *, with_none: bool) -> None:
        super().__init__(id="preset-pane")
        self._with_none = with_none
        self._offers: tuple[Offer, ...] = ()
        self._shown: tuple[Offer | None, ...] = ()

    def compose(self) -> ComposeResult:
        """Lay out filter, list and details."""
        key = key_of(self.app, "presets.filter", "/")
        yield Input(placeholder=f"{key} finds presets", compact=True, id="preset-filter")
        yield PresetTable(id="preset-list")
        with VerticalScroll(id="preset-scroll", can_focus=False):
            yield Static(id="preset-details")

    def on_mount(self) -> None:
        """Make the columns."""
        for title, width in COLUMNS.items():
            self.query_one(PresetTable).add_column(title, width=width)

    @property
    def offer(self) -> Offer | None:
        """The preset in focus."""
        row = self.query_one(PresetTable).cursor_row
        return self._shown[row] if 0 <= row < len(self._shown) else None

    def show(self, offers: Sequence[Offer], name: str | None = None) -> None:
        """Show presets.

        Args:
            offers: in their order.
            name: the one in focus.
        """
        self._offers = tuple(offers)
        self._list(name)
        self.query_one(PresetTable).focus()

    def tell(self, words: Text) -> None:
        """Say what is known of the preset in focus."""
        self.query_one("#preset-details", Static).update(words)

    @on(Input.Changed, "#preset-filter")
    def filtered(self) -> None:
        """Show what matches."""
        self._list()

    @on(Input.Submitted, "#preset-filter")
    def filter_done(self, event: Input.Submitted) -> None:
        """Go to what was found."""
        event.stop()
        self.query_one(PresetTable).focus()

    @on(DataTable.RowHighlighted)
    def highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Tell which one is in focus."""
        event.stop()
        self.query_one("#preset-scroll").scroll_home(animate=False)
        self.post_message(self.Looked(self.offer))

    @on(DataTable.RowSelected)
    def selected(self, event: DataTable.RowSelected) -> None:
        """Take it."""
        event.stop()
        if self._shown:
            self.post_message(self.Chosen(self.offer))

    def action_filter(self) -> None:
        """Look for presets."""
        self.query_one("#preset-filter", Input).focus()

    def action_scroll(self, by: int) -> None:
        """Move the details."""
        scroll = self.query_one("#preset-scroll")
        scroll.scroll_relative(y=5 * by, animate=False)

    def leave_filter(self) -> bool:
        """Go back to the list and show all; return whether there was something to leave."""
        field, table = self.query_one("#preset-filter", Input), self.query_one(PresetTable)
        if not field.has_focus and not field.value:
            return False
        field.value = ""
        table.focus()
        return True

    def _list(self, name: str | None = None) -> None:
        words = self.query_one("#preset-filter", Input).value
        before = self.offer.preset.name if self.offer is not None else None
        shown: list[Offer | None] = [offer for offer in self._offers if offer.matches(words)]
        if self._with_none and all(w in "none defaults" for w in words.lower().split()):
            shown.append(None)
        self._shown = tuple(shown)
        table = self.query_one(PresetTable)
        table.clear()
        for offer in shown:
            table.add_row(*_cells(offer))
        names = [offer.preset.name if offer is not None else NO_PRESET for offer in shown]
        wanted = name or before
        table.move_cursor(row=names.index(wanted) if wanted in names else 0)
        self.post_message(self.Looked(self.offer))


def title_words(offer: Offer | None) -> Text:
    """Say in a line what a preset is."""
    if offer is None:
        return Text("No preset: Menma's defaults count.", style="bold")
    return Text(offer.preset.title, style="bold")


def purpose_words(offer: Offer | None) -> Text:
    """Say for whom a preset is, and what machine it takes."""
    if offer is None:
        return Text("")
    lines = (" ".join(offer.preset.description.split()), offer.needs)
    return Text("\n".join(line for line in lines if line))


def changes_words(changes: Changes, title: str) -> Text:
    """Say what changes, one line a key."""
    if not changes:
        return Text(f"{title}: nothing")
    words = Text(f"{title}:")
    for key, (before, after) in changes.items():
        words.append(f"\n  {key}: {_value(before)} -> {_value(after)}")
    return words


def _value(value: object) -> str:
    text = "(none)" if value is None else toml_value(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


def _cells(offer: Offer | None) -> list[Text]:
    if offer is None:
        return [Text(NO_PRESET), Text(""), Text(""), Text("Menma's defaults")]
    words = (offer.preset.name, offer.card_words, offer.verdict_words, offer.purpose)
    return [
        Text(word, no_wrap=True, overflow="ellipsis", justify="right" if place == 1 else "left")
        for place, word in enumerate(words)
    ]
