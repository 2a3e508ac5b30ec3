"""Screens of the app as text, read from the picture that Textual exports."""

from __future__ import annotations

import html
import re
from collections import defaultdict

from textual.app import App

_TEXT = re.compile(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', re.DOTALL)


def screen_text(app: App) -> str:
    """Return the characters on the screen, line by line."""
    picture = app.export_screenshot(simplify=False)
    cell = 12.2
    lines: dict[float, list[tuple[float, str]]] = defaultdict(list)
    for x, y, text in _TEXT.findall(picture):
        lines[float(y)].append((float(x), html.unescape(text).replace("\xa0", " ")))
    drawn = []
    for y in sorted(lines):
        line = ""
        for x, text in sorted(lines[y]):
            line = line.ljust(round(x / cell)) + text
        drawn.append(line.rstrip())
    return "\n".join(drawn)
