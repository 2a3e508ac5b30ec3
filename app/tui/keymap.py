"""Which key does what: the actions of all screens, and what the user's file makes of them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from textual.binding import Binding
from textual.keys import KEY_TO_UNICODE_NAME
from textual.screen import ModalScreen

from app.tui.keyed import EVERYWHERE, LISTS, NAMED_KEYS, Keyed, shown
from trainer.contract.registry import nearest

QUIT = "quit"
"""The action that always has a key."""
MODIFIERS = ("ctrl", "shift", "alt", "super", "hyper", "meta")
SAME_KEY = {"ctrl+m": "enter", "ctrl+i": "tab", "ctrl+h": "backspace", "ctrl+j": "enter"}
"""Keys that most terminals cannot tell from another one."""
PRESETS: dict[str, dict[str, str]] = {
    "default": {},
    "vim": {
        "list.page-down": "ctrl+d,ctrl+f",
        "list.page-up": "ctrl+u,ctrl+b",
        "jobs.open": "enter,l",
        "jobs.log": "o",
        "library.look-into-it": "enter,l",
        "monitor.cursor-left": "left,h",
        "monitor.cursor-right": "right,l",
        "monitor.log": "o",
        "monitor.jobs": "escape,backspace",
    },
}
"""Name -> action -> keys, where they differ from the default ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something that a key does."""

    id: str
    place: str
    """Screen, window, or `app` for everywhere."""
    title: str
    help: str
    keys: tuple[str, ...]
    """Default keys, as Textual names them."""
    is_modal: bool = False
    """It belongs to a window over the screens: the app's own keys do not work there."""


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What the keys do."""

    keys: dict[str, tuple[str, ...]]
    """Action -> its keys."""
    changed: dict[str, str]
    """What differs from the defaults, as Textual takes it."""
    problems: tuple[str, ...] = ()
    """What of the user's wishes does not hold, and why."""


@dataclass(slots=True)
class _Wishes:
    """Keys that the user wants, and what is wrong with them."""

    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def all_actions() -> list[Action]:
    """Return the actions of the app and of all its screens; loads them all."""
    import app.tui.app
    import app.tui.screens

    for module in pkgutil.walk_packages(app.tui.screens.__path__, "app.tui.screens."):
        importlib.import_module(module.name)
    found: dict[str, Action] = {}
    for action in _declared(app.tui.app.MenmaApp, EVERYWHERE):
        found[action.id] = action
    for owner in Keyed.keyed_classes:
        for action in _declared(owner, ""):
            before = found.get(action.id)
            found[action.id] = action if before is None else _joined(before, action)
    return list(found.values())


def key_map(actions: Sequence[Action], wishes: Mapping[str, Any]) -> KeyMap:
    """Return the keys for what `[keys]` says; what cannot be is left at the default and told.

    Args:
        actions: all that there are.
        wishes: the table `[keys]`: `preset`, and keys by action.
    """
    wanted = _read(actions, wishes)
    defaults = {action.id: action.keys for action in actions}
    base = defaults | _preset(actions, wishes.get("preset", "default"), wanted.problems)
    user = dict(wanted.keys)
    while clash := next(_clashes(actions, base | user, set(user)), None):
        place, key, ids = clash
        losers = [name for name in ids if name in user and name != QUIT] or [QUIT]
        names = " and ".join(ids)
        wanted.problems.append(
            f"{names} are both on {shown(key)} in {place}; "
            f"{', '.join(losers)} stays on {', '.join(map(shown, base[losers[0]]))}"
        )
        for name in losers:
            del user[name]
    keys = base | user
    changed = {name: ",".join(keys[name]) for name in keys if keys[name] != defaults[name]}
    return KeyMap(keys, changed, tuple(wanted.problems))


