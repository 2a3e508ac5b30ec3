"""Run the app so that whatever happens, the terminal can be used afterwards."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.console import Console
from textual.drivers._writer_thread import WriterThread

from app.domain.state_folder import state_folder
from app.tui.shell import Shell, ending_signals
from trainer.contract.errors import RunError
from trainer.contract.files import write_text

LEAVE = (
    "\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?2004l\x1b[<u"
)
"""Main screen, cursor, no mouse, no bracketed paste, plain keys (xterm's and kitty's sequences)."""


def run(app: Shell) -> None:
    """Run the app until it is left.

    Raises:
        RunError: it ended by a mistake of its own; the message says where the details are.
        SystemExit: a signal has ended it.
    """
    app.error_console = Console(file=io.StringIO())  # Textual's account, with all local variables
    app.owns_process = True
    _trust_the_terminal()
    with _terminal_kept(), _signals_raise(), lost_output_dropped():
        try:
            app.run()
        except Exception as error:  # noqa: BLE001  (told below, with the place of its details)
            app.crash = app.crash or error
    if app.ended_by is not None:
        raise SystemExit(128 + app.ended_by)
    if app.crash is not None:
        raise RunError(f"the app has crashed. {_log(app.crash)} Runs and jobs go on.")


def _trust_the_terminal() -> None:
    """Ask the terminal itself for its size from now on.

    Programs that use readline leave COLUMNS and LINES to what they start; with these Textual sees
    neither the window that there is nor that it changes.
    """
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)


def crash_log() -> Path:
    """Return where the details of the last crash are."""
    return state_folder() / "crash.log"


def _log(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        write_text(crash_log(), f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}")
    except (RunError, OSError) as failure:
        sys.stderr.write(text)
        return f"The details are above; they could not be kept: {failure}."
    return f"Details: {crash_log()}."


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Leave in order by a signal that comes before the app itself listens, or after."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lost_output_dropped() -> Iterator[None]:
    """Go on where the terminal is gone and takes no more output.

    Textual's thread that writes dies of it. Whoever writes would soon wait for ever for room in its
    queue, and the signal that says to leave would wait with it.
    """
    before = threading.excepthook

    def drop(died: threading.ExceptHookArgs) -> None:
        if not isinstance(died.thread, WriterThread) or not isinstance(died.exc_value, OSError):
            before(died)
            return
        while died.thread._queue.get() is not None:  # until it is told to stop
            pass

    threading.excepthook = drop
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _terminal_kept() -> Iterator[None]:
    """Put the terminal's modes back as they were found; Textual's own way may have been cut off."""
    try:
        import termios

        modes = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError):  # Windows, or no terminal
        yield
        return
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
        if sys.stdout.isatty():
            with suppress(OSError):
                sys.stdout.write(LEAVE)
                sys.stdout.flush()
