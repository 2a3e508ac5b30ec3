"""Where the keys, values, tables and comments of a TOML text stand. Standard library only.

It reads line by line and goes on behind a line that it does not understand, so that a text with
mistakes can be edited all the same. What TOML forbids but can be read (a key twice) is not its
business: `tomllib` judges.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Keys from the top of the file; a number is the place in an array of tables."""

_BLANK = re.compile(r"[ \t]*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\r\n]|\\[^\r\n])*"|'[^'\r\n]*'""")
_BARE = re.compile(r"[A-Za-z0-9_+\-.:]+(?: \d\d:\d\d[0-9:.+\-Zz]*)?")
_LINE_REST = re.compile(r"[ \t]*(#[^\r\n]*)?(?=\r?\n|\Z)")
_SPACE_OF_ARRAY = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_BASIC = re.compile(r'"(?:[^"\\\r\n]|\\[^\r\n])*"')
_LITERAL = re.compile(r"'[^'\r\n]*'")
_BASIC_LINES = re.compile(r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}', re.DOTALL)
_LITERAL_LINES = re.compile(r"'''(?:[^']|'(?!''))*'{3,5}", re.DOTALL)
_HIDDEN = re.compile(r"#[ \t]?(?=\S)")
MAX_DEPTH = 60
"""Brackets in brackets that are followed; what is deeper counts as a mistake."""


@dataclass(frozen=True, slots=True)
class Span:
    """From `start` to before `end`, in characters."""

    start: int
    end: int

    def of(self, text: str) -> str:
        """Return what stands there."""
        return text[self.start : self.end]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`key = value` on lines of its own."""

    path: Path
    table: Path
    """Of the header that it stands under."""
    key: Span
    value: Span
    lines: Span
    """Its lines with their ends, and with the comment behind the value."""
    broken: bool = False
    """What stands behind the `=` is not a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """`[table]` or `[[table]]`."""

    path: Path
    lines: Span
    is_array: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """`# key = value`: a pair in a comment, which waits to be used."""

    path: Path
    table: Path
    hash: Span
    """The `#` and the blank behind it."""
    value: Span
    lines: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`key = value` within an inline table."""

    keys: tuple[str, ...]
    value: Span
    whole: Span


@dataclass(frozen=True, slots=True)
class Spans:
    """Everything in a text, in its order."""

    pairs: tuple[Pair, ...]
    headers: tuple[Header, ...]
    hidden: tuple[Hidden, ...]
    broken: tuple[int, ...] = ()
    """Numbers of the lines, from 1, that were not understood."""


def scan(text: str) -> Spans:
    """Find the spans of a text."""
    return _Scanner(text).run()


def key_at(text: str, position: int) -> tuple[tuple[str, ...], int] | None:
    """Read a key, dotted or not; return its parts and where it ends."""
    parts: list[str] = []
    while True:
        match = _KEY.match(text, position)
        part = _plain_key(match[0]) if match else None
        if match is None or part is None:
            return None
        parts.append(part)
        position = match.end()
        dot = _blank(text, position)
        if not text.startswith(".", dot):
            return tuple(parts), position
        position = _blank(text, dot + 1)


def value_end(text: str, position: int, depth: int = 0) -> int | None:
    """Return where the value that begins at `position` ends; None: there is none."""
    if depth > MAX_DEPTH:
        return None
    for opening, pattern in (
        ('"""', _BASIC_LINES),
        ("'''", _LITERAL_LINES),
        ('"', _BASIC),
        ("'", _LITERAL),
    ):
        if text.startswith(opening, position):
            match = pattern.match(text, position)
            return match.end() if match else None
    if text.startswith("[", position):
        return _array_end(text, position, depth)
    if text.startswith("{", position):
        entries = list(inline_entries(text, position, depth))
        return entries[-1].whole.end if entries and not entries[-1].keys else None
    match = _BARE.match(text, position)
    return match.end() if match else None


def inline_entries(text: str, start: int, depth: int = 0) -> Iterator[Entry]:
    """Yield the pairs of the inline table that opens at `start`.

    The last one has no keys: it is the closing bracket. It is missing where the table is broken.
    """
    position = _blank(text, start + 1)
    if text.startswith("}", position):
        yield _closing(position)
        return
    while True:
        key = key_at(text, position)
        if key is None:
            return
        sign = _blank(text, key[1])
        if not text.startswith("=", sign):
            return
        begin = _blank(text, sign + 1)
        end = value_end(text, begin, depth + 1)
        if end is None:
            return
        yield Entry(keys=key[0], value=Span(begin, end), whole=Span(position, end))
        position = _blank(text, end)
        if text.startswith("}", position):
            yield _closing(position)
            return
        if not text.startswith(",", position):
            return
        position = _blank(text, position + 1)


def _closing(position: int) -> Entry:
    end = position + 1
    return Entry(keys=(), value=Span(position, end), whole=Span(position, end))


