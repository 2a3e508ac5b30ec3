"""A config as its own text: every edit changes the characters that it is about, and no others.

The TOML text is the model. A form sets and removes keys by their spans; somebody who types changes
the text itself; both can be undone, and then the text is what it was, byte for byte.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

from app.domain.toml_edits import Change, Edits, check_value, key_of, newline_of, path_of
from app.domain.toml_spans import Span, Spans, scan
from trainer.contract.errors import UserError


class ConfigDocument:
    """TOML text that is edited by keys. The text may have mistakes.

    Args:
        text: the content of the file, as it is.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._read: Edits | None = None
        self._done: list[list[Change]] = []
        self._undone: list[list[Change]] = []
        self._group = ""

    @property
    def text(self) -> str:
        """The text as it is now."""
        return self._text

    @property
    def spans(self) -> Spans:
        """Where everything stands."""
        return self._edits.spans

    @property
    def is_toml(self) -> bool:
        """Whether the text can be read."""
        return _is_toml(self._text)

    @property
    def can_undo(self) -> bool:
        """Whether there is something to take back."""
        return bool(self._done)

    def content(self) -> dict[str, Any]:
        """Return what the text says.

        Raises:
            tomllib.TOMLDecodeError: it is not TOML.
        """
        return tomllib.loads(self._text)

    def raw(self, key: str) -> str | None:
        """Return the value of a key as it is written; None: it is not there."""
        found = self._edits.value(path_of(key))
        return found.of(self._text) if found is not None else None

    def value(self, key: str) -> Any:
        """Return the value of a key; None: it is not there, or it is not a value."""
        raw = self.raw(key)
        if raw is None:
            return None
        try:
            return tomllib.loads(f"value = {raw}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            return None

    def line_of(self, key: str) -> int | None:
        """Return the line of a key or of a table's header, from 1; None: it is not there."""
        path = path_of(key)
        value = self._edits.value(path)
        start = value.start if value is not None else None
        if start is None:
            start = next((h.lines.start for h in self.spans.headers if h.path == path), None)
        return None if start is None else self._text.count("\n", 0, start) + 1

    def lengths(self) -> dict[str, int]:
        """Return the arrays of tables and how many tables each has."""
        return {key_of(path): count for path, count in self._edits.lengths().items()}

    def set(self, key: str, raw: str) -> None:
        """Give a key a value: change the one that is there, use a `# key =` line, or add a line.

        Args:
            key: such as `training.seed` or `techniques[0].weight`.
            raw: the value as TOML.

        Raises:
            UserError: `raw` is not one value, or the key has no place in this text.
        """
        raw = raw.strip()
        check_value(raw)
        change = self._edits.setting(path_of(key), raw)
        if change.removed != change.inserted:
            self._apply_checked(change, key)

    def remove(self, key: str) -> None:
        """Remove a key with its line; nothing happens where it is not there.

        Raises:
            UserError: the text would not be TOML without it.
        """
        change = self._edits.removal(path_of(key))
        if change is not None:
            self._apply_checked(change, key)

    def edit(self, text: str, group: str = "") -> None:
        """Take a text that somebody has typed; lines that are as before keep their line ends.

        Args:
            text: the new text; its line ends may all be of one kind.
            group: what is typed within one group is undone at once.
        """
        old, new = self._text.splitlines(keepends=True), text.splitlines(keepends=True)
        if text == self._text or (
            _plain(old) == _plain(new) and _is_closed(self._text) == _is_closed(text)
        ):
            return
        first = _common(old, new)
        last = _common(old[first:][::-1], new[first:][::-1])
        middle = [_with_end(line, newline_of(self._text)) for line in new[first : len(new) - last]]
        start = sum(map(len, old[:first]))
        end = len(self._text) - sum(map(len, old[len(old) - last :]))
        self._apply(self._edits.splice(Span(start, end), "".join(middle)), group)

    def replace_all(self, text: str) -> None:
        """Take a text as it is, as one edit."""
        if text != self._text:
            self._apply(Change(0, self._text, text))

    def undo(self) -> bool:
        """Take the last edit back; return whether there was one."""
        if not self._done:
            return False
        changes = self._done.pop()
        for change in reversed(changes):
            self._put(change.start, change.inserted, change.removed)
        self._undone.append(changes)
        return True

    def redo(self) -> bool:
        """Do again what was taken back last; return whether there was something."""
        if not self._undone:
            return False
        changes = self._undone.pop()
        for change in changes:
            self._put(change.start, change.removed, change.inserted)
        self._done.append(changes)
        return True

    @property
    def _edits(self) -> Edits:
        if self._read is None:
            self._read = Edits(self._text, scan(self._text))
        return self._read

    def _apply_checked(self, change: Change, key: str) -> None:
        """Apply an edit of a key, unless it would spoil a text that was right."""
        was_right = _is_toml(self._text)
        after = _changed(self._text, change.start, change.removed, change.inserted)
        if was_right and not _is_toml(after):
            raise UserError(f"{key} cannot be changed here", hint="change it in the text")
        self._apply(change)

    def _apply(self, change: Change, group: str = "") -> None:
        self._undone.clear()
        goes_on = bool(group) and bool(self._done) and group == self._group
        self._put(change.start, change.removed, change.inserted)
        if goes_on:
            self._done[-1].append(change)
        else:
            self._done.append([change])
        self._group = group

    def _put(self, start: int, old: str, new: str) -> None:
        self._text = _changed(self._text, start, old, new)
        self._read, self._group = None, ""


def _changed(text: str, start: int, old: str, new: str) -> str:
    return text[:start] + new + text[start + len(old) :]


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        return False
    return True


def _plain(lines: Sequence[str]) -> list[str]:
    return [_with_end(line, "") for line in lines]


def _with_end(line: str, end: str) -> str:
    content = line.splitlines()[0] if line else ""
    return content + (end if len(content) < len(line) else "")


def _is_closed(text: str) -> bool:
    """Tell whether the last line has an end."""
    lines = text.splitlines(keepends=True)
    return not lines or _with_end(lines[-1], "") != lines[-1]


def _common(old: Sequence[str], new: Sequence[str]) -> int:
    """Return how many lines from the first on say the same, and end or do not end alike."""
    count = 0
    for before, after in zip(old, new, strict=False):
        if _with_end(before, "\n") != _with_end(after, "\n"):
            break
        count += 1
    return count
