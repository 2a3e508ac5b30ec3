"""What the shell is offered for arguments. Runs at each press of Tab: loads no config models.

The functions have the parameters that Typer hands over by name. What goes wrong offers nothing.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import typer

Offers = list[tuple[str, str]]
"""Words with what they are, which zsh and fish show."""
_MAX_FILES = 500


def _quietly(offer: Callable[..., Offers]) -> Callable[..., Offers]:
    """Return a function that offers nothing where the disk or a file is not as it should be."""

    @wraps(offer)
    def quiet(*arguments: Any, **named: Any) -> Offers:
        with suppress(Exception):  # words on the screen would be in the way of what is typed
            return offer(*arguments, **named)
        return []

    return quiet


@_quietly
def configs(incomplete: str) -> Offers:
    """Offer TOML files and folders that begin like this; with nothing typed, `configs/` too."""
    found = list(_toml_files(incomplete))
    if len(found) == 1 and found[0].endswith("/"):
        # On its own a folder would be taken as the whole word, with a space behind it.
        found = [*_toml_files(found[0]), *found]
    if not incomplete:
        found += list(_toml_files("configs/"))
    return [(path, "") for path in dict.fromkeys(found)]


@_quietly
def runs(context: typer.Context, incomplete: str) -> Offers:
    """Offer the names of runs, those that changed last first."""
    from app.runs.state import find_runs

    folder = Path(context.params.get("runs_dir") or "runs")
    names = [run.root.name for run in find_runs(folder)]
    return [(name, "run") for name in names if name.startswith(incomplete)]


@_quietly
def configs_or_runs(context: typer.Context, incomplete: str) -> Offers:
    """Offer runs and config files."""
    return [*runs(context, incomplete), *configs(incomplete)]


@_quietly
def presets(incomplete: str) -> Offers:
    """Offer the names of presets: the user's, then the shipped ones."""
    from trainer.contract.preset_folders import presets_dirs

    names = [file.stem for folder in presets_dirs() for file in sorted(folder.glob("*.toml"))]
    return [(name, "preset") for name in dict.fromkeys(names) if name.startswith(incomplete)]


@_quietly
def presets_or_configs(incomplete: str) -> Offers:
    """Offer presets and config files."""
    return [*presets(incomplete), *configs(incomplete)]


@_quietly
def jobs(incomplete: str) -> Offers:
    """Offer the numbers of the queue's jobs; none is made where there is no queue."""
    from app.queue.store import QueueStore, queue_folder

    if not QueueStore.exists(queue_folder()):
        return []
    store = QueueStore(queue_folder())
    try:
        found = [(str(job.id), f"{job.spec.argv[0]} {job.spec.name}") for job in store.jobs()]
    finally:
        store.close()
    return [(number, words) for number, words in found if number.startswith(incomplete)]


@_quietly
def option_keys(incomplete: str) -> Offers:
    """Offer `section.key` of a config's options."""
    return [(key, words) for key, words in _options() if key.startswith(incomplete)]


@_quietly
def settings(incomplete: str) -> Offers:
    """Offer `section.key=`; where one option is meant, with values to start from."""
    key, separator, typed = incomplete.partition("=")
    options = dict(_options())
    if not separator:
        offers = [(f"{name}=", words) for name, words in options.items() if name.startswith(key)]
        if len(offers) != 1:
            return offers
        key, typed = offers[0][0].removesuffix("="), ""
    values = [(f"{key}={value}", "") for value in _values(key) if value.startswith(typed)]
    # Two words at least: bash puts a space behind the only one.
    return [(f"{key}=", options.get(key, "")), *values] if not typed else values


def _named(table: str, *others: tuple[str, str]) -> Callable[[str], Offers]:
    """Return what offers the names of a registry, `module:name` of the contract, and `others`."""

    @_quietly
    def offer(incomplete: str) -> Offers:
        offers = [*_entries(table), *others]
        return [(name, words) for name, words in offers if name.startswith(incomplete)]

    return offer


def _chosen(key: str) -> Callable[[str], Offers]:
    """Return what offers the values of an option of the config."""

    @_quietly
    def offer(incomplete: str) -> Offers:
        return [(value, "") for value in _values(key) if value.startswith(incomplete)]

    return offer


def words(*names: str) -> Callable[[str], Offers]:
    """Return what offers these words."""

    @_quietly
    def offer(incomplete: str) -> Offers:
        return [(name, "") for name in names if name.startswith(incomplete)]

    return offer


