"""What failed, why we think so, the last lines, what to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.binding import Binding, BindingType

from app.runs.failure import Failure
from app.tui.widgets import TextView


class FailureView(TextView):
    """A failure, to read and to copy.

    Args:
        failure: what is known of it.
        open_run: shows the run in the monitor; None: it is no run, or it is shown already.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("o", "open", "Open in the monitor")]

    def __init__(self, failure: Failure, open_run: Callable[[], object] | None = None) -> None:
        super().__init__(f"Error of {failure.name}", failure.text())
        self._open_run = open_run
        self.MORE_KEYS = "o monitor   " if open_run is not None else ""

    def action_open(self) -> None:
        """Show curves and figures up to the failure."""
        if self._open_run is not None:
            self.dismiss()
            self._open_run()
