"""What the screen shows and how values are edited; what is done with the file is `screen.py`'s."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import DataTable, Footer, Input, Label, Static, TextArea

from app.domain.config_check import Checked, check_text, problem_line
from app.domain.config_document import ConfigDocument
from app.domain.config_file import ConfigFile
from app.domain.config_options import Option, options_of
from app.tui.fitting import Fitting
from app.tui.keyed import Keyed
from app.tui.screens.config.card_choice import CardChoice
from app.tui.screens.config.options_table import OptionsTable
from app.tui.screens.config.toml_area import TomlArea
from app.tui.screens.config.value_input import ValueInput
from app.tui.screens.config.words import memory_words, option_words, problems_words
from app.tui.widgets import Titles
from trainer.contract.errors import MenmaError

DEBOUNCE_S = 0.15
"""So long nobody types before the text is checked."""
_LAYOUT = """
ConfigView #find, ConfigView #edit { height: 1; }
ConfigView #filter, ConfigView #value { width: 1fr; }
ConfigView #tier { width: auto; padding: 0 1; }
ConfigView #key { width: auto; padding: 0 1; }
ConfigView #body { height: 1fr; }
ConfigView #options { width: 1fr; }
ConfigView #toml { width: 1fr; }
ConfigView.-narrow #toml { display: none; }
ConfigView.-narrow.-text #toml { display: block; }
ConfigView.-narrow.-text #options { display: none; }
ConfigView.-wide #options { width: 80; }
ConfigView #edit.-idle { display: none; }
ConfigView #help { height: 5; padding: 0 1; background: $surface; }
ConfigView #memory { height: 2; padding: 0 1; }
ConfigView #problems { height: 1; padding: 0 1; }
ConfigView #memory, ConfigView #problems { text-wrap: nowrap; text-overflow: ellipsis; }
"""


class ConfigView(Fitting, Keyed, Screen[None]):
    """Options and text of one config, and what is wrong with it."""

    DEFAULT_CSS = _LAYOUT
    KEYS_IN = "config"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012  (as Textual has it)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter"),
        Binding("tab", "turn", "TOML"),
        Binding("shift+tab", "turn", "TOML", show=False),
        Binding("escape", "leave_field", "Back", show=False),
        Binding("u", "undo", "Undo"),
        Binding("ctrl+r", "redo", "Redo", show=False),
        Binding("x", "reset", "Reset"),
        Binding("t", "tier", "Tier"),
        Binding("v", "card", "GPU", show=False),
    ]

    class Found(Message):
        """A text was checked."""

        def __init__(self, text: str, checked: Checked) -> None:
            super().__init__()
            self.text, self.checked = text, checked

    def __init__(self) -> None:
        super().__init__()
        self.file: ConfigFile | None = None
        self.checked = Checked()
        self._options: list[Option] = []
        self._all = False
        self.choice = CardChoice()
        self._is_laid_out = False
        self._pending = ""
        self._timer: Timer | None = None

    def compose(self) -> ComposeResult:
        """Lay out filter, options, text, help, editor, memory and problems."""
        yield Titles("config")
        with Horizontal(id="find"):
            yield Input(placeholder="/ finds options", compact=True, id="filter")
            yield Static(id="tier")
        with Horizontal(id="body"):
            yield OptionsTable(id="options")
            yield TomlArea(id="toml")
        yield Static("No config is open: o opens one.", id="help")
        with Horizontal(id="edit", classes="-idle"):
            yield Label(id="key")
            yield ValueInput(id="value")
        yield Static(id="memory")
        yield Static(id="problems")
        yield Footer()

    def on_mount(self) -> None:
        """Begin on the list."""
        self._is_laid_out = True
        self.query_one(OptionsTable).focus()
        if self.file is not None:
            self.show_file(self.file)

    def show_file(self, file: ConfigFile) -> None:
        """Show another file; before the screen is laid out: remember it."""
        self.file, self.checked = file, Checked()
        if not self._is_laid_out:
            return
        self._stop_value()
        self.query_one(TomlArea).show(file.document.text, anew=True)
        self.show_document()
        self.query_one(OptionsTable).focus()

    def show_document(self) -> None:
        """Show what the text has become."""
        if self.file is None:
            return
        self.query_one(TomlArea).show(self.file.document.text)
        self._options = options_of(self.file.document)
        self._list()
        self.tell()
        self._check_soon(self.file.document.text)

    def tell(self) -> None:
        """Say which file it is, and whether it is saved."""
        file = self.file
        if file is not None:
            mark = " *" if file.is_changed else ""
            self.query_one(Titles).tell(f"{file.path}{mark}")

    @on(Input.Changed, "#filter")
    def filtered(self) -> None:
        """Show what matches, the cursor on the first."""
        self._list()
        if self.query_one("#filter", Input).value:
            self.query_one(OptionsTable).move_cursor(row=0)

    @on(Input.Submitted, "#filter")
    def filter_done(self) -> None:
        """Go to what was found."""
        self.query_one(OptionsTable).focus()

    @on(DataTable.RowHighlighted)
    def highlighted(self) -> None:
        """Tell about the option that the cursor is on, and show its line."""
        self._describe()
        option, area = self.query_one(OptionsTable).option, self.query_one(TomlArea)
        if option is None or self.file is None or area.has_focus:
            return
        line = self.file.document.line_of(option.key)
        if line is not None:
            area.go_to(line)

    @on(DataTable.RowSelected)
    def edit_value(self) -> None:
        """Edit the value of the option."""
        option = self.query_one(OptionsTable).option
        if option is not None:
            self.query_one("#edit").remove_class("-idle")
            self.query_one("#key", Label).update(Text(f"{option.key} ="))
            self.query_one(ValueInput).start(option)

    @on(Input.Changed, "#value")
    def value_typed(self) -> None:
        """Check the config as it would be with what is typed."""
        if self.file is None or self.query_one(ValueInput).option is None:
            return
        try:
            candidate = self.query_one(ValueInput).put_into(ConfigDocument(self.file.document.text))
        except MenmaError as error:
            self._say("problems", Text(f"! {error.message}", style="bold"))
        else:
            self._check_soon(candidate.text)

    @on(Input.Submitted, "#value")
    def value_taken(self) -> None:
        """Take what was typed."""
        value, file = self.query_one(ValueInput), self.file
        if value.option is None or file is None:
            return
        try:
            value.put_into(file.document)
        except MenmaError as error:
            self._say("problems", Text(f"! {error.message}", style="bold"))
            self.notify(str(error), severity="error")
            return
        self._stop_value()
        self.query_one(OptionsTable).focus()
        self.show_document()

    @on(TextArea.Changed)
    def text_typed(self, message: TextArea.Changed) -> None:
        """Take what was typed in the text; what the document itself has changed is no edit."""
        area = message.text_area
        if self.file is None:
            return
        before = self.file.document.text
        self.file.document.edit(area.text, group=f"line {area.cursor_location[0]}")
        if self.file.document.text != before:
            self.query_one(TomlArea).colour()
            self.show_document()

    @on(TomlArea.Turned)
    def turned(self, message: TomlArea.Turned) -> None:
        """Undo or redo from within the text."""
        if message.back:
            self.action_undo()
        else:
            self.action_redo()

    @on(Found)
    def found(self, message: Found) -> None:
        """Show what is wrong, and the memory."""
        if message.text != self._pending or self.file is None:
            return
        self.checked = message.checked
        path = self.file.path
        lines = (problem_line(problem, path) for problem in self.checked.problems)
        self.query_one(TomlArea).mark(line for line in lines if line is not None)
        self._list()
        self._say("memory", memory_words(self.checked))
        self._say("problems", problems_words(self.checked, path))

    def action_filter(self) -> None:
        """Look for options."""
        self.remove_class("-text")
        self.query_one("#filter", Input).focus()

    def action_turn(self) -> None:
        """Go from the list to the text, or back."""
        area = self.query_one(TomlArea)
        to_text = not area.has_focus
        self._stop_value()
        self.set_class(to_text, "-text")
        (area if to_text else self.query_one(OptionsTable)).focus()

    def action_leave_field(self) -> None:
        """Go back to the list; there: show all options again."""
        table, field = self.query_one(OptionsTable), self.query_one("#filter", Input)
        if table.has_focus:
            field.value = ""
        editing = self.query_one(ValueInput).option is not None
        self._stop_value()
        self.remove_class("-text")
        table.focus()
        if editing and self.file is not None:
            self._check_soon(self.file.document.text)

    def action_undo(self) -> None:
        """Take the last edit back."""
        if self.file is not None and self.file.document.undo():
            self.show_document()
        else:
            self.notify("There is nothing to undo.", timeout=2)

    def action_redo(self) -> None:
        """Do again what was taken back."""
        if self.file is not None and self.file.document.redo():
            self.show_document()
        else:
            self.notify("There is nothing to redo.", timeout=2)

    def action_reset(self) -> None:
        """Take the option out of the file."""
        option = self.query_one(OptionsTable).option
        if option is None or self.file is None:
            return
        if not option.is_changed:
            self.notify("The file does not set it.", timeout=2)
            return
        try:
            self.file.document.remove(option.key)
        except MenmaError as error:
            self.notify(str(error), severity="error")
        self.show_document()

    def action_tier(self) -> None:
        """Show all options, or the basic ones and what the file sets."""
        self._all = not self._all
        self._list()

    def action_card(self) -> None:
        """Estimate for the next size of GPU."""
        self.choice.next()
        if self.file is not None:
            self._check_soon(self.file.document.text)

    def go_to_line(self, line: int) -> None:
        """Show a line of the text."""
        self.add_class("-text")
        area = self.query_one(TomlArea)
        area.focus()
        area.go_to(line)

    def _stop_value(self) -> None:
        self.query_one("#edit").add_class("-idle")
        self.query_one(ValueInput).stop()

    def _list(self) -> None:
        words = self.query_one("#filter", Input).value
        tier = [o for o in self._options if self._all or o.is_basic or o.is_changed]
        shown = [o for o in (self._options if words else tier) if o.matches(words)]
        wrong = frozenset(problem.key for problem in self.checked.problems)
        self.query_one(OptionsTable).show(shown, wrong)
        name = "found" if words else "all" if self._all else "basic"
        self.query_one("#tier", Static).update(f"{name}: {len(shown)} of {len(self._options)}")
        self._describe()

    def _describe(self) -> None:
        option = self.query_one(OptionsTable).option
        if option is None:
            if self.file is not None:
                self._say("help", Text("No option is called so: esc shows all."))
            return
        self._say("help", option_words(option))

    def _check_soon(self, text: str) -> None:
        self._pending = text
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(DEBOUNCE_S, self._check)

    @work(thread=True, exclusive=True, group="check")
    def _check(self) -> None:
        """Check the text that is pending, in a thread."""
        text, file = self._pending, self.file
        if file is not None:
            path: Path = file.path
            self.post_message(self.Found(text, check_text(text, path, self.choice.card())))

    def _say(self, line: str, words: Text) -> None:
        self.query_one(f"#{line}", Static).update(words)