_TABLES = {
    "sampling.solver": "catalog:SOLVERS",
    "sampling.schedule": "catalog:SCHEDULES",
    "sampling.step_cache": "catalog:STEP_CACHES",
    "sampling.format": "sample_formats:SAMPLE_FORMATS",
    "memory.attention": "catalog:ATTENTION",
    "model.variant": "variants:VARIANTS",
}
"""Options whose names are in a table of the contract, and not in the schema."""
solvers = _named(_TABLES["sampling.solver"])
schedules = _named(_TABLES["sampling.schedule"])
step_caches = _named(_TABLES["sampling.step_cache"], ("none", "every step is computed"))
formats = _named(_TABLES["sampling.format"])
variants = _named(_TABLES["model.variant"])
cfg_skip_modes = _chosen("sampling.cfg_skip_mode")
slg_modes = _chosen("sampling.slg_mode")
granularities = _chosen("adapter.loraid.granularity")
allocations = _chosen("adapter.loraid.allocation")
layouts = words("comfy", "kohya", "peft")
dtypes = words("bf16", "fp16", "fp32")
experts = words("high_noise", "low_noise")
devices = words("auto", "cpu", "cuda")
goals = words("character", "style", "motion", "images", "full")


def _entries(table: str) -> Offers:
    """Return names and summaries of a registry, or the names of a plain table."""
    module, _, attribute = table.partition(":")
    found = getattr(importlib.import_module(f"trainer.contract.{module}"), attribute)
    return [(str(getattr(one, "name", one)), getattr(one, "summary", "")) for one in found]


def _toml_files(start: str) -> Iterator[str]:
    folder, name = os.path.split(start)
    shown = f"{folder.rstrip('/')}/" if folder else ""
    place = Path(folder or ".").expanduser()
    if not place.is_dir():
        return
    for entry in sorted(os.scandir(place), key=lambda entry: entry.name)[:_MAX_FILES]:
        hidden = entry.name.startswith(".") and not name.startswith(".")
        if entry.name.startswith(name) and not hidden:
            if entry.is_dir():
                yield f"{shown}{entry.name}/"
            elif entry.name.endswith(".toml"):
                yield f"{shown}{entry.name}"


def _schema() -> Mapping[str, Any]:
    from trainer import contract

    file = Path(contract.__file__).with_name("schema.json")
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _options() -> list[tuple[str, str]]:
    """Return keys and their first line of help, those of all plug-ins that there are."""
    return [(key, _first_line(spec)) for key, spec in _leaves(_schema())]


def _values(key: str) -> list[str]:
    """Return what an option can be: its choices, or its default."""
    schema = _schema()
    found: list[str] = []
    for name, spec in _leaves(schema):
        if name == key:
            shown = [*spec.get("enum", ()), spec.get("default")]
            found += [_word(value) for value in shown if value is not None and value != []]
    if key in _TABLES:
        found += [name for name, _ in _entries(_TABLES[key])]
    section, _, last = key.rpartition(".")
    kind = section if last == "kind" else last
    found += list(schema["plugins"].get(kind, ()))
    return list(dict.fromkeys(found))


def _leaves(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    config, plugins = schema["config"], schema["plugins"]
    for key, spec in _properties(config, config.get("$defs", {}), ""):
        yield key, spec
        section, _, last = key.rpartition(".")
        # `[adapter] kind` chooses whose options stand beside it; so does `[objective] loss`.
        for plugin in plugins.get(section if last == "kind" else last, {}).values():
            if section.count(".") == 0 and section:
                yield from _properties(plugin, plugin.get("$defs", {}), f"{section}.")


def _properties(
    spec: Mapping[str, Any], definitions: Mapping[str, Any], before: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, inner in spec.get("properties", {}).items():
        section = _section(inner, definitions)
        if section is not None:
            yield from _properties(section, definitions, f"{before}{name}.")
        elif not _holds_tables(inner):
            yield f"{before}{name}", inner


def _section(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the table that an option is; None: it is a value."""
    for one in (spec, *spec.get("anyOf", ())):
        target = definitions.get(str(one.get("$ref", "")).rpartition("/")[2])
        if target is not None and "properties" in target:
            return dict(target)
    return None


def _holds_tables(spec: Mapping[str, Any]) -> bool:
    items = spec.get("items", {})
    return "$ref" in items or items.get("type") == "object"


def _first_line(spec: Mapping[str, Any]) -> str:
    return str(spec.get("description", "")).partition("\n")[0][:80]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
