"""The one editor of values."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.suggester import SuggestFromList
from textual.widgets import Input

from app.domain.config_document import ConfigDocument
from app.domain.config_options import Option


class ValueInput(Input):
    """Edits the value of one option; up and down go through what it can be."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "choice(-1)", "Choice", show=False),
        Binding("down", "choice(1)", "Choice", show=False),
    ]

    def __init__(self, **attributes: Any) -> None:
        super().__init__(compact=True, disabled=True, **attributes)
        self.option: Option | None = None

    def start(self, option: Option) -> None:
        """Begin to edit an option."""
        self.option = option
        words = option.raw if option.raw is not None else option.default_words
        self.suggester = SuggestFromList(option.choices) if option.choices else None
        self.disabled = False
        self.value = words or ""
        self.focus()
        self.cursor_position = len(self.value)

    def put_into(self, document: ConfigDocument) -> ConfigDocument:
        """Set the option in a config; return it.

        Raises:
            UserError: what is typed is no value of the option.
        """
        if self.option is not None:
            document.set(self.option.key, self.option.to_raw(self.value))
        return document

    def stop(self) -> None:
        """End the editing; the value is not taken."""
        self.option = None
        self.value = ""
        self.disabled = True

    def action_choice(self, by: int) -> None:
        """Take the next of the values that are possible."""
        choices = self.option.choices if self.option is not None else ()
        if not choices:
            return
        now = self.value.strip().strip("\"'")
        place = choices.index(now) + by if now in choices else 0 if by > 0 else -1
        self.value = choices[place % len(choices)]
        self.cursor_position = len(self.value)
