"""The HTML page of a sheet: one file beside the samples, opened from the disk, without a network.

Every text is escaped, and the page's policy allows its own script and nothing else: what a prompt
says is shown and never run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from trainer.sampling.page_parts import SCRIPT, STYLE

VIDEO_SUFFIXES = (".mp4", ".webm")
"""What browsers play; other files are shown as pictures."""


@dataclass(frozen=True, slots=True)
class PageCell:
    """One sample, or why there is none."""

    place: tuple[int, ...]
    """Index on each axis."""
    file: str = ""
    """Path from the page's folder, with `/`; empty: there is none."""
    failure: str = ""
    """Why there is none; empty: it is not made yet."""
    details: str = ""
    """Lines that are shown with the enlarged sample."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the page shows."""

    title: str
    fixed: Sequence[tuple[str, str]]
    """What is the same in all cells: names and values."""
    axes: Sequence[tuple[str, Sequence[str]]]
    """Key and labels of each axis."""
    row_axes: Sequence[int]
    columns: int
    """Axis from left to right."""
    rows: Sequence[Sequence[PageCell]]


def page_html(page: Page) -> str:
    """Return the page as one text."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src 'self' file:; media-src 'self' file:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    body = "\n".join(_body(page))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _body(page: Page) -> Iterator[str]:
    fixed = " · ".join(f"{escape(name)} <b>{escape(value)}</b>" for name, value in page.fixed)
    yield f'<header><h1>{escape(page.title)}</h1><p class="note">{fixed}</p></header>'
    yield f'<div class="bar">{"".join(_controls(page))}<span class="count" id="count"></span></div>'
    yield "<main><table>"
    yield f"<thead><tr>{''.join(_head(page))}</tr></thead>"
    yield "<tbody>"
    yield from (_row(page, cells) for cells in page.rows)
    yield "</tbody></table></main>"
    yield '<dialog aria-label="sample"></dialog>'


def _controls(page: Page) -> Iterator[str]:
    if any(cell.file.endswith(VIDEO_SUFFIXES) for row in page.rows for cell in row):
        yield '<button id="play" type="button">Play</button>'
        yield '<button id="restart" type="button">From the start</button>'
        yield '<label>time <input id="time" type="range" min="0" max="1000" value="0"></label>'
        speeds = "".join(
            f'<option value="{value}"{" selected" if value == "1" else ""}>{value}×</option>'
            for value in ("0.25", "0.5", "1", "2")
        )
        yield f'<label>speed <select id="speed">{speeds}</select></label>'
    yield '<label>size <input id="size" type="range" min="80" max="800" value="220"></label>'
    for index, (key, labels) in enumerate(page.axes):
        if len(labels) > 1:
            options = "".join(
                f'<option value="{number}">{escape(label)}</option>'
                for number, label in enumerate(labels)
            )
            yield (
                f'<label>{escape(key)} <select data-axis="{index}">'
                f'<option value="">all</option>{options}</select></label>'
            )


def _head(page: Page) -> Iterator[str]:
    if page.row_axes:
        names = " · ".join(page.axes[axis][0] for axis in page.row_axes)
        yield f"<th><small>{escape(names)}</small></th>"
    key, labels = page.axes[page.columns]
    for number, label in enumerate(labels):
        yield (
            f'<th scope="col" data-place="{page.columns}:{number}"><small>{escape(key)}</small>'
            f"{escape(label)}</th>"
        )


def _row(page: Page, cells: Sequence[PageCell]) -> str:
    place = cells[0].place
    parts = [_cell(page, cell) for cell in cells]
    if page.row_axes:
        names = "".join(
            f"<div><small>{escape(page.axes[axis][0])}</small>"
            f"{escape(page.axes[axis][1][place[axis]])}</div>"
            for axis in page.row_axes
        )
        parts.insert(0, f'<th scope="row">{names}</th>')
    where = " ".join(f"{axis}:{place[axis]}" for axis in page.row_axes)
    attribute = f' data-place="{where}"' if where else ""
    return f"<tr{attribute}>{''.join(parts)}</tr>"


def _cell(page: Page, cell: PageCell) -> str:
    where = f"{page.columns}:{cell.place[page.columns]}"
    return f'<td data-place="{where}">{_content(cell)}</td>'


def _content(cell: PageCell) -> str:
    if not cell.file:
        if cell.failure:
            return f'<div class="hole failed"><b>failed</b>{escape(cell.failure)}</div>'
        return '<div class="hole">not made yet</div>'
    details = escape(cell.details, quote=True)
    source = escape(quote(cell.file), quote=True)
    if cell.file.endswith(VIDEO_SUFFIXES):
        media = f'<video src="{source}" muted loop playsinline preload="metadata"></video>'
    else:
        media = f'<img src="{source}" alt="" loading="lazy">'
    return f'<figure tabindex="0" title="{details}" data-details="{details}">{media}</figure>'
