"""Text from files as it can be written to a terminal."""

from __future__ import annotations

import re

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
"""Control sequences of terminals: colours, movements of the cursor, titles."""


def printable(text: str) -> str:
    """Return text without what would steer the terminal; lines and tabs stay.

    Of a line that was overwritten, as progress bars do, the last version is left.
    """
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    kept = "\n".join(lines)
    if kept.isprintable():
        return kept
    return "".join(letter for letter in kept if letter.isprintable() or letter in "\n\t")
