"""The config that an import makes: values by their keys, the reason of each, and no mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.domain.importing.report import DefaultRow, Row, Status
from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.config import Prompt, RunConfig
from trainer.contract.config_io import load_config_with_sources
from trainer.contract.dataset_config import MEDIA_KEYS, GeneralOptions, SourceOptions
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.options import Options
from trainer.contract.plugin_options import option_names, plugin_schemas
from trainer.contract.plugin_section import PluginSection

_TABLES: tuple[tuple[str, type[Options]], ...] = (
    (r"dataset\.general", GeneralOptions),
    (r"dataset\.sources\[\d+\]", SourceOptions),
    (r"validation\.sources\[\d+\]", SourceOptions),
    (r"sampling\.prompts\[\d+\]", Prompt),
)
"""Tables inside of sections, which the classes of the sections do not describe."""
_PART = re.compile(r"([^.\[\]]+)(?:\[(\d+)\])?(?:\.|$)")


class Draft:
    """Values of a config under way. What Menma does not know is not taken."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.values: dict[str, Any] = {}
        """`section.key` or `dataset.sources[0].key` -> value."""
        self.rows: list[Row] = []
        self.defaults: list[DefaultRow] = []
        self.notes: list[str] = []

    def knows(self, target: str, value: Any = None) -> bool:
        """Tell whether the config has this key; of a key that names a plug-in, this plug-in."""
        section_name, _, key = target.rpartition(".")
        for pattern, options in _TABLES:
            if re.fullmatch(pattern, section_name):
                return key in options.model_fields
        if not section_name:
            return target in RunConfig.model_fields
        field = RunConfig.model_fields.get(section_name)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, Options)):
            return False
        if not issubclass(section, PluginSection):
            return key in section.model_fields
        if key in section.slots:
            return value is None or value in PLUGIN_KINDS[section.slots[key]]
        return key in section.model_fields or any(
            key in option_names(kind, self.chosen(f"{section_name}.{slot}"))
            for slot, kind in section.slots.items()
        )

    def chosen(self, target: str) -> Any:
        """Return a value of the config as it is now, Menma's default included."""
        if target in self.values:
            return self.values[target]
        section_name, _, key = target.rpartition(".")
        for pattern, options in _TABLES:
            if re.fullmatch(pattern, section_name):
                return options.model_fields[key].get_default(call_default_factory=True)
        if not section_name:
            return RunConfig.model_fields[target].get_default(call_default_factory=True)
        field = RunConfig.model_fields[section_name].annotation
        assert isinstance(field, type)
        assert issubclass(field, Options)
        if key in field.model_fields:
            return field.model_fields[key].get_default(call_default_factory=True)
        assert issubclass(field, PluginSection)
        for slot, kind in field.slots.items():
            schema = plugin_schemas()[kind].get(self.chosen(f"{section_name}.{slot}"), {})
            if key in schema.get("properties", {}):
                return schema["properties"][key].get("default")
        return None

    def settle(self) -> None:
        """Take back what the config's own checks refuse, with their reason, until it passes."""
        for _ in range(len(self.values) + 1):
            problems = self._problems()
            if not problems:
                return
            for problem in problems:
                self._take_back(problem)
        raise AssertionError(f"the imported config does not pass: {self._problems()}")

    def nested(self) -> dict[str, Any]:
        """Return the values as tables in tables."""
        root: dict[str, Any] = {}
        for path, value in self.values.items():
            place: Any = root
            parts = list(_parts(path))
            for name, index in parts[:-1]:
                place = _inside(place, name, index)
            place[parts[-1][0]] = value
        return root

    def _problems(self) -> list[Problem]:
        import tomlkit

        content = self.nested()
        dataset = content.setdefault("dataset", {})
        if "file" not in dataset and not dataset.get("sources"):
            dataset["sources"] = [{"video_directory": "clips"}]  # as the text has it then
        text = tomlkit.dumps(content)
        try:
            load_config_with_sources(Path("imported.toml"), environ={}, text=text)
        except ConfigError as error:
            return list(error.problems)
        return []

    def _take_back(self, problem: Problem) -> None:
        """Remove what a problem names; where that is not of the import, what stands around it."""
        key = problem.key
        if owned := self._of_plug_in(key):
            key, found = "", owned
        while key:
            found = [path for path in self.values if _is_within(path, key)]
            if found:
                named = [path for path in found if _is_named(path, problem.message)]
                found = named or found
                break
            key = key.rpartition(".")[0]
        else:  # a fault of the whole: the last word is taken back
            found = owned or list(self.values)[-1:]
        for path in found:
            self._lose(path, self.values.pop(path), problem)
        self._close_gaps()

    def _of_plug_in(self, key: str) -> list[str]:
        """Return what was written for the plug-in whose option a key is, if not the key itself."""
        section_name, _, option = key.rpartition(".")
        field = RunConfig.model_fields.get(section_name)
        section = field.annotation if field is not None else None
        if key in self.values or not (
            isinstance(section, type) and issubclass(section, PluginSection)
        ):
            return []
        for slot, kind in section.slots.items():
            names = option_names(kind, str(self.chosen(f"{section_name}.{slot}")))
            if option in names and f"{section_name}.{slot}" in self.values:
                paths = [f"{section_name}.{name}" for name in (slot, *names)]
                return [path for path in paths if path in self.values]
        return []

    def _lose(self, path: str, value: Any, problem: Problem) -> None:
        told = [*(row.target for row in self.rows), *(row.target for row in self.defaults)]
        self.defaults = [row for row in self.defaults if row.target != path]
        if path not in told:
            self.notes.append(f"{path} = {value!r} is left out: {problem.message}")
        for row in self.rows:
            if row.target == path:
                row.status, row.target, row.new_value = "unsupported", "", None
                row.note = f"{path} = {value!r} is refused: {problem.message}"
                row.hint = problem.hint

    def _close_gaps(self) -> None:
        """Number the tables of each list from 0 on again, where one has lost all its values."""
        new: dict[str, str] = {}
        for name in ("dataset.sources", "validation.sources", "sampling.prompts"):
            pattern = re.compile(re.escape(name) + r"\[(\d+)\]")
            left = sorted({int(match[1]) for path in self.values if (match := pattern.match(path))})
            new |= {f"{name}[{old}]": f"{name}[{place}]" for place, old in enumerate(left)}

        def renamed(path: str) -> str:
            table, dot, key = path.rpartition(".")
            return f"{new.get(table, table)}{dot}{key}"

        self.values = {renamed(path): value for path, value in self.values.items()}
        for row in self.rows:
            row.target = renamed(row.target)
        for default in self.defaults:
            default.target = renamed(default.target)

    def add(self, key: str, value: Any, status: Status, **more: Any) -> None:
        """Say what became of a key."""
        self.rows.append(Row(key, value, status, **more))


def _is_within(path: str, key: str) -> bool:
    return path == key or path.startswith((f"{key}.", f"{key}["))


def _is_named(path: str, message: str) -> bool:
    """Tell whether a message about a table names one of its keys, which is then at fault."""
    key = path.rpartition(".")[2]
    return key not in MEDIA_KEYS and re.search(rf"\b{re.escape(key)}\b", message) is not None


def _parts(path: str) -> Iterator[tuple[str, int | None]]:
    for match in _PART.finditer(path):
        yield match[1], None if match[2] is None else int(match[2])


def _inside(place: dict[str, Any], name: str, index: int | None) -> dict[str, Any]:
    if index is None:
        found: dict[str, Any] = place.setdefault(name, {})
        return found
    items: list[dict[str, Any]] = place.setdefault(name, [])
    while len(items) <= index:
        items.append({})
    return items[index]
