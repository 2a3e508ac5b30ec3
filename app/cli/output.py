"""The only place that prints: data on stdout for scripts, words on stderr for people."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from app.runs.printable import printable
from trainer.contract.errors import ConfigError, MenmaError, Problem

_RED, _YELLOW, _BOLD, _RESET = "\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"


def data(text: str = "") -> None:
    """Write a line of data to stdout."""
    _write(sys.stdout, text)


def json_data(value: Any) -> None:
    """Write one JSON document to stdout."""
    data(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def json_line(value: Any) -> None:
    """Write one JSON object on one line to stdout."""
    data(json.dumps(value, ensure_ascii=False, default=str))


def say(text: str = "", *, whole: bool = False) -> None:
    """Write a line of words to stderr; on a terminal it breaks between words.

    Args:
        text: the line.
        whole: leave breaking it to the terminal, as for commands, which people copy.
    """
    _write(sys.stderr, _wrapped(text) if is_terminal() and not whole else text)


def title(text: str) -> None:
    """Write a heading to stderr."""
    say(_coloured(text, _BOLD))


def warn(text: str, *, hint: str = "") -> None:
    """Write a warning to stderr."""
    say(f"{_coloured('warning:', _YELLOW)} {printable(text)}")
    _say_hint(hint)


def show_error(error: MenmaError) -> None:
    """Write what is wrong, where, and what to do, to stderr; every problem of a config at once."""
    mark = _coloured("error:", _RED)
    problems = error.problems if isinstance(error, ConfigError) else ()
    if len(problems) > 1:
        say(f"{mark} {len(problems)} problems")
        for problem in problems:
            show_problem(problem)
        return
    only = problems[0] if problems else None
    if only is not None and (only.key or only.file):
        show_problem(only, mark=f"{mark} ")
        return
    say(f"{mark} {printable(error.message)}")
    _say_hint(error.hint)


def show_problem(problem: Problem, *, mark: str = "  ") -> None:
    """Write one problem to stderr, its hint on a line of its own."""
    place = ":".join(str(part) for part in (problem.file, problem.line) if part is not None)
    words = ": ".join(part for part in (place, problem.key, problem.message) if part)
    say(mark + printable(words))  # a file that is wrong is quoted
    _say_hint(problem.hint, indent=4 if mark == "  " else 2)


def is_terminal() -> bool:
    """Tell whether words go to a terminal that can redraw."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in {"dumb", ""}


def has_screen() -> bool:
    """Tell whether there is a terminal that the full-screen app can draw on."""
    dumb = os.environ.get("TERM", "") in {"dumb", ""}
    return sys.stdin.isatty() and sys.stdout.isatty() and not dumb


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> str:
    """Lay out a table for the width of the terminal; the last column gives way.

    Args:
        headers: one word a column.
        rows: as many cells each.
        right: headers of the columns that align right.
    """
    cells = [list(headers), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    room = width() - sum(widths[:-1]) - 2 * (len(widths) - 1)
    widths[-1] = min(widths[-1], max(room, 8))
    aligned = set(right.split())
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if header in aligned else cell.ljust(width)
            for header, cell, width in zip(headers, row, widths, strict=True)
        ]
        parts[-1] = _cut(parts[-1].rstrip(), widths[-1])
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    # A pipe has no width: what a script reads is never cut.
    if len(text) <= width or not sys.stdout.isatty():
        return text
    return text[: width - 1] + "…"


def _wrapped(text: str) -> str:
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line.strip(),
            width(),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def width() -> int:
    """Return the characters of a line."""
    return shutil.get_terminal_size((80, 24)).columns


def _say_hint(hint: str, *, indent: int = 2) -> None:
    for line in hint.splitlines():
        say(" " * indent + printable(line))


def _coloured(text: str, colour: str) -> str:
    if not is_terminal() or os.environ.get("NO_COLOR"):
        return text
    return f"{colour}{text}{_RESET}"


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    # A terminal of another encoding shows "?" instead of ending the command with an error.
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()
