"""A commented config: every option with its description and default, a preset's values set."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from app.domain.presets import Preset
from app.domain.toml_text import toml_value
from trainer.contract.catalog import PLUGIN_KINDS, SCHEDULES, SOLVERS
from trainer.contract.config import Prompt, RunConfig
from trainer.contract.dataset_config import MEDIA_KEYS, SourceOptions
from trainer.contract.options import Options
from trainer.contract.options_page import tables_of
from trainer.contract.plugin_options import plugin_schemas
from trainer.contract.variants import VARIANTS

WIDTH = 96
HEAD = """\
# Menma config{origin}.
# Lines that begin with "# key =" show the default: take the "# " away to change one.
# Lines with nothing behind the "=" have no default value.
# Check it with `menma check FILE`; any value can be given on the command line, too:
# `menma train FILE --set training.max_steps=2000`.
"""
FILES = {
    "transformer": "models/transformer.safetensors",
    "transformer_high_noise": "models/transformer_high_noise.safetensors",
    "vae": "models/vae.safetensors",
    "text_encoder": "models/text_encoder.safetensors",
    "image_encoder": "models/image_encoder.safetensors",
}
"""Names written where the user has to put his own and the preset knows no usual one."""


def render_config(
    name: str, preset: Preset | None = None, given: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """Return the text of a config called `name`, ready to be filled in.

    Args:
        name: of the run.
        preset: its values are set.
        given: section -> key -> value; they win. Those of `dataset` are the keys of one source,
            and with `model` no weight files are written but the ones in it.
    """
    origin = f" from preset {preset.name!r}: {preset.title}" if preset else ""
    return render_values(name, _with_given(preset, given or {}), origin=origin)


def render_values(name: str, values: Mapping[str, Any], *, origin: str = "") -> str:
    """Return the text of a config called `name` with these values.

    Args:
        name: of the run.
        values: section -> values. `dataset` has `general` and `sources` as in a config, or the
            keys of one source.
        origin: where it comes from, with a space before it.
    """
    lines = [HEAD.format(origin=origin)]
    lines += _option("name", RunConfig.model_fields["name"], {"name": name})
    for key, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Options):
            lines += _section(key, section, field.description or "", values.get(key, {}))
    lines += _techniques(values.get("techniques", ()))
    return "\n".join(lines) + "\n"


def _with_given(preset: Preset | None, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the preset's values with those that are known better."""
    values = _with_files(preset)
    for section, known in given.items():
        before = values.get(section, {})
        if section == "dataset":
            before = {}
        elif section == "adapter" and known.get("kind", before.get("kind")) != before.get("kind"):
            before = {}  # options of another kind
        elif section == "model":
            before = {key: value for key, value in before.items() if key not in FILES}
        values[section] = {**before, **known}
    return values


def _with_files(preset: Preset | None) -> dict[str, Any]:
    """Return the preset's values, with a name for every weight file that its model needs.

    `dataset` are the keys of one source.
    """
    values: dict[str, Any] = dict(preset.values) if preset else {}
    model = dict(values.get("model", {}))
    usual = {**FILES, **(preset.files if preset else {})}
    high, low = ["transformer_high_noise"], ["transformer"]
    needed = {"high_noise": high, "both": low + high, "shared": low + high}.get(
        str(model.get("expert")), low
    )
    needed = [*needed, "vae", "text_encoder"]
    variant = VARIANTS.get(str(model.get("variant")))
    if variant is not None and variant.transformer.image_dim is not None:
        needed.append("image_encoder")
    values["model"] = {**{key: usual[key] for key in needed}, **model}
    general = dict(values.get("dataset", {})).get("general", {})
    values["dataset"] = {**general, **(preset.source if preset else {})}
    return values


def _section(
    name: str, section: type[Options], description: str, values: Mapping[str, Any]
) -> Iterator[str]:
    yield ""
    yield from _comment(section.__doc__ or description)
    yield f"[{name}]"
    if name == "dataset":
        yield from _dataset(values)
        return
    slots: dict[str, str] = getattr(section, "slots", {})
    for key, field in section.model_fields.items():
        if key == "prompts" or (key == "sources" and values.get(key)):
            continue
        yield from _option(key, field, values, kind=slots.get(key))
    for slot, kind in slots.items():
        chosen = values.get(slot, section.model_fields[slot].default)
        options = plugin_schemas()[kind][chosen].get("properties", {})
        tables = tables_of(kind)
        for key in sorted(options, key=lambda key: key not in values):
            yield from _plugin_option(key, options[key], values, f"{chosen}: ")
            if key in tables:
                yield from _comment(f"  Keys of {key}: {', '.join(tables[key]['properties'])}.")
    if name == "sampling":
        yield from _prompts(values.get("prompts", ()))
    if name == "validation":
        yield from _sources("validation.sources", values.get("sources", ()))


