"""Lengths of time as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return two units at most: `45s`, `12m30s`, `2h11m`, `3d4h`."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{left:02d}s"
    return f"{left}s"
