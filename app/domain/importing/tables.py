"""The rules that tables of keys are written in, and how a table is read.

A table maps every key of a trainer to what becomes of it. Keys that only mean something together
(three switches that make one precision) have a group: a function that is given all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain.importing.draft import Draft
from app.domain.importing.report import DefaultRow, Row, Status
from app.domain.importing.values import as_is

OMITTED: Any = object()
"""Default of an option whose default is Menma's, or that does nothing when it is left out."""


_HUB_ADDRESS = re.compile(
    r"https?://(?:www\.)?huggingface\.co/(?P<repo>[\w.-]+/[\w.-]+)/(?:resolve|blob)/"
    r"(?P<revision>[\w.-]+)/(?P<path>[^?#]+)"
)


@dataclass(frozen=True, slots=True)
class To:
    """The key has one of the same meaning in Menma."""

    target: str
    convert: Callable[[Any], Any] = as_is
    default: Any = OMITTED
    """The trainer's own default, in its notation; written where it is not Menma's."""
    note: str = ""
    """What is different about it."""
    hint: str = ""
    """What to do where Menma does not know the target (yet)."""


@dataclass(frozen=True, slots=True)
class Done:
    """Menma does it in another way, without a key."""

    note: str
    off: tuple[Any, ...] = (False, None, "")
    """Values that switch it off: nothing is said of these."""


@dataclass(frozen=True, slots=True)
class Lacks:
    """Menma cannot do it."""

    why: str
    hint: str = ""
    off: tuple[Any, ...] = (False, None, "", 0)
    """Values that switch it off, as in Menma."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A key that belongs to no file: its value is not repeated anywhere."""

    hint: str


Rule = To | Done | Lacks | Secret


@dataclass(frozen=True, slots=True)
class Group:
    """Keys that are read together."""

    keys: tuple[str, ...]
    """Names; one that ends in `*` stands for all that begin so."""
    read: Callable[[Keys], None]


@dataclass(frozen=True, slots=True)
class Table:
    """All that is known of a trainer's keys."""

    tool: str
    rules: Mapping[str, Rule]
    groups: tuple[Group, ...] = ()
    """Read in this order, before the rules."""
    patterns: tuple[tuple[str, Rule], ...] = ()
    """Regular expression -> rule, for families of keys that no rule names."""


