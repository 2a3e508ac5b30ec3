"""What the steps have in common: shown, read, judged in a thread, taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from textual.containers import Vertical
from textual.message import Message

from app.tui.screens.wizard.draft import Draft


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found out about an answer."""

    answer: Any = None
    problem: str = ""
    """Why it is none; empty: it is one."""
    field: str = ""
    """Id of the widget to mend it in; empty: the one that has the focus."""


class Step(Vertical):
    """One question. It reads its widgets in `read`, in a handler; `judge` looks at files, in a
    thread; `take` puts the answer into the draft."""

    TITLE: ClassVar[str]
    DEFAULT_CSS = """
    Step { height: 1fr; padding: 0 1; }
    Step .row { height: 1; }
    Step .label { width: 19; }
    Step .row Input { width: 1fr; }
    Step .words { width: 1fr; height: auto; }
    Step .gap { margin-top: 1; }
    """

    class Done(Message):
        """The answer is given: it is judged, and if it is right the next step comes."""

    def __init__(self, name: str, draft: Draft) -> None:
        super().__init__(id=f"wizard-{name}")
        self.draft = draft

    def arrive(self) -> None:
        """Show what is answered already, and take the focus."""

    def read(self) -> Any:
        """Return what the widgets say."""

    def judge(self, given: Any) -> Judged:
        """Return what is given as an answer, or why it is none. Called in a thread."""
        return Judged(given)

    def take(self, answer: Any) -> None:
        """Put the answer into the draft."""

    def show_problem(self, judged: Judged) -> None:
        """Go where it can be mended."""
        if judged.field:
            self.query_one(f"#{judged.field}").focus()

    def done(self) -> None:
        """Say that the answer is given."""
        self.post_message(self.Done())
