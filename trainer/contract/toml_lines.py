"""Which line of a TOML text a key stands on, for messages. Standard library only."""

from __future__ import annotations

import re

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_TABLE = re.compile(rf"^\s*\[\s*({_DOTTED})\s*\]\s*(?:#.*)?$")
_ARRAY_TABLE = re.compile(rf"^\s*\[\[\s*({_DOTTED})\s*\]\]\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"^\s*({_DOTTED})\s*=(.*)$")
_PART = re.compile(_KEY)


def key_lines(text: str) -> dict[str, int]:
    """Map each key (`training.seed`, `techniques[1].name`) and table to its line, from 1.

    The text must be valid TOML; keys inside inline tables are not told apart from the table.
    """
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table = ""
    open_value = _OpenValue()
    for number, line in enumerate(text.splitlines(), start=1):
        if open_value.is_open:
            open_value.feed(line)
            continue
        if match := _ARRAY_TABLE.match(line):
            name = _resolve(_parts(match[1]), counts)
            counts[name] = counts.get(name, -1) + 1
            table = f"{name}[{counts[name]}]"
            lines[table] = number
        elif match := _TABLE.match(line):
            table = _resolve(_parts(match[1]), counts)
            lines.setdefault(table, number)
        elif match := _ASSIGNMENT.match(line):
            key = ".".join(_parts(match[1]))
            lines[f"{table}.{key}" if table else key] = number
            open_value.feed(match[2])
    return lines


def locate(key: str, lines: dict[str, int]) -> int | None:
    """Return the line of `key`, or of the closest table or key that contains it."""
    while key:
        if key in lines:
            return lines[key]
        shorter = re.sub(r"(\.[^.\[\]]*|\[\d+\])$", "", key)
        key = shorter if shorter != key else key.rpartition(".")[0]  # a pattern is no plain key
    return None


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in _PART.findall(dotted)]


def _resolve(parts: list[str], counts: dict[str, int]) -> str:
    """Return the path of a header; a parent that is an array means its latest table."""
    path = ""
    for index, part in enumerate(parts):
        path = f"{path}.{part}" if path else part
        if index < len(parts) - 1 and path in counts:
            path = f"{path}[{counts[path]}]"
    return path


class _OpenValue:
    """Follows a value over lines: brackets and triple quotes that are still open."""

    def __init__(self) -> None:
        self.depth = 0
        self.quote = ""

    @property
    def is_open(self) -> bool:
        return self.depth > 0 or len(self.quote) == 3

    def feed(self, text: str) -> None:
        position = 0
        while position < len(text):
            position = (
                self._skip_quoted(text, position) if self.quote else self._next(text, position)
            )
        if len(self.quote) == 1:  # a one-line string cannot stay open in valid TOML
            self.quote = ""

    def _skip_quoted(self, text: str, position: int) -> int:
        if self.quote[0] == '"' and text[position] == "\\":
            return position + 2
        if text.startswith(self.quote, position):
            end = position + len(self.quote)
            while len(self.quote) == 3 and text.startswith(self.quote[0], end):
                end += 1  # up to two quotes may stand directly before the closing three
            self.quote = ""
            return end
        return position + 1

    def _next(self, text: str, position: int) -> int:
        character = text[position]
        if character == "#":
            return len(text)
        if character in "\"'":
            self.quote = character * 3 if text.startswith(character * 3, position) else character
            return position + len(self.quote)
        if character in "[{":
            self.depth += 1
        elif character in "]}":
            self.depth -= 1
        return position + 1
