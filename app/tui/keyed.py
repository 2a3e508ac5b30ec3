"""Every binding gets a name, by which the user's file of keys speaks of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.keys import Keys, format_key

EVERYWHERE = "app"
"""Where the app's own keys work."""
LISTS = "list"
"""Where the keys of every list work."""

NAMED_KEYS = frozenset(key.value for key in Keys if "+" not in key.value and "<" not in key.value)
"""Keys that are no characters."""


class Keyed:
    """Base of screens and widgets whose keys can be changed; stands before Textual's base.

    A binding without an id gets one of the class's place and its own words: `jobs.stop`. Bindings
    that share their words are told apart by their first key: `monitor.cursor-left`.
    """

    KEYS_IN: ClassVar[str] = ""
    """Place of the keys; empty: the class's name without `Screen`."""
    keyed_classes: ClassVar[list[type[Keyed]]] = []
    """All classes that were defined so far, in their order."""

    def __init_subclass__(cls, **attributes: Any) -> None:
        own: Sequence[BindingType] | None = cls.__dict__.get("BINDINGS")
        if own is not None:
            place = cls.KEYS_IN or _slug(cls.__name__.removesuffix("Screen"))
            cls.BINDINGS = named(place, own)  # type: ignore[attr-defined]
            Keyed.keyed_classes.append(cls)
        super().__init_subclass__(**attributes)


def named(place: str, bindings: Sequence[BindingType]) -> list[BindingType]:
    """Return the bindings with ids."""
    whole = [b if isinstance(b, Binding) else Binding(*b) for b in bindings]
    actions = {(_words(binding), binding.action) for binding in whole}
    shared = Counter(words for words, _ in actions)
    result: list[BindingType] = []
    for binding in whole:
        name = _words(binding)
        if shared[name] > 1:
            name = f"{name}-{_slug(binding.key.partition(',')[0])}"
        result.append(binding if binding.id else replace(binding, id=f"{place}.{name}"))
    return result


def shown(key: str) -> str:
    """Return a key as people write it: `?` for `question_mark`."""
    *modifiers, last = key.split("+")
    words = last if last in NAMED_KEYS else format_key(last)
    return "+".join([*modifiers, words])


def key_of(app: App[Any], action: str, default: str) -> str:
    """Return the first key of an action, as the user has it.

    Args:
        app: the app; one without preferences has the default keys.
        action: its name.
        default: its default key, as it is shown.
    """
    preferences = getattr(app, "preferences", None)
    keys = preferences.keys.get(action, "") if preferences is not None else ""
    return shown(keys.partition(",")[0]) if keys else default


def _words(binding: Binding) -> str:
    return _slug(binding.description or binding.action)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
