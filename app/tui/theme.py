"""The app's own themes. Their colours are of the 256 that every terminal has, so that a terminal
without millions of colours shows the same."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="menma-dark",
    dark=True,
    background="#121212",
    surface="#1c1c1c",
    panel="#303030",
    foreground="#e4e4e4",
    primary="#5fafd7",
    secondary="#a8a8a8",
    accent="#ffaf00",
    success="#5fd787",
    warning="#ffd75f",
    error="#ff875f",
    variables={"muted": "#a8a8a8", "footer-key-foreground": "#ffaf00"},
)
LIGHT = Theme(
    name="menma-light",
    dark=False,
    background="#ffffff",
    surface="#ffffff",
    panel="#eeeeee",
    foreground="#1c1c1c",
    primary="#005f87",
    secondary="#585858",
    accent="#875f00",
    success="#005f00",
    warning="#875f00",
    error="#af0000",
    variables={"muted": "#585858", "footer-key-foreground": "#875f00"},
)
HIGH_CONTRAST = Theme(
    name="menma-high-contrast",
    dark=True,
    background="#000000",
    surface="#000000",
    panel="#303030",
    foreground="#ffffff",
    primary="#5fd7ff",
    secondary="#ffffff",
    accent="#ffff00",
    success="#5fff87",
    warning="#ffff5f",
    error="#ffaf87",
    variables={"muted": "#dadada", "footer-key-foreground": "#ffff00"},
)
THEMES = (DARK, LIGHT, HIGH_CONTRAST)
TERMINAL = "ansi-dark"
"""Textual's theme of the terminal's own colours."""
