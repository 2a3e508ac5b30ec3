"""`menma sample --interactive`: prompts from a terminal or a pipe, models that stay loaded."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from app.cli import output
from app.cli.exit_codes import ExitCode, of_child
from app.cli.progress import Progress, open_progress
from app.domain.state_folder import state_folder
from app.runs.child import Event
from app.runs.conversation import Conversation
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.prompts import parse_prompt_line

_INTRO = """One line, one sample: a fish in the rain --w 480 --h 272 --f 33 --d 7 --s 20
Ctrl-C stops a sample, Ctrl-D ends."""
_HISTORY = 1000
"""Lines that are remembered."""


def run_session(request: Mapping[str, Any], *, as_json: bool) -> None:
    """Make a sample of each line of stdin until it ends; the paths come on stdout.

    Args:
        request: see `contract.jobs.SampleSessionRequest`.
        as_json: write each sample as one line of JSON.
    """
    typed = sys.stdin.isatty()
    num_failed = 0
    with open_progress(show_errors=True, plain=typed) as progress:
        session = _Session(progress, as_json=as_json)
        with Conversation("sample_session", request, progress.say) as trainer:
            trainer.wait_for_answer(session.event)
            if typed and trainer.is_alive:
                output.say(_INTRO)
            lines = _lines(typed=typed)
            while trainer.is_alive and (found := next(lines, None)) is not None:
                session.place = "" if typed else f"line {found[0]}"
                values = _values(found[1], session.place)
                if values is None or not session.made(trainer, values):
                    num_failed += 1
            trainer.close(session.event)
    code = of_child(trainer.exit_code)
    if code != ExitCode.DONE:
        raise typer.Exit(code)
    if num_failed and not typed:
        output.say(f"{num_failed} line{'s' * (num_failed > 1)} made no sample")
        raise typer.Exit(ExitCode.FAILED)


class _Session:
    """Shows what the trainer says, and hands on what it made."""

    def __init__(self, progress: Progress, *, as_json: bool) -> None:
        self._progress = progress
        self._as_json = as_json
        self._num_made = 0
        self.place = ""
        """Which line is worked on; empty where it stands right above."""

    def made(self, trainer: Conversation, values: Mapping[str, Any]) -> bool:
        """Have one sample made; tell whether there is one. Ctrl-C stops it, a second one all."""
        before = self._num_made
        trainer.send({"prompt": values})
        stopped = False
        while True:
            try:
                trainer.wait_for_answer(self.event)
            except KeyboardInterrupt:
                if stopped:
                    trainer.end()
                    raise
                stopped = True
                trainer.send({"stop": True})
                self._progress.say("stopping this sample; again: end")
            else:
                return self._num_made > before

    def event(self, event: Event) -> None:
        """Show one event; a sample's path is data."""
        if event["type"] == "sample":
            self._num_made += 1
            if self._as_json:
                output.json_line(event)
            else:
                for key in ("path", "latents"):
                    if key in event:
                        output.data(str(event[key]))
        elif event["type"] == "error":
            if event.get("of_line"):  # what ends the job is on its stderr, too
                message = ": ".join(filter(None, (self.place, str(event.get("message", "")))))
                self._progress.event({**event, "message": message})
        elif event["type"] != "end":
            self._progress.event(event)


def _values(line: str, place: str) -> dict[str, Any] | None:
    """Return the fields of the prompt; None, with words, where the line is none."""
    try:
        prompt = parse_prompt_line(line)
    except ConfigError as error:
        for problem in error.problems:
            key = ": ".join(filter(None, (place, problem.key)))
            output.show_problem(Problem(problem.message, key, hint=problem.hint), mark="error: ")
        return None
    return prompt.model_dump(mode="json", exclude_none=True)


def _lines(*, typed: bool) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is neither empty nor a comment."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is the mistake of its line alone
        sys.stdin.reconfigure(errors="surrogateescape")
    for number, line in enumerate(_typed_lines() if typed else sys.stdin, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _typed_lines() -> Iterator[str]:
    history = _open_history()
    while True:
        try:
            line = input("> ")
        except EOFError:
            output.say()
            return
        except KeyboardInterrupt:
            output.say()  # as in a shell: the line is given up, not the session
            continue
        yield line
        if history is not None:
            _write_history(history)


def _open_history() -> Path | None:
    """Let the arrow keys bring earlier prompts back, where there is readline."""
    try:
        import readline
    except ImportError:
        return None
    path = state_folder() / "sample_history"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY)
    return path


def _write_history(path: Path) -> None:
    import readline

    with suppress(OSError):  # a full or read-only disk loses the history and nothing else
        readline.write_history_file(path)