def _option(
    key: str, field: FieldInfo, values: Mapping[str, Any], *, kind: str | None = None
) -> Iterator[str]:
    yield from _comment(field.description or "")
    if kind is not None:
        for entry in PLUGIN_KINDS[kind]:
            yield from _comment(f"  {entry.name}: {entry.summary}")
    elif choices := _choices(key, field.annotation):
        yield from _comment(f"One of {', '.join(choices)}.")
    yield _assignment(key, values, _plain(field.get_default(call_default_factory=True)))


def _plugin_option(
    key: str, spec: Mapping[str, Any], values: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    yield from _comment(prefix + str(spec.get("description", "")))
    if "enum" in spec:
        yield from _comment(f"One of {', '.join(map(str, spec['enum']))}.")
    yield _assignment(key, values, spec.get("default"))


def _assignment(key: str, values: Mapping[str, Any], default: Any) -> str:
    if key in values:
        return f"{key} = {toml_value(values[key])}"
    return f"# {key} =" if default is None else f"# {key} = {toml_value(default)}"


def _dataset(values: Mapping[str, Any]) -> Iterator[str]:
    yield from _comment(
        "The clips can stand in a file of their own, in musubi-tuner's schema, instead of the "
        "[[dataset.sources]] below."
    )
    file = values.get("file")
    yield f"file = {toml_value(file)}" if file is not None else "# file ="
    if file is not None:
        return
    if general := values.get("general"):
        yield ""
        yield from _comment("Keys that hold for every source that does not set them itself.")
        yield "[dataset.general]"
        yield from (f"{key} = {toml_value(value)}" for key, value in general.items())
    if "sources" in values:
        yield from _sources("dataset.sources", values["sources"])
        return
    given = {"resolution": [832, 480], "enable_bucket": True, **dict(values)}
    if not any(key in given for key in MEDIA_KEYS):
        given = {"video_directory": "clips", "target_frames": [33], **given}
    yield from _sources("dataset.sources", [given])


def _sources(name: str, sources: Any) -> Iterator[str]:
    """Yield the tables of clips; what a key means is told in the first one."""
    if not sources:
        return
    yield ""
    yield from _comment("One table a folder or list. Each clip's caption lies beside it.")
    first, *others = sources
    yield f"[[{name}]]"
    for key, field in SourceOptions.model_fields.items():
        yield from _option(key, field, first)
    for source in others:
        yield f"\n[[{name}]]"
        yield from (f"{key} = {toml_value(value)}" for key, value in source.items())


def _prompts(prompts: Any) -> Iterator[str]:
    yield ""
    yield from _comment(
        "What to sample, one table a prompt. Further keys: "
        + ", ".join(key for key in Prompt.model_fields if key != "prompt")
        + "."
    )
    if not prompts:
        yield "# [[sampling.prompts]]"
        yield '# prompt = "a cat walks through wet grass"'
    for prompt in prompts:
        yield "[[sampling.prompts]]"
        yield from (f"{key} = {toml_value(value)}" for key, value in prompt.items())


def _techniques(techniques: Any) -> Iterator[str]:
    yield ""
    yield from _comment("Optional behaviour of the training step, any number, in this order.")
    used = {technique.get("name") for technique in techniques}
    for technique in techniques:
        yield "[[techniques]]"
        yield from (f"{key} = {toml_value(value)}" for key, value in technique.items())
    for entry in PLUGIN_KINDS["technique"]:
        if entry.name in used:
            continue
        yield from _comment(f"{entry.name}: {entry.summary}")
        yield "# [[techniques]]"
        yield f"# name = {toml_value(entry.name)}"
        for key, spec in plugin_schemas()["technique"][entry.name].get("properties", {}).items():
            yield _assignment(key, {}, spec.get("default"))


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text.strip("\n"), WIDTH - 2, break_on_hyphens=False):
        yield f"# {line}"


def _choices(key: str, annotation: Any) -> tuple[str, ...]:
    if key == "solver":
        return SOLVERS.names
    if key == "schedule":
        return SCHEDULES.names
    if key == "variant":
        return ("auto", *VARIANTS)
    parts = (annotation, *get_args(annotation))
    found = [part for part in parts if get_origin(part) is Literal]
    others = [part for part in parts[1:] if part not in found and part is not type(None)]
    if found and (found[0] is annotation or not others):
        return tuple(str(choice) for choice in get_args(found[0]))
    return ()  # a word among numbers: the option's own text says so


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value