def _array_end(text: str, start: int, depth: int) -> int | None:
    position = start + 1
    while True:
        position = _space_end(text, position)
        if text.startswith("]", position):
            return position + 1
        end = value_end(text, position, depth + 1)
        if end is None:
            return None
        position = _space_end(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            return None


class _Scanner:
    """Goes through a text once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.table: Path = ()
        self.hidden_table = False
        """A header in a comment stands above: `# key =` lines below it are not of our table."""
        self.counts: dict[Path, int] = {}
        self.pairs: list[Pair] = []
        self.headers: list[Header] = []
        self.hidden: list[Hidden] = []
        self.broken: list[int] = []

    def run(self) -> Spans:
        position, size = 0, len(self.text)
        while position < size:
            position = self._line(position)
        return Spans(tuple(self.pairs), tuple(self.headers), tuple(self.hidden), tuple(self.broken))

    def _line(self, start: int) -> int:
        """Read what begins on the line at `start`; return the start of the line behind it."""
        text, position = self.text, _blank(self.text, start)
        end: int | None
        if text.startswith("#", position):
            end = self._comment(start, position)
        elif text.startswith("[", position):
            end = self._header(start, position)
        elif text.startswith(("\n", "\r\n"), position) or position == len(text):
            end = position
        else:
            end = self._pair(start, position)
        if end is None:
            self.broken.append(text.count("\n", 0, start) + 1)
            end = _line_end(text, position)
        return _next_line(text, end)

    def _header(self, start: int, position: int) -> int | None:
        text, is_array = self.text, self.text.startswith("[[", position)
        width = 2 if is_array else 1
        key = key_at(text, _blank(text, position + width))
        if key is None:
            return None
        close = _blank(text, key[1])
        rest = _LINE_REST.match(text, close + width)
        if not text.startswith("]" * width, close) or rest is None:
            return None
        path = self._resolved(key[0])
        if is_array:
            self.counts[path] = self.counts.get(path, -1) + 1
            path = (*path, self.counts[path])
        self.table, self.hidden_table = path, False
        lines = Span(start, _next_line(text, rest.end()))
        self.headers.append(Header(path=path, lines=lines, is_array=is_array))
        return rest.end()

    def _resolved(self, keys: tuple[str, ...]) -> Path:
        """Return the path of a header; a parent that is an array means its latest table."""
        path: Path = ()
        for place, key in enumerate(keys):
            path = (*path, key)
            if place < len(keys) - 1 and path in self.counts:
                path = (*path, self.counts[path])
        return path

    def _pair(self, start: int, position: int) -> int | None:
        text = self.text
        key = key_at(text, position)
        sign = _blank(text, key[1]) if key else position
        if key is None or not text.startswith("=", sign):
            return None
        begin = _blank(text, sign + 1)
        end = value_end(text, begin)
        rest = _LINE_REST.match(text, end) if end is not None else None
        broken = end is None or rest is None
        if end is None or rest is None:
            self.broken.append(text.count("\n", 0, start) + 1)
            end, stop = self._broken_end(begin)
        else:
            stop = rest.end()
        self.hidden_table = False
        self.pairs.append(
            Pair(
                path=(*self.table, *key[0]),
                table=self.table,
                key=Span(position, key[1]),
                value=Span(begin, end),
                lines=Span(start, _next_line(text, stop)),
                broken=broken,
            )
        )
        return stop

    def _broken_end(self, begin: int) -> tuple[int, int]:
        """Return where something that is no value ends, and its line."""
        stop = _line_end(self.text, begin)
        words = self.text[begin:stop]
        if words.startswith("#"):
            return begin, stop
        comment = -1 if words[:1] in {'"', "'"} else words.find(" #")
        return begin + len((words if comment < 0 else words[:comment]).rstrip()), stop

    def _comment(self, start: int, position: int) -> int:
        """Note a pair that waits in a comment."""
        text, end = self.text, _line_end(self.text, position)
        mark = _HIDDEN.match(text, position)
        if mark is None:
            return end
        if re.match(r"\[\[?[^\[\]#=]+\]\]?[ \t]*$", text[mark.end() : end]):
            self.hidden_table = True
            return end
        key = key_at(text, mark.end())
        sign = _blank(text, key[1]) if key else end
        if key is None or self.hidden_table or not text.startswith("=", sign) or sign >= end:
            return end
        begin = _blank(text, sign + 1)
        found = begin if _LINE_REST.match(text, begin) else value_end(text, begin)
        if found is None or found > end or _LINE_REST.match(text, found) is None:
            return end
        self.hidden.append(
            Hidden(
                path=(*self.table, *key[0]),
                table=self.table,
                hash=Span(position, mark.end()),
                value=Span(begin if found > begin else sign + 1, found),
                lines=Span(start, _next_line(text, end)),
            )
        )
        return end


def _plain_key(raw: str) -> str | None:
    """Return what a key says without its quotes; None: its escapes are wrong."""
    if raw[0] not in "\"'":
        return raw
    try:
        return next(iter(tomllib.loads(f"{raw} = 0")))
    except tomllib.TOMLDecodeError:
        return None


def _blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _space_end(text: str, position: int) -> int:
    match = _SPACE_OF_ARRAY.match(text, position)
    return match.end() if match else position


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    if end < 0:
        return len(text)
    return end - 1 if end > position and text[end - 1] == "\r" else end


def _next_line(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end + 1
