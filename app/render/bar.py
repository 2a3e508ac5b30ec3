"""A share as a bar of characters, which needs no colour."""

from __future__ import annotations

BAR = 24


def bar(share: float, width: int = BAR) -> str:
    """Return `####....`, filled by a share from 0 to 1; more than that fills it, too."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "#" * filled + "." * (width - filled)
