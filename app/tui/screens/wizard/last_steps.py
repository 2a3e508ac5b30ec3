"""Name, steps and sample; then a look at all of it, and the start."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.widgets import Input, Label, OptionList, Static

from app.domain.cards import Card
from app.domain.config_check import Checked, check_text, problem_words
from app.domain.demo_model import demo_preset
from app.domain.presets import Preset
from app.domain.wizard import (
    Answers,
    can_sample,
    config_text,
    name_problem,
    needs_image,
    new_command,
    set_lines,
    steps_words,
    suggested_name,
    suggested_steps,
    written_path,
)
from app.tui.keyed import Keyed
from app.tui.lines import Lines
from app.tui.path_field import PathField
from app.tui.screens.config.words import memory_words
from app.tui.screens.wizard.step import Judged, Step
from app.tui.widgets import TextView
from trainer.contract.media_kinds import IMAGE_EXTENSIONS
from trainer.contract.variants import VARIANTS

START = {
    "run": "run now: {steps}, before everything else that waits",
    "queue": "queue: {steps}, behind what waits",
    "save": "save only: the config opens, nothing is started",
}


class NameStep(Step):
    """What it is called, how long it trains, what the sample shows."""

    TITLE = "name"
    DEFAULT_CSS = "NameStep .-hidden { display: none; }"

    def compose(self) -> ComposeResult:
        """Lay out the fields."""
        yield Label("Name, length, and a sample at the end", classes="words")
        with Horizontal(classes="row gap"):
            yield Label("name", classes="label")
            yield Input(compact=True, id="wizard-run-name")
        with Horizontal(classes="row"):
            yield Label("training steps", classes="label")
            yield Input(type="integer", compact=True, id="wizard-steps")
        with Horizontal(classes="row", id="row-prompt"):
            yield Label("prompt of a sample", classes="label")
            yield Input(placeholder="empty: none is made", compact=True, id="wizard-prompt")
        with Horizontal(classes="row", id="row-image"):
            yield Label("its first frame", classes="label")
            yield PathField(suffixes=tuple(sorted(IMAGE_EXTENSIONS)), id="wizard-image")
        yield Static(id="wizard-length", classes="words gap")
        yield Static(id="wizard-place", classes="words")
        yield Static("enter goes on", classes="words gap")

    def arrive(self) -> None:
        """Offer a name, a length and a prompt; what was changed by hand stays."""
        draft, preset = self.draft, self._preset()
        known = VARIANTS.get(draft.model.variant) if draft.model is not None else None
        sampled = known is not None and can_sample(known)
        self.query_one("#row-prompt").set_class(not sampled, "-hidden")
        pictured = sampled and known is not None and needs_image(known)
        self.query_one("#row-image").set_class(not pictured, "-hidden")
        steps = draft.suggested[1]
        caption = " ".join(draft.data.first_caption.split()) if draft.data is not None else ""
        if draft.goal is not None and draft.data is not None:
            name = draft.suggested[0]
            if not name or draft.name in ("", name):
                name = suggested_name(draft.goal, draft.data.path, draft.runs_dir)
            own = preset.max_steps if preset is not None else None
            steps = None if draft.is_demo else suggested_steps(preset, draft.num_items)
            offered = (name, steps or own, caption if sampled else "")
            self._offer(offered)
            draft.suggested = offered
        name_field = self.query_one("#wizard-run-name", Input)
        name_field.focus()
        self._tell()

    def _offer(self, offered: tuple[str, int | None, str]) -> None:
        """Put in what is offered where nothing else was typed."""
        ids = ("wizard-run-name", "wizard-steps", "wizard-prompt")
        for id_, before, now in zip(ids, self.draft.suggested, offered, strict=True):
            field = self.query_one(f"#{id_}", Input)
            if field.value in ("", str(before or "")):
                field.value = str(now or "")
                field.cursor_position = len(field.value)

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        """Say what it means."""
        event.stop()
        self._tell()

    @on(Input.Submitted)
    def submitted(self, event: Input.Submitted) -> None:
        """Go to the next field, or on."""
        event.stop()
        fields = [field for field in self.query(Input) if field.parent.display]  # type: ignore[union-attr]  # each is in a row
        place = fields.index(event.input)
        if place + 1 < len(fields):
            fields[place + 1].focus()
        else:
            self.done()

    def read(self) -> dict[str, str]:
        """Return what the fields say."""
        shown = {field.id or "": field.value.strip() for field in self.query(Input)}
        return {id_: "" if self._is_hidden(id_) else words for id_, words in shown.items()}

    def judge(self, given: Any) -> Judged:
        """Look whether the name is free, and the picture there."""
        name, words = given["wizard-run-name"], given["wizard-steps"]
        if problem := name_problem(name, self.draft.runs_dir):
            return Judged(None, problem, "wizard-run-name")
        if words and (not words.isdecimal() or not int(words)):
            return Judged(None, "steps are a whole number from 1 on", "wizard-steps")
        image = Path(given["wizard-image"]).expanduser() if given["wizard-image"] else None
        if image is not None and not image.is_file():
            return Judged(None, f"no such picture: {image}", "wizard-image")
        return Judged((name, int(words) if words else None, given["wizard-prompt"], image))

    def take(self, answer: Any) -> None:
        """Remember it."""
        draft = self.draft
        draft.name, steps, draft.prompt, draft.image = answer
        preset = self._preset()
        own = preset.max_steps if preset is not None else None
        draft.max_steps = None if steps == own else steps

    def _preset(self) -> Preset | None:
        return demo_preset() if self.draft.is_demo else self.draft.preset

    def _is_hidden(self, id_: str) -> bool:
        parent = self.query_one(f"#{id_}").parent
        return parent is not None and not getattr(parent, "display", True)

    def _tell(self) -> None:
        words = self.query_one("#wizard-steps", Input).value
        steps = int(words) if words.isdecimal() else 0
        told = steps_words(self._preset(), steps, self.draft.num_items) if steps else ""
        self.query_one("#wizard-length", Static).update(Text(told))
        name = self.query_one("#wizard-run-name", Input).value.strip()
        place = f"config: configs/{name}.toml   run: {written_path(self.draft.runs_dir / name)}"
        self.query_one("#wizard-place", Static).update(Text(place if name else ""))


class ReviewStep(Keyed, Step):
    """The config and the commands, and how it is started."""

    TITLE = "review"
    DEFAULT_CSS = """
    ReviewStep #wizard-review { height: 1fr; background: $surface; padding: 0 1; }
    ReviewStep #wizard-commands { max-height: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "scroll(8)", "More"),
        Binding("u", "scroll(-8)", "Back up", show=False),
        Binding("t", "turn", "All lines"),
        Binding("c", "commands", "Commands"),
    ]

    class Made(Message):
        """The config was made and checked."""

        def __init__(self, text: str, checked: Checked) -> None:
            super().__init__()
            self.text, self.checked = text, checked

    def compose(self) -> ComposeResult:
        """Lay out text, verdict, commands and ways to start."""
        with VerticalScroll(id="wizard-review", can_focus=False):
            yield Static(id="wizard-toml")
        yield Static(id="wizard-verdict", classes="words")
        yield Static(id="wizard-commands", classes="words")
        yield Lines(id="wizard-start")

    def arrive(self) -> None:
        """Make the config."""
        self._whole = False
        self._text = ""
        self._checked: Checked | None = None
        answers = self.draft.answers()
        steps = ", ".join(answers.steps)
        lines = self.query_one(Lines)
        lines.show({n: w.format(steps=steps) for n, w in START.items()}, lines.name_in_focus)
        self.query_one("#wizard-toml", Static).update("Checking ...")
        path = self.draft.path
        chain = f"menma queue chain {shlex.quote(str(path))} --steps {','.join(answers.steps)}"
        self._commands = f"menma {shlex.join(new_command(answers, path))}\n{chain}"
        self.query_one("#wizard-commands", Static).update(Text(chain))
        lines.focus()
        self._make(answers, self.draft.card)

    @work(thread=True, exclusive=True, group="config")
    def _make(self, answers: Answers, card: Card | None) -> None:
        text = config_text(answers)
        self.post_message(self.Made(text, check_text(text, self.draft.path, card)))

    @on(Made)
    def made(self, message: Made) -> None:
        """Show it."""
        self._text, self._checked = message.text, message.checked
        self._show()
        problems = message.checked.problems
        if problems:
            words = Text("\n").join(
                Text(f"! {problem_words(problem, self.draft.path)}", style="bold")
                for problem in problems[:3]
            )
        elif self.draft.is_demo:
            words = Text("The demo model is tiny: it trains on a CPU, in about a minute.")
        else:
            words = memory_words(message.checked, "no GPU here")
        self.query_one("#wizard-verdict", Static).update(words)

    @on(OptionList.OptionSelected, "#wizard-start")
    def selected(self, event: OptionList.OptionSelected) -> None:
        """Start it."""
        event.stop()
        self.done()

    def action_turn(self) -> None:
        """Show the whole text, or the lines that set something."""
        self._whole = not self._whole
        self._show()

    def action_commands(self) -> None:
        """Show the commands that do the same."""
        words = f"cd {shlex.quote(str(Path.cwd()))}\n{self._commands}"
        self.app.push_screen(TextView("Commands that do the same", words))

    def action_scroll(self, by: int) -> None:
        """Move the text."""
        self.query_one("#wizard-review").scroll_relative(y=by, animate=False)

    def read(self) -> tuple[str, Answers, Checked | None]:
        """Return how it is to be started, and what was found; None: nothing yet."""
        return self.query_one(Lines).name_in_focus, self.draft.answers(), self._checked

    def judge(self, given: Any) -> Judged:
        """Refuse to start what cannot work; saving it is allowed."""
        way, answers, checked = given
        if checked is None:
            checked = check_text(config_text(answers), self.draft.path, self.draft.card)
        if way != "save" and (checked.config is None or checked.problems):
            words = "it has problems: save it, and mend it in the config screen"
            return Judged(None, words)
        return Judged((way, checked.config))

    def _show(self) -> None:
        text = self._text if self._whole else "\n".join(set_lines(self._text))
        self.query_one("#wizard-toml", Static).update(Text(text))
