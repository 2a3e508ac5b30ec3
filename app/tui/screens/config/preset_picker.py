"""Choosing a preset for the config that is being edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Label

from app.domain.cards import Card
from app.domain.config_check import problem_words
from app.domain.config_document import ConfigDocument
from app.domain.preset_choice import PresetChoice, choose_preset
from app.domain.preset_offers import Offer, all_offers
from app.domain.toml_text import toml_value
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed, key_of
from app.tui.preset_pane import PresetPane, changes_words, purpose_words, title_words
from app.tui.screens.config.card_choice import CardChoice
from app.tui.screens.config.words import memory_words

_KEYS = {"give-way": "f", "cancel": "esc"}


class PresetPicker(Fitting, Keyed, ModalScreen[str | None]):
    """All presets, what each would change, and whether it fits; the answer is the new text.

    Args:
        text: the config as it is now.
        path: its file.
        choice: the GPU of the estimate.
    """

    DEFAULT_CSS = """
    PresetPicker { align: center middle; }
    PresetPicker > Vertical { width: 98%; height: 96%; padding: 0 1; background: $panel; }
    PresetPicker #preset-scroll { height: 55%; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Cancel"),
        Binding("q", "leave", "Leave", show=False),
        Binding("f", "give_way", "Give way"),
    ]

    class Found(Message):
        """The presets were read."""

        def __init__(self, offers: list[Offer], name: str | None) -> None:
            super().__init__()
            self.offers, self.name = offers, name

    class Compared(Message):
        """It was found out what a preset makes of the config."""

        def __init__(self, offer: Offer, give_way: bool, choice: PresetChoice) -> None:
            super().__init__()
            self.offer, self.give_way, self.choice = offer, give_way, choice

    def __init__(self, text: str, path: Path, choice: CardChoice) -> None:
        super().__init__()
        self._text, self._path, self._card = text, path, choice
        document = ConfigDocument(text)
        preset, variant = document.value("preset"), document.value("model.variant")
        self._before = preset if isinstance(preset, str) else None
        self._variant = variant if isinstance(variant, str) and variant != "auto" else ""
        self._give_way = False
        self._known: dict[tuple[str, bool], PresetChoice] = {}
        self._wanted: Offer | None = None

    def compose(self) -> ComposeResult:
        """Lay out title, presets and keys."""
        with Vertical():
            yield Label(Text(f"A preset for {self._path}", style="bold"), id="preset-title")
            yield PresetPane(with_none=False)
            find = key_of(self.app, "presets.filter", "/")
            give, cancel = (key_of(self.app, f"presetpicker.{n}", k) for n, k in _KEYS.items())
            words = f"enter choose   {find} filter   {give} file's values stay or give way"
            yield Label(Text(f"{words}   {cancel} cancel"))

    def on_mount(self) -> None:
        """Read the presets."""
        self._find()

    @work(thread=True, exclusive=True, group="presets")
    def _find(self) -> None:
        offers = all_offers(self._card.card(), self._variant)
        self.post_message(self.Found(offers, self._before))

    @on(Found)
    def found(self, message: Found) -> None:
        """Show the presets; the one that counts now is in focus."""
        self.query_one(PresetPane).show(message.offers, message.name)

    @on(PresetPane.Looked)
    def looked(self, message: PresetPane.Looked) -> None:
        """Find out what it changes."""
        self._wanted = message.offer
        self._say()

    @on(PresetPane.Chosen)
    def chosen(self, message: PresetPane.Chosen) -> None:
        """Answer with the config's new text."""
        offer = message.offer
        if offer is None:
            return
        known = self._known.get((offer.preset.name, self._give_way))
        if known is None:
            self.notify("It is still being compared.", timeout=2)
        elif known.text == self._text and known.problem:
            self.notify(known.problem, severity="warning")
        else:
            self.dismiss(known.text)

    @on(Compared)
    def compared(self, message: Compared) -> None:
        """Show it, if it is still wanted."""
        self._known[message.offer.preset.name, message.give_way] = message.choice
        self._say()

    def action_give_way(self) -> None:
        """Let the file's values stay, or let them give way to the preset's."""
        self._give_way = not self._give_way
        self._say()

    def action_close(self) -> None:
        """Leave the filter; then: answer with nothing."""
        if not self.query_one(PresetPane).leave_filter():
            self.dismiss(None)

    def action_leave(self) -> None:
        """Answer with nothing."""
        self.dismiss(None)

    def _say(self) -> None:
        offer = self._wanted
        pane = self.query_one(PresetPane)
        if offer is None:
            pane.tell(Text("No preset is called so: esc shows all."))
            return
        known = self._known.get((offer.preset.name, self._give_way))
        parts = [title_words(offer)]
        if self._variant and offer.preset.variant not in ("", self._variant):
            other = f"! it is for {offer.preset.variant}, the config's model is {self._variant}"
            parts.append(Text(other, style="bold"))
        if known is None:
            self._compare(offer, self._give_way)
            parts.append(Text("Comparing ..."))
        else:
            give = key_of(self.app, "presetpicker.give-way", "f")
            parts += _choice_words(known, self._path, self._give_way, give)
        parts += [Text(""), purpose_words(offer)]
        pane.tell(Text("\n").join(parts))

    @work(thread=True, exclusive=True, group="compare")
    def _compare(self, offer: Offer, give_way: bool) -> None:
        card: Card | None = self._card.card()
        choice = choose_preset(self._text, self._path, offer.preset, card, give_way=give_way)
        self.post_message(self.Compared(offer, give_way, choice))


def _choice_words(choice: PresetChoice, path: Path, give_way: bool, give: str) -> Iterator[Text]:
    yield memory_words(choice.checked)
    for problem in choice.checked.problems[:1]:
        yield Text(f"! {problem_words(problem, path)}", style="bold")
    if choice.problem:
        yield Text(f"! {choice.problem}", style="bold")
        return
    yield changes_words(choice.changes, "Changes")
    if choice.kept:
        yield Text(f"These {len(choice.kept)} stay as the file sets them ({give} changes it):")
        for key, (own, of_preset) in choice.kept.items():
            values = f"{toml_value(own)}, the preset has {toml_value(of_preset)}"
            yield Text(f"  {key} = {values}")
    elif give_way:
        yield Text("What the file sets otherwise than the preset gives way.")
