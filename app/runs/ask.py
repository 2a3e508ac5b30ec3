"""Ask a trainer job something and wait for the answer: for screens, from a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from app.runs.child import Event, run_job
from trainer.contract.errors import BusyError, MenmaError, RunError, UserError

_ERRORS: tuple[type[MenmaError], ...] = (UserError, BusyError)
MAX_WORDS = 20
"""Lines of a job that broke that are told: the end of its traceback."""


class Cancelled(Exception):
    """Whoever asked does not want the answer any more."""


def ask(
    job: str,
    request: Mapping[str, Any],
    on_event: Callable[[Event], None] = lambda event: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Event:
    """Run a job and return its `end` event. Nothing is written to the terminal.

    Args:
        job: name of the job.
        request: see `trainer.contract.jobs`.
        on_event: called with each other event, in this thread.
        cancelled: asked several times a second; when it says so, the job is ended.

    Raises:
        MenmaError: the job failed; says why, of the class that fits its exit code.
        Cancelled: `cancelled` said so.
    """
    told: dict[str, Event] = {}
    words: list[str] = []

    def take(event: Event) -> None:
        told[event["type"]] = event
        if event["type"] != "end":
            on_event(event)

    code = run_job(job, request, take, words.append, words.append, cancelled)
    if code == 0 and "end" in told:
        return told["end"]
    if cancelled():
        raise Cancelled
    error = told.get("error", {})
    message = str(error.get("message") or "\n".join(words[-MAX_WORDS:]))
    if not message:
        message = f"the job {job!r} ended with exit code {code} and said nothing"
    kind = next((kind for kind in _ERRORS if kind.exit_code == code), RunError)
    raise kind(message, hint=str(error.get("hint", "")))
