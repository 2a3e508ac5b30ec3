"""Rows of the Data screen's tables, and the words about one clip."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import DataTable

from app.domain.data_report import ClipRow, DataReport
from app.render.data_report import BUCKETS, SOURCES, bucket_rows, source_rows

CLIPS = ("STATE", "NAME", "FRAMES", "SIZE", "FPS", "SEC", "BUCKET", "CAPTION, PROBLEM")
MAX_NAME = 24
_STYLES = {"left out": "bold", "warning": "bold"}


def fill(table: DataTable[Text], headers: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    """Fill a table anew.

    Widths are given: a table that measures its cells does so after they may have been drawn once,
    and then keeps what it has drawn.
    """
    table.clear(columns=True)
    for column, head in enumerate(headers):
        width = max([len(head), *(row[column].cell_len for row in rows)])
        table.add_column(head, width=width)
    table.add_rows(rows)


def clip_cells(row: ClipRow) -> Sequence[Text]:
    """Return the cells of a clip; what is wrong with it stands where its figures would."""
    size = f"{row.width}x{row.height}" if row.width else ""
    more = f" +{len(row.buckets) - 1}" if len(row.buckets) > 1 else ""
    figures = (
        _right("" if row.num_frames is None else f"{row.num_frames:,}"),
        _right(size),
        _right("" if row.fps is None else f"{row.fps:.4g}"),
        _right("" if row.duration_s is None else f"{row.duration_s:.1f}"),
        Text((row.buckets[0] + more) if row.buckets else ""),
        Text("; ".join(filter(None, (caption_state(row), row.words)))),
    )
    return (Text(row.state, style=_STYLES.get(row.state, "")), Text(_cut(row.name)), *figures)


def caption_state(row: ClipRow) -> str:
    """Say how long a caption is; empty: there is none, or nobody has looked."""
    if row.caption is None:
        return ""
    if row.caption_tokens is not None:
        return _count(row.caption_tokens, "token")
    return _count(len(row.caption.split()), "word")


def table_of(report: DataReport, name: str) -> tuple[Sequence[str], list[Sequence[Text]]]:
    """Return headers and rows of the table of buckets or of sources."""
    headers = BUCKETS if name == "buckets" else SOURCES
    rows = bucket_rows(report.raw) if name == "buckets" else source_rows(report.raw)
    left = {"BUCKET", "SOURCE", "CACHE", "FOLDER"}
    return headers, [
        [
            Text(cell) if head in left else _right(cell)
            for head, cell in zip(headers, row, strict=True)
        ]
        for row in rows
    ]


def details(row: ClipRow) -> Text:
    """Say all about a clip: what is wrong, what to do, its caption."""
    text = Text(str(row.path), style="bold")
    text.append("\n")
    if row.problem:
        text.append(f"left out: {row.problem}\n", style="bold")
    if row.hint:
        text.append(f"  {row.hint}\n", style="not bold")
    for warning in row.warnings:
        text.append(f"warning: {warning}\n", style="not bold")
    if row.edited:
        text.append("edited: r looks again\n", style="not bold")
    if row.validation:
        text.append("for validation, not trained on\n", style="not bold")
    if len(row.buckets) > 1:
        text.append(f"buckets {', '.join(row.buckets)}\n", style="not bold")
    text.append(row.caption or "no caption", style="not bold")
    return text


def _right(words: str) -> Text:
    return Text(words, justify="right")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
