"""A named table of things that are imported only when somebody picks them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from trainer.contract.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One registry line: the user's name, where the code lives, and a summary."""

    name: str
    target: str
    summary: str


class Registry(Generic[T]):
    """Maps the names that users write in TOML to `module:attribute`, importing on demand."""

    def __init__(self, kind: str, *entries: Entry) -> None:
        names = [entry.name for entry in entries]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"duplicate {kind} names: {duplicates}")
        self.kind = kind
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(
                f"unknown {self.kind} {name!r}", hint=nearest(name, self._entries)
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the table."""
        return tuple(self._entries)

    def load(self, name: str) -> type[T]:
        """Import and return what is registered under `name`.

        Raises:
            ConfigError: no such name; the hint names the nearest one.
        """
        module, _, attribute = self[name].target.partition(":")
        return cast("type[T]", getattr(cast(Any, importlib.import_module(module)), attribute))


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return a hint: the known name closest to `name`, else `otherwise`, or the list of all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return otherwise or f"known: {', '.join(sorted(known))}"
