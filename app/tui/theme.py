"""The app's own themes. Their colours are of the 256 that every terminal has, so that a terminal
without millions of colours shows the same."""

from __future__ import annotations

from textual.theme import Theme

from app.domain.app_settings import COLOURS, AppSettings, OwnTheme, contrast, pale_words
from trainer.contract.registry import nearest

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
_BASES = {"dark": DARK, "light": LIGHT, "high-contrast": HIGH_CONTRAST}


def own_theme(own: OwnTheme) -> Theme:
    """Return the user's theme as Textual takes it."""
    colours = theme_colours(_BASES[own.base]) | own.colours
    ground, muted = colours["background"], colours.pop("muted")
    return Theme(
        name=own.name,
        dark=contrast(ground, "#ffffff") > contrast(ground, "#000000"),
        secondary=muted,
        variables={"muted": muted, "footer-key-foreground": colours["accent"]},
        **colours,  # type: ignore[arg-type]  # all of these are texts
    )


def theme_colours(theme: Theme) -> dict[str, str]:
    """Return the colours of one of our themes by name."""
    colours = {name: getattr(theme, name) for name in COLOURS if name != "muted"}
    return colours | {"muted": theme.variables["muted"]}


def themes_of(settings: AppSettings) -> tuple[list[Theme], list[str]]:
    """Return our themes and the user's, and what is wrong with those."""
    themes, problems = list(THEMES), []
    for own in settings.themes:
        if own.name in {TERMINAL, *(theme.name for theme in themes)}:
            problems.append(f"themes.{own.name}: there is a theme of this name already")
            continue
        theme = own_theme(own)
        problems += [f"themes.{own.name}: {words}" for words in pale_words(theme_colours(theme))]
        themes.append(theme)
    names = [theme.name for theme in themes] + [TERMINAL]
    if settings.theme and settings.theme not in names:
        hint = nearest(settings.theme, names)
        problems.append(f"theme: there is no {settings.theme!r}: {hint}")
    return themes, problems
