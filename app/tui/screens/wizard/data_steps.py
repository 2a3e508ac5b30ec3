"""What is to be learned, and from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.message import Message
from textual.widgets import Input, Label, OptionList, Static

from app.domain.data_folder import DataFolder, look_into
from app.domain.goals import GOALS, GoalChoice, data_problem, data_words
from app.tui.lines import Lines
from app.tui.path_field import PathField, path_keys
from app.tui.screens.wizard.step import Judged, Step

_USUAL = ("clips", "videos", "images", "data", "dataset")
_GOALS = tuple(GOALS.values())


class GoalStep(Step):
    """What is to be learned."""

    TITLE = "goal"

    def compose(self) -> ComposeResult:
        """Lay out the goals, and what each means."""
        yield Label("What is the model to learn?", classes="words")
        yield Lines(*(Text(goal.title) for goal in _GOALS), id="wizard-goals")
        yield Static(id="wizard-goal-help", classes="words gap")

    def arrive(self) -> None:
        """Begin on what was chosen."""
        lines = self.query_one(Lines)
        goal = self.draft.goal
        lines.highlighted = _GOALS.index(goal) if goal is not None else lines.highlighted or 0
        lines.focus()

    @on(OptionList.OptionHighlighted, "#wizard-goals")
    def highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Say what the goal means."""
        event.stop()
        self.query_one("#wizard-goal-help", Static).update(Text(_GOALS[event.option_index].help))

    @on(OptionList.OptionSelected, "#wizard-goals")
    def selected(self, event: OptionList.OptionSelected) -> None:
        """Take it."""
        event.stop()
        self.done()

    def read(self) -> GoalChoice:
        """Return the goal of the line."""
        return _GOALS[self.query_one(Lines).highlighted or 0]

    def take(self, answer: Any) -> None:
        """Remember it; another goal takes another preset."""
        if self.draft.goal != answer:
            self.draft.goal = answer
            self.draft.preset, self.draft.preset_taken = None, False


class DataStep(Step):
    """The folder, looked into while it is typed."""

    TITLE = "data"

    class Looked(Message):
        """A folder was looked into."""

        def __init__(self, words: str, lines: list[str], problem: str) -> None:
            super().__init__()
            self.words, self.lines, self.problem = words, lines, problem

    def compose(self) -> ComposeResult:
        """Lay out the field and what is found."""
        yield Static(
            "Which folder holds the clips or images? Beside each lies its caption: fish.txt of "
            "fish.mp4.",
            classes="words",
        )
        yield PathField(folders=True, id="wizard-folder", placeholder="a folder", classes="gap")
        yield Static(id="wizard-found", classes="words gap")
        yield Static(f"enter goes on, {path_keys(self.app)}", classes="words gap")

    def arrive(self) -> None:
        """Show the folder; at first a usual one, if it is there."""
        field = self.query_one(PathField)
        if not field.value:
            field.show(next((name for name in _USUAL if Path(name).is_dir()), ""))
        self._look(field.value)
        field.focus()

    @on(Input.Changed, "#wizard-folder")
    def typed(self, event: Input.Changed) -> None:
        """Look into it."""
        event.stop()
        self._look(event.value)

    @on(Input.Submitted, "#wizard-folder")
    def submitted(self, event: Input.Submitted) -> None:
        """Take it."""
        event.stop()
        self.done()

    @work(thread=True, exclusive=True, group="folder")
    def _look(self, words: str) -> None:
        goal = self.draft.goal
        if not words.strip() or goal is None:
            self.post_message(self.Looked(words, [], ""))
            return
        found = look_into(Path(words.strip()).expanduser())
        problem = data_problem(goal, found)
        self.post_message(self.Looked(words, data_words(goal, found), problem))

    @on(Looked)
    def looked(self, message: Looked) -> None:
        """Show what is in it, if it still is the one."""
        if message.words != self.query_one(PathField).value:
            return
        text = Text("\n".join(message.lines))
        if message.problem:
            text = Text(f"! {message.problem}", style="bold")
        self.query_one("#wizard-found", Static).update(text)

    def read(self) -> tuple[str, GoalChoice | None]:
        """Return the folder, and what it is for."""
        return self.query_one(PathField).value.strip(), self.draft.goal

    def judge(self, given: Any) -> Judged:
        """Look into the folder once more."""
        words, goal = given
        if not words:
            return Judged(None, "give a folder", "wizard-folder")
        found = look_into(Path(words).expanduser())
        return Judged(found, data_problem(goal, found), "wizard-folder")

    def take(self, answer: Any) -> None:
        """Remember what was found."""
        found: DataFolder = answer
        self.draft.data = found
