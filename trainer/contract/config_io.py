"""Read, merge, check and write configs: defaults < preset < file < environment < `--set`.

No torch: options of plug-ins come from the generated schema. Everything that is wrong is found in
one pass and reported with file, line and key.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tomlkit
from pydantic import BaseModel, ValidationError

from trainer.contract.catalog import PLUGIN_KINDS
from trainer.contract.config import RunConfig
from trainer.contract.config_layers import Layer, Source, plugin_sections, stacked
from trainer.contract.config_rules import JobName, check_files, check_rules
from trainer.contract.dataset_config import MEDIA_KEYS, GeneralOptions
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.hub import cached_path, is_reference, with_local_files
from trainer.contract.plugin_options import option_model, option_names
from trainer.contract.plugin_section import PluginSection
from trainer.contract.registry import nearest
from trainer.contract.toml_lines import key_lines, locate

ENVIRONMENT_PREFIX = "MENMA__"
"""`MENMA__TRAINING__SEED=7` sets `training.seed`."""
_SOURCE_PATHS = (*MEDIA_KEYS, "cache_directory")
PRESETS_DIR = Path(__file__).parents[2] / "presets"


@dataclass(slots=True)
class LoadedConfig:
    """A checked config and where each value that is not a default came from."""

    config: RunConfig
    sources: dict[str, Source] = field(default_factory=dict)


def load_config(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read a config file and check it completely.

    Args:
        path: TOML file.
        overrides: `section.key=value` strings; they win over everything else.
        environ: environment variables; `os.environ` when None.

    Raises:
        ConfigError: with all problems at once in `.problems`.
    """
    return load_config_with_sources(path, overrides, environ=environ).config


def load_config_with_sources(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    jobs: Iterable[JobName] = (),
    text: str | None = None,
) -> LoadedConfig:
    """Like `load_config`, and also say where every value came from.

    Args:
        path: as there.
        overrides: as there.
        environ: as there.
        jobs: where something is wrong, what these jobs miss of its files is told with it.
        text: what to take for the file's content, as while it is being written; None: read it.
    """
    problems: list[Problem] = []
    own = Layer(*(read_toml(Path(path)) if text is None else parse_toml(text, Path(path))))
    layers = [own]
    preset = own.values.get("preset")
    if isinstance(preset, str):
        below = Layer(*read_toml(find_preset(preset, sources=own.sources)))
        below.values.pop("preset", None)
        layers.insert(0, below)
    environment = _environment(os.environ if environ is None else environ)
    given = ((text, Source(f"--set {text}")) for text in overrides)
    layers += [_layer_of(environment, problems), _layer_of(given, problems)]
    merged = stacked(layers)
    try:
        config = _validate(merged.values, problems)
    except ConfigError as error:
        told = {problem.key for problem in error.problems}
        missing = [one for one in _missing_files(merged.values, jobs) if one.key not in told]
        found = place_problems([*error.problems, *missing], merged.sources)
        raise ConfigError(problems=found) from error
    return LoadedConfig(with_local_files(config, cached_path), merged.sources)


def read_toml(path: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """Parse a TOML file; return its content and the place of each key.

    Raises:
        ConfigError: missing, unreadable, or not TOML (with the line).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"config file not found: {path}", hint="`menma new -o FILE` writes one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return parse_toml(text, path)


def parse_toml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """Return the content of a TOML text and the place of each key; `path` is named for it.

    Raises:
        ConfigError: it is not TOML, with the line.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+)", str(error))
        line = int(place[1]) if place else text.count("\n") + 1  # "at end of document"
        problem = Problem(f"not valid TOML: {error}", file=path, line=line)
        raise ConfigError(problems=[problem]) from error
    except RecursionError:
        problem = Problem("not valid TOML: too many brackets in one another", file=path)
        raise ConfigError(problems=[problem]) from None
    lines = key_lines(text)
    places = {key: Source(str(path), path, line) for key, line in lines.items()}
    return content, places


def parse_override(text: str) -> dict[str, Any]:
    """Turn `section.key=value` into a nested dict; the value is TOML, or else a plain string.

    Raises:
        ConfigError: no `=` or no key.
    """
    key, separator, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"cannot read override {text!r}", hint="write section.key=value")
    parsed: Any = _parse_value(value.strip())
    for part in reversed(parts):
        parsed = {part: parsed}
    return cast("dict[str, Any]", parsed)


