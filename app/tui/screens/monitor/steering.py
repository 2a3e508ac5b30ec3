"""What can be asked of the run that is watched, and why it failed."""

from __future__ import annotations

from textual import on, work
from textual.message import Message

from app.runs import control
from app.runs.failure import BAD, Failure, read_failure
from app.runs.launch import console_tail
from app.runs.state import RunState, State
from app.tui.live import LiveScreen
from app.tui.screens.failure import FailureView
from app.tui.widgets import Ask, TextView
from trainer.contract.errors import MenmaError
from trainer.contract.run_dir import RunDir


class SteeringScreen(LiveScreen):
    """A screen with a run that can be steered."""

    class Explained(Message):
        """Why the run failed was read."""

        def __init__(self, failure: Failure) -> None:
            super().__init__()
            self.failure = failure

    def __init__(self) -> None:
        super().__init__()
        self._run: RunDir | None = None
        self._state: RunState | None = None

    def action_request(self, what: str) -> None:
        """Ask the run to save or to sample."""
        if self._run is None or self._state is None or not self._state.state.is_live:
            self.notify("It does not train.", severity="warning")
            return
        control.request_once(self._run, "save" if what == "save" else "sample")
        self.notify(f"{what} after the current step")

    def action_stop(self) -> None:
        """Stop the run; asked again while it stops: harder."""
        run, state = self._run, self._state
        if run is None or state is None or not state.state.is_live:
            self.notify("It does not train.", severity="warning")
            return
        urgency, words = _how_hard(state)

        def answered(agreed: bool | None) -> None:
            if not agreed:
                return
            try:
                control.stop(run, urgency)
            except (MenmaError, OSError) as error:
                self.notify(str(error), severity="error", timeout=10)

        self.app.push_screen(Ask(f"{state.name}: {words}", "Stop"), answered)

    def action_log(self) -> None:
        """Show the end of what the run has printed."""
        if self._run is not None:
            lines = console_tail(self._run, 200)
            title = f"Log of {self._run.root.name}"
            self.app.push_screen(TextView(title, "\n".join(lines) or "nothing yet"))

    def action_failure(self) -> None:
        """Show why the run failed."""
        if self._run is None or self._state is None or self._state.state not in BAD:
            self.notify("It has not failed.")
            return
        self._read_failure(self._run, self._state)

    @work(thread=True, exclusive=True, group="failure")
    def _read_failure(self, run: RunDir, state: RunState) -> None:
        failure = read_failure(run, state)
        if failure is not None:
            self.post_message(self.Explained(failure))

    @on(Explained)
    def explain(self, message: Explained) -> None:
        """Show why it failed."""
        self.app.push_screen(FailureView(message.failure))


def _how_hard(state: RunState) -> tuple[control.Urgency, str]:
    if state.state is State.STOPPING:
        return control.Urgency.NOW, "it is stopping already. End it now, without saving?"
    return control.Urgency.SAVE, "finish the step, save a checkpoint, end?"