@dataclass(slots=True)
class Keys:
    """The keys of an input while they are read."""

    draft: Draft
    values: Mapping[str, Any]
    files: Mapping[str, str]
    """Key -> file it stands in."""
    folders: tuple[Path, ...] = ()
    """Where files that a key names are looked for, besides the working folder."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the trainer that are not those of the one whose groups it shares."""
    reported: dict[str, Row] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the trainer's default where the key is left out."""
        return self.values.get(key, default)

    def default(self, key: str, fallback: Any = None) -> Any:
        """Return the trainer's own default of a key."""
        return self.defaults.get(key, fallback)

    def weights_of(self, value: Any) -> tuple[str, str]:
        """Return what names weights in `[model]`, as `file_of`; of the hub they may be, too."""
        match = _HUB_ADDRESS.match(str(value).strip())
        if match is None:
            return self.file_of(value)
        at = "" if match["revision"] == "main" else f"@{match['revision']}"
        return f"hf:{match['repo']}{at}/{match['path']}", "`menma fetch` downloads it"

    def file_of(self, value: Any) -> tuple[str, str]:
        """Return a path as Menma can use it, and a note if it is not the one that was given.

        A path counts from the working folder; one that is only found beside the file it stands in
        becomes absolute. What is an address becomes a file name in `models/`.
        """
        word = str(value).strip()
        if re.match(r"https?://", word):
            name = word.partition("?")[0].rstrip("/").rpartition("/")[2]
            return f"models/{name}", f"nothing is downloaded: save {word} there"
        path = Path(word).expanduser()
        if not path.is_absolute() and not path.exists():
            for folder in self.folders:
                if (folder / path).exists():
                    return str((folder / path).absolute()), "found beside the imported file"
        return word, ""

    def read(self, key: str, convert: Callable[[Any], Any], default: Any = None) -> Any:
        """Return a value converted; the default where it is left out or cannot be read."""
        if key not in self.values:
            return default
        try:
            found = convert(self.values[key])
        except (ValueError, TypeError) as error:
            self.lacks(key, f"cannot be read: {error}")
            return default
        return default if found is None else found

    def below(self, prefix: str) -> list[str]:
        """Return the keys `prefix.…`, in their order."""
        return [key for key in self.values if key.startswith(f"{prefix}.")]

    def put(
        self, key: str, target: str, value: Any, *, note: str = "", hint: str = "", as_: str = ""
    ) -> bool:
        """Write a value for a key; without the key, if it is not Menma's default anyway.

        Args:
            key: in whose name.
            target: key of the config.
            value: as it stands there.
            note: what is different about it.
            hint: what to do if Menma does not know the target.
            as_: how to name a default that is written; the key where it is empty.

        Returns:
            Whether the config has it now, be it by its default.
        """
        if value is None:
            self.same(key, "not set, as in Menma")
            return False
        if not self.draft.knows(target, value):
            self.lacks(key, f"Menma has no {_words(target, value)} yet", hint)
            return False
        plain = "[" not in target and target.count(".") < 2
        default = self.draft.chosen(target) if plain else OMITTED
        if key in self.values and key not in self.reported:
            self.draft.values[target] = value
            status = "different" if note else _kept(key, target)
            self._row(key, status, target=target, new_value=value, note=note)
        elif value != default and target not in self.draft.values:
            self.draft.values[target] = value
            self.draft.defaults.append(DefaultRow(target, value, as_ or key))
        return True

    def done(self, key: str, note: str, target: str = "") -> None:
        """Say that a key is done in another way; with a target and no note, that it is there."""
        if key in self.values:
            value = self.draft.values.get(target) if target else None
            status = "different" if note else _kept(key, target)
            self._row(key, status, target=target, new_value=value, note=note)

    def same(self, key: str, note: str = "off, as in Menma") -> None:
        """Say that a key asks for what Menma does anyway."""
        if key in self.values:
            self._row(key, "carried", note=note)

    def lacks(self, key: str, why: str, hint: str = "") -> None:
        """Say that a key is not carried over."""
        if key in self.values:
            self._row(key, "unsupported", note=why, hint=hint)

    def rule(self, key: str, rule: Rule) -> None:
        """Do with a key what a rule says."""
        if isinstance(rule, Secret):
            if key in self.values:
                row = self._row(key, "unsupported", note="a secret belongs into no config")
                row.value, row.hint = "(not shown)", rule.hint
        elif isinstance(rule, Done):
            if not self._switched(key, rule.off):
                self.done(key, rule.note)
        elif isinstance(rule, Lacks):
            if not self._switched(key, rule.off):
                self.lacks(key, rule.why, rule.hint)
        else:
            self._to(key, rule)

    def _switched(self, key: str, off: Iterable[Any]) -> bool:
        """Report a key that is switched off; return whether it is."""
        value = self.values.get(key)
        if not any(value is one or (type(value) is type(one) and value == one) for one in off):
            return False
        self.same(key)
        return True

    def _to(self, key: str, rule: To) -> None:
        raw = self.values.get(key, rule.default)
        if raw is OMITTED:
            return
        try:
            value = rule.convert(raw)
        except (ValueError, TypeError) as error:
            self.lacks(key, f"cannot be read: {error}")
            return
        if value is None:
            self.same(key, "not set, as in Menma")
            return
        self.put(key, rule.target, value, note=rule.note, hint=rule.hint)

    def _row(self, key: str, status: Status, **more: Any) -> Row:
        """Note what became of a key; the first word on it counts."""
        row = Row(key, self.values[key], status, file=self.files.get(key, ""), **more)
        return self.reported.setdefault(key, row)


_SECRET = re.compile(r"(?:^|_)(?:api_key|token|secret|password)(?:$|_)|access_key")


def read_table(table: Table, keys: Keys) -> None:
    """Fill a draft by a table; every key gets one row, in the order of the input."""
    for key in keys.values:
        if _SECRET.search(key.rpartition(".")[2].lower()):
            rule = table.rules.get(key)
            keys.rule(key, rule if isinstance(rule, Secret) else Secret("keep it out of files"))
    for group in table.groups:
        group.read(keys)
        for key in keys.values:
            if key not in keys.reported and any(_named(key, name) for name in group.keys):
                keys.same(key, "nothing to do")
    grouped = {name for group in table.groups for name in group.keys}
    for key, rule in table.rules.items():
        if key not in grouped and key not in keys.reported:
            keys.rule(key, rule)
    for key, value in keys.values.items():
        if key in keys.reported:
            continue
        rule = next((r for pattern, r in table.patterns if re.fullmatch(pattern, key)), None)
        if rule is not None:
            keys.rule(key, rule)
        else:
            keys.reported[key] = Row(
                key, value, "unknown", file=keys.files.get(key, ""),
                note=f"no key of {table.tool} that Menma knows", hint="look whether you need it",
            )  # fmt: skip
    keys.draft.rows += [keys.reported[key] for key in keys.values]


def _named(key: str, name: str) -> bool:
    return key.startswith(name[:-1]) if name.endswith("*") else key == name


def _kept(key: str, target: str) -> Status:
    same = not target or key.rpartition(".")[2] == target.rpartition(".")[2]
    return "carried" if same else "renamed"


def _words(target: str, value: Any) -> str:
    return f"{target} = {value!r}" if isinstance(value, str) else target