def presets_dirs() -> list[Path]:
    """Folders of presets: the user's first, then the shipped ones."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return [Path(config_home) / "menma" / "presets", PRESETS_DIR]


def find_preset(name: str, *, sources: Mapping[str, Source] | None = None) -> Path:
    """Return the file of a preset, given by name or by path.

    Raises:
        ConfigError: no such preset; the hint names the nearest one.
    """
    if name.endswith(".toml"):
        return Path(name)
    known: dict[str, Path] = {}
    for folder in reversed(presets_dirs()):
        known |= {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if name in known:
        return known[name]
    place = (sources or {}).get("preset", Source(""))
    hint = nearest(name, known, otherwise="`menma presets list` shows those that there are")
    problem = Problem(f"unknown preset {name!r}", "preset", place.file, place.line, hint)
    raise ConfigError(problems=[problem])


def dump_config(config: RunConfig, *, base: Path | None = None) -> str:
    """Return the config as TOML with every value written out, readable by `load_config`.

    Args:
        config: what to write.
        base: folder that relative paths count from; they become absolute, so that the text means
            the same wherever it is read. None leaves them.
    """
    content = config.model_dump(mode="python", exclude_none=True)
    if base is not None:
        content = _absolute(content, base)
    plain = json.loads(json.dumps(content, default=str))
    return tomlkit.dumps({key: value for key, value in plain.items() if value != {}})


def _absolute(value: Any, base: Path, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _absolute(part, base, name) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_absolute(part, base, key) for part in value]
    if is_reference(value):
        return str(value)
    # The tables of [[dataset.sources]] are plain strings here.
    if isinstance(value, Path) or (isinstance(value, str) and key in _SOURCE_PATHS):
        return base / Path(value).expanduser()
    return value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Source]]:
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            yield f"{key}={environ[name]}", Source(f"environment {name}")


def _layer_of(texts: Iterable[tuple[str, Source]], problems: list[Problem]) -> Layer:
    """Return the values of `section.key=value` texts; those that cannot be read are noted."""
    layer = Layer()
    for text, source in texts:
        try:
            layer.add(parse_override(text), source)
        except ConfigError as error:
            problems += error.problems
    return layer


def _missing_files(content: Mapping[str, Any], jobs: Iterable[JobName]) -> list[Problem]:
    """Return what a config with mistakes misses of its files, as far as it can be read."""
    readable = _complete_plugin_sections(content, [])
    for _ in range(2):  # an unknown key can hide a wrong value beside it
        try:
            config = RunConfig.model_validate(readable)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                _drop(readable, detail["loc"])
        else:
            return list(dict.fromkeys(p for job in jobs for p in check_files(config, job)))
    return []


def _without_unknown_keys(content: dict[str, Any], error: ValidationError) -> RunConfig | None:
    """Return the config as it is but for keys that nothing knows; None where more is wrong."""
    details = error.errors(include_url=False)
    if any(detail["type"] != "extra_forbidden" for detail in details):
        return None
    for detail in details:
        _drop(content, detail["loc"])
    try:
        return RunConfig.model_validate(content)
    except ValidationError:  # it was one of a list's tables: only the mistake itself is told
        return None


def _drop(values: Any, place: Sequence[str | int]) -> None:
    """Remove the value at `place`, or the closest one around it."""
    for part in place:
        inside = values.get(part) if isinstance(values, dict) else None
        if not isinstance(inside, dict) or part == place[-1]:
            if isinstance(values, dict):
                values.pop(part, None)
            return
        values[part] = values = dict(inside)


def _validate(content: dict[str, Any], found: Iterable[Problem]) -> RunConfig:
    problems = list(found)
    completed = _complete_plugin_sections(content, problems)
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(completed)
    except ValidationError as error:
        problems += problems_of(error, RunConfig)
        config = _without_unknown_keys(completed, error)
    if config is not None:
        problems += check_rules(config)
        if config.dataset.file is None and config.dataset.sources:
            problems += _dataset_problems(config)
        problems += _validation_problems(config)
    if problems or config is None:
        raise ConfigError(problems=problems)
    return config


def _dataset_problems(config: RunConfig) -> list[Problem]:
    try:
        config.dataset.load()
    except ConfigError as error:
        return [
            Problem(
                problem.message,
                "dataset." + problem.key.replace("datasets[", "sources["),
                hint=problem.hint,
            )
            for problem in error.problems
        ]
    return []


def _validation_problems(config: RunConfig) -> list[Problem]:
    try:
        config.validation.load_sources(GeneralOptions())  # their own keys; a file is not opened
    except ConfigError as error:
        return list(error.problems)
    return []


def place_problems(problems: Iterable[Problem], sources: Mapping[str, Source]) -> list[Problem]:
    """Add file and line to problems that only know their key."""
    return [_place(problem, sources) for problem in problems]


def _place(problem: Problem, sources: Mapping[str, Source]) -> Problem:
    if problem.file is not None or not problem.key:
        return problem
    for_key = {key: index for index, key in enumerate(sources)}
    found = locate(problem.key, for_key)
    if found is None:
        return problem
    source = list(sources.values())[found]
    message = problem.message
    if source.file is None:
        message = f"{message} (from {source.name})"
    return Problem(message, problem.key, source.file, source.line, problem.hint)


def _complete_plugin_sections(
    content: Mapping[str, Any], problems: list[Problem]
) -> dict[str, Any]:
    """Check the plug-in options of every section and fill in their defaults."""
    completed = dict(content)
    for name, section in plugin_sections():
        raw = content.get(name, {})
        if isinstance(raw, Mapping):
            completed[name] = _complete(section, raw, name, problems)
    raw_techniques = content.get("techniques", [])
    if isinstance(raw_techniques, list):
        technique = _technique_section()
        completed["techniques"] = [
            _complete(technique, raw, f"techniques[{index}]", problems)
            if isinstance(raw, Mapping)
            else raw
            for index, raw in enumerate(raw_techniques)
        ]
    return completed


def _technique_section() -> type[PluginSection]:
    from trainer.contract.config import TechniqueSection

    return TechniqueSection


def _complete(
    section: type[PluginSection], raw: Mapping[str, Any], path: str, problems: list[Problem]
) -> dict[str, Any]:
    completed = dict(raw)
    known = set(section.model_fields)
    for slot, kind in section.slots.items():
        name = raw.get(slot, section.model_fields[slot].default)
        registry = PLUGIN_KINDS[kind]
        if not isinstance(name, str):
            continue  # reported by the section's own model
        if name not in registry:
            hint = nearest(name, registry.names)
            problems.append(
                Problem(f"unknown {registry.kind} {name!r}", f"{path}.{slot}", hint=hint)
            )
            known |= set(raw)  # its options cannot be judged
            continue
        names = option_names(kind, name)
        known |= names
        model = option_model(kind, name)
        try:
            options = model.model_validate({k: v for k, v in raw.items() if k in names})
        except ValidationError as error:
            problems += problems_of(error, model, prefix=path)
        else:
            completed |= options.model_dump()
    for key in raw:
        if key not in known:
            problems.append(Problem("unknown key", f"{path}.{key}", hint=nearest(key, known)))
            completed.pop(key, None)
    return completed


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[Problem]:
    """Translate pydantic's errors into problems with dotted keys and near names."""
    return [_problem(detail, model, prefix) for detail in error.errors(include_url=False)]


def _problem(detail: Any, model: type[BaseModel], prefix: str) -> Problem:
    key = prefix
    for part in detail["loc"]:
        if isinstance(part, int):
            key += f"[{part}]"
        elif part.isidentifier() or "-" in part:
            key += f".{part}" if key else part
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        owner = _model_at(model, detail["loc"][:-1])
        known = list(owner.model_fields) if owner else []
        return Problem("unknown key", key, hint=nearest(str(detail["loc"][-1]), known))
    if kind == "missing":
        return Problem("required, but not given", key)
    message = detail["msg"][0].lower() + detail["msg"][1:]
    shown = repr(value)
    return Problem(f"{message}, not {shown if len(shown) < 80 else shown[:77] + '...'}", key)


def _model_at(model: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel] | None:
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return None
        info = current.model_fields.get(part)
        if info is None:
            return None
        current = info.annotation
        arguments = getattr(current, "__args__", ())
        models = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
        current = models[0] if models else current
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None
