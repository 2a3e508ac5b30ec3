"""On which GPUs, and with which preset."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Input, Label, OptionList, Static

from app.domain import cards
from app.domain.cards import Card
from app.domain.config_check import Checked, check_text
from app.domain.config_view import complete_values
from app.domain.preset_choice import Changes
from app.domain.preset_offers import Offer, fitting_offers
from app.domain.presets import Preset, card_memory_gib, differences
from app.domain.wizard import Answers, config_path, config_text
from app.tui.lines import Lines
from app.tui.preset_pane import PresetPane, changes_words, purpose_words, title_words
from app.tui.screens.config.words import memory_words
from app.tui.screens.wizard.step import Judged, Step
from trainer.contract.errors import ConfigError
from trainer.contract.memory_model import gpu_of_memory

_SIZES = {f"gb-{size}": size for size in (12, 16, 24, 32, 48, 80)}
MOST_GPUS = 64


class HardwareStep(Step):
    """This machine's GPUs, or those of another one."""

    TITLE = "hardware"

    class Found(Message):
        """The driver was asked."""

        def __init__(self, card: Card | None) -> None:
            super().__init__()
            self.card = card

    def compose(self) -> ComposeResult:
        """Lay out the machines and the number of GPUs."""
        yield Label("On which GPU is it to be trained?", classes="words")
        yield Lines(id="wizard-machines")
        with Horizontal(classes="row gap"):
            yield Label("number of GPUs", classes="label")
            yield Input("1", type="integer", compact=True, id="wizard-num-gpus")
        yield Static("enter takes a line; tab goes to the number of GPUs", classes="words gap")

    def arrive(self) -> None:
        """Ask the driver, the first time."""
        if self.draft.here is None:
            self._list("this machine: asking the driver ...", "here")
            self._ask()
        self.query_one(Lines).focus()

    @work(thread=True, exclusive=True, group="gpus")
    def _ask(self) -> None:
        self.post_message(self.Found(cards.choose_card(None, None)))

    @on(Found)
    def found(self, message: Found) -> None:
        """Show what this machine has."""
        card = message.card
        self.draft.here = (card,)
        self._list(_machine_words(card), self.query_one(Lines).name_in_focus)
        if card is not None:
            self.query_one("#wizard-num-gpus", Input).value = str(card.count)

    @on(OptionList.OptionSelected, "#wizard-machines")
    @on(Input.Submitted, "#wizard-num-gpus")
    def selected(self, event: OptionList.OptionSelected | Input.Submitted) -> None:
        """Take it."""
        event.stop()
        self.done()

    def read(self) -> tuple[str, str]:
        """Return the line and the number."""
        return self.query_one(Lines).name_in_focus, self.query_one(Input).value

    def judge(self, given: Any) -> Judged:
        """Turn it into GPUs."""
        name, words = given
        if not words.isdecimal() or not 1 <= int(words) <= MOST_GPUS:
            return Judged(None, f"the number of GPUs is 1 to {MOST_GPUS}", "wizard-num-gpus")
        count = int(words)
        if name in _SIZES:
            size = _SIZES[name]
            gpu = gpu_of_memory(card_memory_gib(size) or float(size), f"{size} GB GPU")
            return Judged(Card(gpu=gpu, count=count))
        asked = self.draft.here
        here = asked[0] if asked is not None else cards.choose_card(None, None)
        if here is not None and count > here.count:
            return Judged(None, f"this machine has {here.count}", "wizard-num-gpus")
        if here is not None:
            here = Card(gpu=here.gpu, count=count, here=True)
        return Judged(here)

    def take(self, answer: Any) -> None:
        """Remember it; other GPUs are offered other presets."""
        card: Card | None = answer
        if card != self.draft.card:
            self.draft.preset_taken = False
        self.draft.card = card

    def _list(self, here: str, name: str) -> None:
        others = {key: f"another machine, GPUs of {size} GB" for key, size in _SIZES.items()}
        self.query_one(Lines).show({"here": here, **others}, name)


