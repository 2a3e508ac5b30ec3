"""The parts of a TOML text, line by line, for colours."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator

from app.domain.toml_spans import Span, Spans

Parts = dict[int, list[tuple[int, int, str]]]
"""Line from 0 -> (first column, column behind the last, `header`, `key`, `text`, `comment`)."""


def toml_parts(text: str, spans: Spans) -> Parts:
    """Return what is to be coloured on which line."""
    lines = text.splitlines(keepends=True)
    starts, position = [], 0
    for line in lines:
        starts.append(position)
        position += len(line)
    found: Parts = defaultdict(list)
    for span, name in _spans(text, spans):
        first = bisect_right(starts, span.start) - 1
        last = bisect_right(starts, max(span.end - 1, span.start)) - 1
        for number in range(max(first, 0), last + 1):
            begin = max(span.start - starts[number], 0)
            end = min(span.end - starts[number], len(lines[number].rstrip("\r\n")))
            if begin < end:
                found[number].append((begin, end, name))
    for number, line in enumerate(lines):
        words = line.strip()
        if number not in found and words.startswith("#"):
            begin = line.index("#")
            found[number].append((begin, begin + len(words), "comment"))
    return found


def _spans(text: str, spans: Spans) -> Iterator[tuple[Span, str]]:
    for header in spans.headers:
        yield header.lines, "header"
        yield from _comment(text, Span(header.lines.start, header.lines.end))
    for pair in spans.pairs:
        yield pair.key, "key"
        if text[pair.value.start : pair.value.start + 1] in {'"', "'"}:
            yield pair.value, "text"
        yield from _comment(text, Span(pair.value.end, pair.lines.end))


def _comment(text: str, span: Span) -> Iterator[tuple[Span, str]]:
    place = span.of(text).find("#")
    if place >= 0:
        yield Span(span.start + place, span.end), "comment"
