"""Presets of the user's own: what of a config is worth keeping, written beside the shipped ones."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from app.domain.presets import Preset, PresetHead, flatten, read_preset, usable_preset
from app.domain.toml_text import toml_key, toml_value
from trainer.contract.config import DatasetSection, RunConfig
from trainer.contract.config_layers import plugin_sections
from trainer.contract.dataset_config import MEDIA_KEYS
from trainer.contract.errors import ConfigError, DiskError, Problem, UserError
from trainer.contract.files import write_text
from trainer.contract.options import Options
from trainer.contract.plugin_options import option_model, plugin_schemas
from trainer.contract.preset_folders import presets_dirs

PERSONAL = (
    "name",
    "preset",
    "dataset",
    "validation.sources",
    "sampling.prompts",
    "sampling.loras",
    "output.title",
    "output.author",
    "output.description",
    "output.license",
    "output.tags",
)
"""Keys, or sections, that belong to one person's data or one run; with them all paths."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A preset that was written."""

    preset: Preset
    left_out: tuple[str, ...]
    """Keys of the config that do not go into presets."""


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return what differs from the defaults and is not personal: no path, no name, no data.

    Samples and validation go with the prompts and clips that they need.

    Args:
        config: checked.
    """
    values = config.model_dump(mode="python", exclude_none=True)
    found = _changed(values, _defaults(values), "")
    if "sampling" in found:
        found["sampling"] = _without(found["sampling"], "every_steps", "every_epochs", "at_start")
    if not config.validation.split and "validation" in found:
        found["validation"] = _without(found["validation"], "every_steps", "every_epochs")
    if found.get("adapter", {}).get("rank") == "from_weights":  # of a file that is left out
        found["adapter"] = _without(found["adapter"], "rank")
    return {key: value for key, value in found.items() if value not in ({}, [])}


def is_personal(key: str) -> bool:
    """Tell whether an option, such as `model.vae`, stays out of presets."""
    key = re.sub(r"\[\d+\]", "", key)
    parts = key.split(".")
    around = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return not around.isdisjoint(PERSONAL) or not around.isdisjoint(_path_keys())


def save_preset(
    config: RunConfig, name: str, *, title: str = "", description: str = "", force: bool = False
) -> Saved:
    """Write what is worth keeping of a config into the user's presets.

    Args:
        config: checked.
        name: of the preset, and of its file.
        title: a line; "" makes one of the name.
        description: for whom it is.
        force: overwrite a preset of the user's own that has this name.

    Raises:
        UserError: the name is not one, or taken.
        ConfigError: the dataset cannot be read, or what is left makes no sense alone.
        DiskError: it cannot be written.
    """
    if not _NAME.fullmatch(name) or name.endswith(".toml"):
        raise UserError(
            f"{name!r} cannot be the name of a preset",
            hint="use up to 31 letters, digits, points, dashes and underscores, without .toml",
        )
    path = presets_dirs()[0] / f"{name}.toml"
    if path.exists() and not force:
        raise UserError(
            f"there is a preset {name!r} of yours already: {path}",
            hint="choose another --name, or add --force",
        )
    values = settings_of(config)
    source = _source_of(config.dataset)
    head = PresetHead(
        title=title or f"{name}, saved from {config.name}",
        description=description,
        variant="" if config.model.variant == "auto" else config.model.variant,
        goal="full" if config.adapter.kind == "none" else None,
        num_gpus=config.distributed.num_processes or 1,
        peak_vram_gib=_peak_gib(config),
        source=source,
    )
    text = preset_text(head, values)
    _require_usable(text, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
    return Saved(preset=read_preset(str(path)), left_out=tuple(_left_out(config, values)))


def _require_usable(text: str, file_name: str) -> None:
    """Raise where settings make no sense without what is left out.

    Raises:
        ConfigError: with the keys; places in a file that is not there are not told.
    """
    with tempfile.TemporaryDirectory(prefix="menma-") as folder:
        path = Path(folder) / file_name
        path.write_text(text, encoding="utf-8")
        try:
            usable_preset(str(path))
        except ConfigError as error:
            found = [Problem(p.message, p.key, hint=p.hint) for p in error.problems]
            hint = "not saved: without the paths and data of its config this is wrong"
            raise ConfigError(problems=[*found, Problem(hint)]) from error


def remove_preset(name: str) -> Path:
    """Delete a preset of the user's own, right or wrong; return the path of its file.

    Raises:
        UserError: there is none of that name.
        DiskError: it cannot be deleted.
    """
    folder, shipped = presets_dirs()
    path = folder / f"{name}.toml"
    if path.parent != folder or not path.is_file():
        own = sorted(file.stem for file in folder.glob("*.toml"))
        what = "comes with Menma" if (shipped / f"{name}.toml").is_file() else "is none of yours"
        raise UserError(
            f"preset {name!r} {what}: not removed",
            hint=f"yours: {', '.join(own)}" if own else "you have no presets of your own",
        )
    try:
        path.unlink()
    except OSError as error:
        raise DiskError(f"cannot delete {path}: {error.strerror or error}") from error
    return path


def preset_text(head: PresetHead, values: Mapping[str, Any]) -> str:
    """Return a preset as TOML."""
    told = head.model_dump(mode="json", exclude_defaults=True)
    tables = {"preset": told, **values}
    return "\n".join(_lines("", tables)).lstrip("\n") + "\n"


def _lines(path: str, values: Mapping[str, Any]) -> Iterator[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping) and value}
    lists = {key: value for key, value in values.items() if _is_table_list(value)}
    plain = {key: value for key, value in values.items() if key not in {*tables, *lists}}
    if path and (plain or not tables):
        yield f"\n[{path}]"
    yield from (f"{toml_key(key)} = {toml_value(value)}" for key, value in plain.items())
    for key, value in tables.items():
        yield from _lines(f"{path}.{toml_key(key)}" if path else key, value)
    for key, value in lists.items():
        for part in value:
            yield f"\n[[{f'{path}.{key}' if path else key}]]"
            yield from (f"{toml_key(name)} = {toml_value(one)}" for name, one in part.items())


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _changed(values: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the part of `values` that is neither the default nor personal, as plain values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else key
        if is_personal(name):
            continue
        if key == "techniques" and not path:
            found[key] = [_technique(part) for part in value]
        elif isinstance(value, Mapping):
            default = defaults.get(key)
            inner = _changed(value, default if isinstance(default, Mapping) else {}, name)
            if inner or (value == {} and default not in ({}, None)):
                found[key] = inner
        elif key not in defaults or _plain(value) != _plain(defaults[key]):
            found[key] = _plain(value)
    return found


def _technique(values: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _plugin_defaults("technique", str(values["name"]))
    return {"name": values["name"], **_changed(_without(values, "name"), defaults, "techniques")}


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of all options, those of the plug-ins that `values` chooses included."""
    defaults = RunConfig().model_dump(mode="python")
    for name, section in plugin_sections():
        for slot, kind in section.slots.items():
            defaults[name] |= _plugin_defaults(kind, values[name][slot])
    return defaults


