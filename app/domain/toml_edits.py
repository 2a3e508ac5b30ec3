"""What has to change in a TOML text so that a key gets a value, or goes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain.toml_spans import (
    Entry,
    Header,
    Hidden,
    Pair,
    Path,
    Span,
    Spans,
    inline_entries,
    value_end,
)
from app.domain.toml_text import toml_key
from trainer.contract.errors import UserError

_INDEX = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Change:
    """`removed` at `start` becomes `inserted`."""

    start: int
    removed: str
    inserted: str


class Edits:
    """The changes that edit one text.

    Args:
        text: TOML, perhaps with mistakes.
        spans: where everything stands in it.
    """

    def __init__(self, text: str, spans: Spans) -> None:
        self._text, self.spans = text, spans

    def value(self, path: Path) -> Span | None:
        """Return where the value of a key stands; None: the key is not there."""
        pair = self._pair(path)
        if pair is not None:
            return pair.value
        found = self._entry(path)
        return found[1][found[2]].value if found is not None else None

    def lengths(self) -> dict[Path, int]:
        """Return the arrays of tables and how many tables each has."""
        found: dict[Path, int] = {}
        for header in self.spans.headers:
            if header.is_array:
                *above, number = header.path
                found[tuple(above)] = int(number) + 1
        return found

    def removal(self, path: Path) -> Change | None:
        """Return what takes a key away; None: it is not there."""
        pair = self._pair(path)
        if pair is not None:
            return self.splice(pair.lines, "")
        found = self._entry(path)
        return self._without_entry(*found) if found is not None else None

    def setting(self, path: Path, raw: str) -> Change:
        """Return what gives a key a value.

        Raises:
            UserError: the key has no place in this text.
        """
        value = self.value(path)
        if value is not None:
            follows = value.start == value.end and self._text[value.start - 1] == "="
            return self.splice(value, f" {raw}" if follows else raw)
        pair = next((p for p in self.spans.pairs if _is_within(path, p.path)), None)
        if pair is not None:
            return self._new_entry(pair, path, raw)
        hidden = next((one for one in self.spans.hidden if one.path == path), None)
        if hidden is not None and self._may_use(hidden):
            return self._used(hidden, raw)
        return self._new_line(path, raw)

    def _pair(self, path: Path) -> Pair | None:
        return next((pair for pair in self.spans.pairs if pair.path == path), None)

    def _entry(self, path: Path) -> tuple[Span, list[Entry], int] | None:
        """Find a key within an inline table: the table, its pairs, the place of the key."""
        for pair in self.spans.pairs:
            if _is_within(path, pair.path):
                return _entry_of(self._text, pair.value, path[len(pair.path) :])
        return None

    def _without_entry(self, table: Span, entries: list[Entry], place: int) -> Change:
        entry, following = entries[place], entries[place + 1]
        if following.keys:
            return self.splice(Span(entry.whole.start, following.whole.start), "")
        if place:  # the last of several: with the comma before it
            return self.splice(Span(entries[place - 1].whole.end, entry.whole.end), "")
        return self.splice(entry.whole, "")

    def _new_entry(self, pair: Pair, path: Path, raw: str) -> Change:
        value, rest = pair.value, path[len(pair.path) :]
        while value.of(self._text).startswith("{") and all(isinstance(k, str) for k in rest):
            entries = list(inline_entries(self._text, value.start))
            inner = next((e for e in entries if e.keys and rest[: len(e.keys)] == e.keys), None)
            if not entries or entries[-1].keys:
                break
            if inner is not None:
                value, rest = inner.value, rest[len(inner.keys) :]
                continue
            words = f"{_dotted(rest)} = {raw}"
            if len(entries) > 1:
                end = entries[-2].whole.end
                return self.splice(Span(end, end), f", {words}")
            return self.splice(Span(value.start + 1, value.end - 1), f" {words} ")
        raise UserError(
            f"{key_of(pair.path)} is written as one value, in which {key_of(path)} has no place",
            hint="change it in the text",
        )

    def _may_use(self, hidden: Hidden) -> bool:
        """Tell whether the table of a pair in a comment can hold it."""
        return not hidden.table or any(h.path == hidden.table for h in self.spans.headers)

    def _used(self, hidden: Hidden, raw: str) -> Change:
        value = f" {raw}" if hidden.value.of(self._text).strip() == "" else raw
        if self._text.startswith("#", hidden.value.end):
            value += "  "
        between = self._text[hidden.hash.end : hidden.value.start]
        return self.splice(Span(hidden.hash.start, hidden.value.end), between + value)

    def _new_line(self, path: Path, raw: str) -> Change:
        """Return the change that adds a line to the table that the key belongs to."""
        for length in range(len(path) - 1, -1, -1):
            table, keys = path[:length], path[length:]
            header = next((h for h in self.spans.headers if h.path == table), None)
            inside = [p for p in self.spans.pairs if _is_within(p.path, table)]
            dotted = [p for p in inside if p.table != table and len(p.table) < length]
            if dotted:  # the table was made by keys with dots: so is what is added to it
                last = dotted[-1]
                return self._line_after(last, f"{_dotted(path[len(last.table) :])} = {raw}")
            own = [p for p in inside if p.table == table]
            if (header is not None or not table) and len(keys) == 1:
                return self._line_in(table, header, own, f"{_dotted(keys)} = {raw}")
            if header is not None or not table:
                break
        return self._new_table(path, raw)

    def _line_in(
        self, table: Path, header: Header | None, own: Sequence[Pair], line: str
    ) -> Change:
        if own:
            return self._line_after(own[-1], line)
        if header is not None:
            return self._line_at(header.lines.end, _indent_of(self._text, header.lines) + line)
        return self._line_at(self._end_of_head(), line)

    def _end_of_head(self) -> int:
        """Return where the first key of the file is put: behind the comment that heads it."""
        head = re.match(r"(?:[ \t]*#[^\n]*\n)+(?:[ \t]*\r?\n)+", self._text)
        return head.end() if head else 0

    def _line_after(self, pair: Pair, line: str) -> Change:
        return self._line_at(pair.lines.end, _indent_of(self._text, pair.lines) + line)

    def _line_at(self, position: int, line: str) -> Change:
        newline = newline_of(self._text)
        if position and self._text[position - 1] != "\n":  # behind a last line without an end
            return self.splice(Span(position, position), newline + line)
        return self.splice(Span(position, position), line + newline)

    def _new_table(self, path: Path, raw: str) -> Change:
        *above, key = path
        number = above[-1] if above and isinstance(above[-1], int) else None
        names = above[:-1] if number is not None else above
        known = self.lengths().get(tuple(names), 0)
        if not isinstance(key, str) or number not in {None, known}:
            raise UserError(f"{key_of(path)} has no place in this text", hint="write it there")
        outer = [part for part in names if isinstance(part, int)]
        if outer:
            raise UserError(
                f"{key_of(path)} belongs to a table that is not there", hint="write it in the text"
            )
        newline = newline_of(self._text)
        header = _dotted(tuple(names))
        header = f"[[{header}]]" if number is not None else f"[{header}]"
        gap = "" if not self._text or self._text.endswith(newline * 2) else newline
        if self._text and not self._text.endswith("\n"):
            gap = newline * 2
        end = len(self._text)
        lines = f"{gap}{header}{newline}{_dotted((key,))} = {raw}{newline}"
        return self.splice(Span(end, end), lines)

    def _newline(self) -> str:
        return "\r\n" if self._text.count("\r\n") * 2 > self._text.count("\n") else "\n"

    def splice(self, span: Span, inserted: str) -> Change:
        """Return what puts other characters at a place."""
        return Change(span.start, span.of(self._text), inserted)


def path_of(key: str) -> Path:
    """Return the path of a key such as `techniques[0].weight`."""
    path: list[str | int] = []
    for part in key.split("."):
        path.append(_INDEX.sub("", part))
        path += [int(number) for number in _INDEX.findall(part)]
    return tuple(path)


def key_of(path: Path) -> str:
    """Return a path as it is said: `techniques[0].weight`."""
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f".{part}" if words else part
    return words


def check_value(raw: str) -> None:
    """Refuse what is not one TOML value.

    Raises:
        UserError: it is not.
    """
    try:
        tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError as error:
        why = re.sub(r" \(at .*\)$", "", str(error))
        raise UserError(f"not a TOML value: {why[:1].lower()}{why[1:]}") from error
    except RecursionError:
        raise UserError("not a TOML value: too many brackets in one another") from None
    if value_end(raw, 0) != len(raw):
        raise UserError("not a TOML value: there is something behind it")


def newline_of(text: str) -> str:
    """Return the line end that most lines of a text have."""
    return "\r\n" if text.count("\r\n") * 2 > text.count("\n") else "\n"


def _is_within(path: Path, above: Path) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _entry_of(text: str, table: Span, rest: Path) -> tuple[Span, list[Entry], int] | None:
    if not text.startswith("{", table.start):
        return None
    entries = list(inline_entries(text, table.start))
    if not entries or entries[-1].keys:
        return None
    for place, entry in enumerate(entries[:-1]):
        if entry.keys == rest:
            return table, entries, place
        if _is_within(rest, entry.keys):
            return _entry_of(text, entry.value, rest[len(entry.keys) :])
    return None


def _dotted(keys: Sequence[str | int]) -> str:
    return ".".join(toml_key(str(key)) for key in keys)


def _indent_of(text: str, lines: Span) -> str:
    match = re.match(r"[ \t]*", lines.of(text))
    return match[0] if match else ""