def normal_key(text: str) -> str | None:
    """Return a key as Textual names it, `question_mark` for `?`; None: there is no such key."""
    *modifiers, key = [part.strip() for part in text.strip().split("+")] if text != "+" else ["+"]
    if not key or any(modifier not in MODIFIERS for modifier in modifiers):
        return None
    if len(key) == 1:
        if not key.isprintable() or key.isspace():
            return None
        key = key if key.isalnum() else _name_of(key)
    elif not _is_key_name(key):
        return None
    return "+".join([*modifiers, key])


def _declared(owner: type, place: str) -> Iterator[Action]:
    bindings = owner.__dict__.get("BINDINGS", [])
    for binding in Binding.make_bindings(bindings):
        if binding.id is None or binding.system:
            continue
        method = getattr(owner, f"action_{binding.action.partition('(')[0]}", None)
        yield Action(
            id=binding.id,
            place=place or binding.id.partition(".")[0],
            title=binding.description,
            help=(inspect.getdoc(method) or binding.description).partition("\n")[0],
            keys=(binding.key,),
            is_modal=issubclass(owner, ModalScreen),
        )


def _joined(one: Action, other: Action) -> Action:
    keys = tuple(dict.fromkeys((*one.keys, *other.keys)))
    return Action(
        id=one.id, place=one.place, title=one.title, help=one.help, keys=keys,
        is_modal=one.is_modal,
    )  # fmt: skip


def _read(actions: Sequence[Action], wishes: Mapping[str, Any]) -> _Wishes:
    known = {action.id for action in actions}
    wanted = _Wishes()
    for name, value in _flat(wishes):
        if name == "preset":
            continue
        if name not in known:
            hint = nearest(name, known, otherwise="`menma keys` lists the actions")
            wanted.problems.append(f"there is no action {name!r}: {hint}")
            continue
        keys = _keys(name, value, wanted.problems)
        if keys:
            wanted.keys[name] = keys
    return wanted


def _keys(name: str, value: Any, problems: list[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        problems.append(f"{name}: a key is written as text, several as a list of texts")
        return ()
    written = [part for part in value if part.strip()]
    if not written:
        problems.append(f"{name}: it needs a key; it stays on the default")
        return ()
    keys = []
    for text in written:
        key = normal_key(text)
        if key is None:
            problems.append(
                f"{name}: {text!r} is no key; for example: x, X, ?, f5, ctrl+x, shift+left, comma"
            )
            continue
        if key in SAME_KEY:
            problems.append(f"{name}: most terminals cannot tell {key} from {SAME_KEY[key]}")
        keys.append(key)
    return tuple(dict.fromkeys(keys))


def _preset(
    actions: Sequence[Action], name: Any, problems: list[str]
) -> dict[str, tuple[str, ...]]:
    if not isinstance(name, str) or name not in PRESETS:
        problems.append(f"preset: there is no {name!r}; one of: {', '.join(PRESETS)}")
        return {}
    known = {action.id for action in actions}
    return {id_: tuple(keys.split(",")) for id_, keys in PRESETS[name].items() if id_ in known}


def _clashes(
    actions: Sequence[Action], keys: Mapping[str, tuple[str, ...]], user: set[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (place, key, actions) where a key that the user has set does two things at once."""
    places = {action.place: action.is_modal for action in actions}
    for place, is_modal in places.items():
        also = () if is_modal else (EVERYWHERE, LISTS)
        users: dict[str, list[str]] = {}
        for action in actions:
            if action.place == place or action.place in also:
                for key in keys[action.id]:
                    users.setdefault(key, []).append(action.id)
        for key, ids in users.items():
            if len(ids) > 1 and user.intersection(ids):
                yield place, key, ids


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _is_key_name(name: str) -> bool:
    if name in NAMED_KEYS or name in KEY_TO_UNICODE_NAME:
        return True
    try:
        unicodedata.lookup(name.replace("_", " "))
    except KeyError:
        return name in {"slash", "backslash", "at", "minus", "plus", "underscore"}
    return True


def _name_of(character: str) -> str:
    """Return the name of a sign, as `Binding` turns it into one."""
    (binding,) = Binding.make_bindings([Binding("x" if character == "," else character, "none")])
    return "comma" if character == "," else binding.key