def _plugin_defaults(kind: str, name: str) -> dict[str, Any]:
    fields = option_model(kind, name).model_fields if name in plugin_schemas()[kind] else {}
    return {key: field.default for key, field in fields.items() if not field.is_required()}


@cache
def _path_keys() -> frozenset[str]:
    """Return the keys of all options that hold a path; those of techniques without an index."""
    found = set()
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Options):
            found |= _paths_in(name, section.model_json_schema())
    kinds = [(name, kind) for name, part in plugin_sections() for kind in part.slots.values()]
    for name, kind in [*kinds, ("techniques", "technique")]:
        for schema in plugin_schemas()[kind].values():
            found |= _paths_in(name, schema)
    return frozenset(found)


def _paths_in(section: str, schema: Mapping[str, Any]) -> set[str]:
    tables = schema.get("$defs", {})

    def is_path(spec: Mapping[str, Any]) -> bool:
        if "$ref" in spec:
            spec = tables[spec["$ref"].rpartition("/")[2]]
        inner = [*spec.get("anyOf", ()), *spec.get("properties", {}).values()]
        inner += [spec["items"]] if "items" in spec else []
        return spec.get("format") == "path" or any(map(is_path, inner))

    options = schema.get("properties", {})
    return {f"{section}.{key}" for key, spec in options.items() if is_path(spec)}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _source_of(dataset: DatasetSection) -> dict[str, Any]:
    """Return the keys of the first source without its paths; {} where there is none.

    Raises:
        ConfigError: the dataset file is missing or a key is wrong.
    """
    if dataset.file is None and not dataset.sources:
        return {}
    source = dataset.load().sources[0]
    medium = {f"{source.kind}_directory": "images" if source.kind == "image" else "clips"}
    values = source.model_dump(mode="python", exclude_defaults=True)
    values["enable_bucket"] = source.enable_bucket  # a new config has them unless told otherwise
    kept = {
        key: _plain(value)
        for key, value in values.items()
        if key not in (*MEDIA_KEYS, "cache_directory")
    }
    return {**medium, **kept, "resolution": list(source.resolution)}


def _peak_gib(config: RunConfig) -> float | None:
    """Return the estimated peak; None: the model is not known, or `auto` decides on the GPU."""
    from trainer.contract.memory_model import estimate

    if config.memory.automatic:
        return None
    try:
        return round(estimate(config).peak_bytes / 2**30, 1)
    except ConfigError:
        return None


def _left_out(config: RunConfig, kept: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the config sets and the preset does not; the dataset is in its head."""
    given = config.model_dump(mode="python", exclude_unset=True, exclude_none=True)
    defaults = flatten(_defaults(config.model_dump(mode="python")))
    here = flatten(kept)
    for key, value in flatten(given).items():
        section = key.partition(".")[0]
        if section in {"name", "preset", "dataset", "techniques"} or key in here or value == {}:
            continue
        if key not in defaults or _plain(value) != _plain(defaults[key]):
            yield key