class PresetStep(Step):
    """Presets that fit, the best first; what each changes against the best, and whether it fits."""

    TITLE = "preset"

    class Found(Message):
        """The presets were read."""

        def __init__(self, offers: list[Offer]) -> None:
            super().__init__()
            self.offers = offers

    class Compared(Message):
        """A preset was looked at."""

        def __init__(
            self, offer: Offer | None, changes: Changes, other: str, checked: Checked
        ) -> None:
            super().__init__()
            self.offer, self.changes, self.other, self.checked = offer, changes, other, checked

    def compose(self) -> ComposeResult:
        """Lay out the presets."""
        yield PresetPane(with_none=True)

    def arrive(self) -> None:
        """Find the presets for what was answered."""
        self._offers: list[Offer] = []
        self._find(self.draft.answers(), self.draft.card)

    @work(thread=True, exclusive=True, group="presets")
    def _find(self, answers: Answers, card: Card | None) -> None:
        kind = self.draft.kind or "video"
        self.post_message(self.Found(fitting_offers(answers.model, answers.goal, kind, card)))

    @on(Found)
    def found(self, message: Found) -> None:
        """Show them; the one that was taken is in focus."""
        self._offers = message.offers
        name = None
        if self.draft.preset_taken:
            name = self.draft.preset.name if self.draft.preset is not None else "none"
        self.query_one(PresetPane).show(message.offers, name)

    @on(PresetPane.Looked)
    def looked(self, message: PresetPane.Looked) -> None:
        """Compare it, and estimate its memory."""
        event = message
        event.stop()
        offer = message.offer
        words = Text("\n").join((title_words(offer), purpose_words(offer), Text("Comparing ...")))
        self.query_one(PresetPane).tell(words)
        best = self._offers[0].preset if self._offers else None
        answers = self.draft.answers()
        chosen = Answers(
            model=answers.model,
            goal=answers.goal,
            data=answers.data,
            preset=offer.preset if offer is not None else None,
            name="new",
        )
        self._compare(offer, best, chosen, self.draft.card)

    @work(thread=True, exclusive=True, group="compare")
    def _compare(
        self, offer: Offer | None, best: Preset | None, answers: Answers, card: Card | None
    ) -> None:
        preset = answers.preset
        against = best if best is not None and best != preset else None
        other = against.name if against is not None else "Menma's defaults"
        checked = check_text(config_text(answers), config_path("new"), card)
        try:
            changes = differences(_values(against), _values(preset))
        except ConfigError:  # a preset of the user's own that was changed just now
            changes = {}
        self.post_message(self.Compared(offer, changes, other, checked))

    @on(Compared)
    def compared(self, message: Compared) -> None:
        """Show it, if it still is in focus."""
        pane = self.query_one(PresetPane)
        if pane.offer != message.offer:
            return
        parts = (
            title_words(message.offer),
            purpose_words(message.offer),
            memory_words(message.checked, "no GPU here").split()[0],
            changes_words(message.changes, f"Changes against {message.other}"),
        )
        pane.tell(Text("\n").join(part for part in parts if part))

    @on(PresetPane.Chosen)
    def chosen(self, message: PresetPane.Chosen) -> None:
        """Take it."""
        message.stop()
        self.done()

    def read(self) -> Offer | None:
        """Return the preset in focus."""
        return self.query_one(PresetPane).offer

    def take(self, answer: Any) -> None:
        """Remember it."""
        offer: Offer | None = answer
        self.draft.preset = offer.preset if offer is not None else None
        self.draft.preset_taken = True

    def leave_filter(self) -> bool:
        """Leave the filter, if that is what esc is for now."""
        return self.query_one(PresetPane).leave_filter()


def _values(preset: Preset | None) -> dict[str, Any]:
    return complete_values(None if preset is None else str(preset.path))


def _machine_words(card: Card | None) -> str:
    if card is None:
        return "this machine: no NVIDIA GPU was found; it can write the config for another one"
    count = f"{card.count} x " if card.count > 1 else ""
    return f"this machine: {count}{card.gpu.name}, {card.gpu.memory_gib:.1f} GiB"
