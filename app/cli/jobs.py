"""Run a trainer job from a command: show its progress, keep its results, pass its exit code on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer

from app.cli import output
from app.cli.exit_codes import ExitCode, of_child
from app.cli.progress import open_progress

Event = dict[str, Any]


@dataclass(slots=True)
class JobResult:
    """What a job said."""

    exit_code: int = 0
    events: list[Event] = field(default_factory=list)
    """Everything but counted progress."""

    def all(self, kind: str) -> list[Event]:
        """Return the events of one type."""
        return [event for event in self.events if event["type"] == kind]

    @property
    def end(self) -> Event:
        """The fields of the last `end` event, empty when there was none."""
        return next(reversed(self.all("end")), {})

    @property
    def paths(self) -> list[str]:
        """Files that were written."""
        return self.paths_of({"output", "sample"})

    def paths_of(self, kinds: set[str]) -> list[str]:
        """Return the files that events of some types name."""
        return [
            str(event["path"])
            for event in self.events
            if event["type"] in kinds and "path" in event
        ]


def run(job: str, request: Mapping[str, Any], *, quiet: bool = False) -> JobResult:
    """Run a job in the foreground and return what it said, whatever the exit code.

    Args:
        job: name of the job.
        request: see `trainer.contract.jobs`.
        quiet: show only what the job itself writes to stderr.
    """
    from app.cli.progress import counted
    from app.runs.child import run_job

    result = JobResult()
    with open_progress(show_errors=False) as progress:

        def on_event(event: Event) -> None:
            if not counted(event)[1]:
                result.events.append(event)
            if not quiet:
                progress.event(event)

        on_words = progress.say if output.is_terminal() else None
        code = run_job(job, request, on_event, progress.say, on_words)
    if code < 0:
        output.say(f"error: the job was ended by signal {-code}")
        if code == -9:
            output.say("  killed by somebody, or the machine ran out of memory: `dmesg` may say")
    result.exit_code = of_child(code)
    return result


def leave_if_failed(result: JobResult) -> None:
    """End the command with the job's exit code unless it is 0."""
    if result.exit_code != ExitCode.DONE:
        raise typer.Exit(result.exit_code)


def run_or_leave(job: str, request: Mapping[str, Any], *, quiet: bool = False) -> JobResult:
    """Run a job; end the command with its exit code when it fails."""
    result = run(job, request, quiet=quiet)
    leave_if_failed(result)
    return result
