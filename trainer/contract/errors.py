"""Errors a user can mend. Everything else is a bug and keeps its traceback.

UserError            exit code 2: the user's input is wrong
├── ConfigError      a config file or an option
├── DataError        clips, captions, caches
└── ModelFileError   weights: missing, truncated, of another variant, unsafe
RunError             exit code 1: the machine or the run failed, not the input
├── DiskError        disk full, read-only, vanished
├── OutOfMemoryError memory of the GPU or of the host
└── NonFiniteError   NaN or inf in the loss
BusyError            exit code 3: another process holds the run
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class MenmaError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UserError(MenmaError):
    """A mistake in the user's input; `hint` says what to change."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a config: what, where, and what to do about it."""

    message: str
    key: str = ""
    file: Path | None = None
    line: int | None = None
    hint: str = ""

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        parts = [part for part in (where, self.key, self.message) if part]
        return ": ".join(parts) + (f" ({self.hint})" if self.hint else "")


class ConfigError(UserError):
    """One or more problems of a config, all of them at once in `problems`."""

    def __init__(
        self, message: str = "", *, hint: str = "", problems: Iterable[Problem] = ()
    ) -> None:
        self.problems = tuple(problems) or (Problem(message, hint=hint),)
        if not message:
            message = "\n".join(str(problem) for problem in self.problems)
        super().__init__(message, hint=hint)


class DataError(UserError):
    """Clips, captions or caches cannot be used."""


class ModelFileError(UserError):
    """A weight file is missing, truncated, unsafe, or of another kind than asked for."""


class RunError(MenmaError):
    """The run failed though the input was right."""


class DiskError(RunError):
    """A file could not be written; earlier files are intact."""


class OutOfMemoryError(RunError):
    """The GPU or the host ran out of memory; `hint` names the settings to change."""


class NonFiniteError(RunError):
    """The loss became NaN or infinite; the weights were not touched."""


class BusyError(MenmaError):
    """Another process holds the run or the file."""

    exit_code = 3
