"""Show a run live, and say how it ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from app.cli import output
from app.cli.exit_codes import ExitCode
from app.cli.progress import Progress, open_progress
from app.runs.durations import duration
from app.runs.follow import Event, follow
from app.runs.launch import console_tail
from app.runs.state import RunState, State, read_state
from app.runs.status import read_status
from trainer.contract.run_dir import RunDir

OnInterrupt = Callable[[int, Callable[[str], None]], None]
"""Called with how often Ctrl-C was pressed, and a way to say something."""


@dataclass(frozen=True, slots=True)
class Watched:
    """How a watched run ended."""

    state: RunState
    error_shown: bool


def watch(
    run: RunDir,
    on_interrupt: OnInterrupt,
    *,
    count: Callable[[], int] | None = None,
    offset: int = 0,
    as_json: bool = False,
    plain: bool = False,
) -> Watched:
    """Show the events of a run until it ends.

    Args:
        run: the run.
        on_interrupt: what Ctrl-C does; it may raise to leave.
        count: how often Ctrl-C was pressed, of `counted_interrupts`; None: it is counted from now.
        offset: where in the event log to begin, in bytes.
        as_json: write the events as JSON lines to stdout instead of drawing them.
        plain: write lines without control characters, on a terminal too.
    """
    error_shown = False
    handled = 0
    screen = nullcontext(None) if as_json else open_progress(show_errors=True, plain=plain)
    counting = counted_interrupts() if count is None else nullcontext(count)
    with counting as pressed, screen as progress:
        say = output.say if progress is None else progress.say
        for event in follow(run.events, lambda: not _is_live(run), offset=offset):
            while handled < pressed():
                handled += 1
                on_interrupt(handled, say)
            if event is not None:
                error_shown |= event["type"] == "error"
                _show(event, progress)
    return Watched(read_state(run), error_shown)


def finish(run: RunDir, watched: Watched) -> ExitCode | int:
    """Say how the run ended and what to do next; return the exit code for it."""
    state = watched.state
    if state.state is State.DONE:
        _say_done(run, state)
        return ExitCode.DONE
    if state.state is State.STOPPED:
        output.say(f"Stopped{_at_step(state)}{f': {state.why}' if state.why else ''}.")
        output.say("The same `menma train` command goes on from the last checkpoint.")
        return ExitCode.INTERRUPTED
    if not watched.error_shown:
        for line in console_tail(run):
            output.say(f"  {line}")
    if not watched.error_shown or state.why.startswith("ended by signal"):
        output.say(f"error: {state.state.value}: {state.why}")
    output.say(f"Everything it printed: {run.console}")
    status = read_status(run)
    known = {ExitCode.FAILED, ExitCode.MISTAKE, ExitCode.BUSY}
    code = status.exit_code if status is not None else None
    return code if code in known else ExitCode.FAILED


def output_files(run: RunDir) -> list[str]:
    """Return what people take away, the final file first, then the newest."""
    files = run.output.glob("*.safetensors") if run.output.is_dir() else ()
    found = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    final = [file for file in found if "-step" not in file.stem]
    return [str(file) for file in [*final, *(file for file in found if file not in final)]]


def newest_output_files(run: RunDir) -> list[str]:
    """Return the files of the last step that was written: the final ones, where there are some.

    Of a run that trains both experts of Wan 2.2 these are two.
    """
    files = output_files(run)

    def step(file: str) -> str:
        return Path(file).stem.partition("-step")[2]

    return [file for file in files if step(file) == step(files[0])]


def _say_done(run: RunDir, state: RunState) -> None:
    for file in newest_output_files(run):
        output.data(file)
    took = ""
    # A clock that was set back meanwhile would make it a negative time.
    if state.started is not None and state.ended is not None and state.ended >= state.started:
        took = f" after {duration(state.ended - state.started)}"
    output.say(f"Done{_at_step(state)}{took}.")
    output.say(f'Next: menma sample {run.root} --prompt "..."')


def _at_step(state: RunState) -> str:
    return f" at step {state.step}" if state.step is not None else ""


def _is_live(run: RunDir) -> bool:
    return read_state(run).state.is_live


def _show(event: Event, progress: Progress | None) -> None:
    if progress is None:
        output.json_line(event)
    else:
        progress.event(event)


@contextmanager
def counted_interrupts() -> Iterator[Callable[[], int]]:
    """Count Ctrl-C instead of raising, so that it never tears the drawing or a write."""
    count = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: count
    finally:
        signal.signal(signal.SIGINT, previous)
