"""From files and command lines to the keys of one trainer, recognised by what is in them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.domain.importing.command_lines import Command, find_commands
from app.domain.importing.values import split_arguments
from trainer.contract.errors import UserError

Tool = Literal["musubi", "takenoko", "diffusion-pipe", "simpletuner"]
TOOLS: tuple[Tool, ...] = ("musubi", "takenoko", "diffusion-pipe", "simpletuner")

ARGUMENT_LISTS = ("optimizer_args", "network_args", "lr_scheduler_args", "optimizer_config")
"""Options whose values are `key=value` texts; each of these is a key of its own."""
_TRAIN = re.compile(r"(?:wan|hv|fpack|flux\w*|qwen\w*|zimage|kandinsky\w*)_train(?:_network)?$")
_CACHE = re.compile(r"wan_cache_(?:latents|text_encoder_outputs)$")
_MUSUBI_KEYS = frozenset({
    "dit", "network_module", "network_dim", "network_alpha", "optimizer_type", "timestep_sampling",
    "discrete_flow_shift", "fp8_base", "sdpa", "dataset_config", "max_train_steps",
    "blocks_to_swap",
    "max_train_epochs", "output_name", "lr_scheduler", "network_args", "optimizer_args", "task",
    "save_every_n_steps", "save_every_n_epochs", "mixed_precision", "learning_rate", "t5", "vae",
})  # fmt: skip
_SIMPLETUNER_KEYS = frozenset({
    "model_family", "model_type", "data_backend_config", "pretrained_model_name_or_path",
    "lora_rank", "train_batch_size", "model_flavour", "lora_type", "checkpointing_steps",
    "validation_prompt", "optimizer", "num_train_epochs", "max_train_steps", "learning_rate",
})  # fmt: skip


_ENVIRONMENT = {
    "model_name": "pretrained_model_name_or_path",
    "dataloader_config": "data_backend_config",
    "lr_schedule": "lr_scheduler",
    "num_epochs": "num_train_epochs",
    "max_num_steps": "max_train_steps",
    "checkpointing_limit": "checkpoints_total_limit",
    "training_seed": "seed",
    "instance_dir": "instance_data_dir",
}
"""Names in SimpleTuner's config.env -> its options, where they are not the same."""


@dataclass(slots=True)
class Input:
    """The keys of one trainer."""

    tool: Tool
    values: dict[str, Any] = field(default_factory=dict)
    """Flat: `network_dim`, `optimizer.lr`, `datasets[0].resolution`."""
    origins: dict[str, str] = field(default_factory=dict)
    """Key -> file."""
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, values: Mapping[str, Any], path: Path | None, *, over: bool = True) -> None:
        """Take keys of a file; `over`: they win over those that are there."""
        for key, value in values.items():
            if over or key not in self.values:
                self.values[key] = value
                self.origins[key] = str(path) if path is not None else ""


@dataclass(frozen=True, slots=True)
class _Document:
    path: Path | None
    content: Any
    """Parsed TOML or JSON, or a list of commands."""
    tool: Tool
    part: Literal["options", "dataset", "commands"]


def read_input(files: Sequence[Path], command: str | None, tool: Tool | None) -> Input:
    """Read files and a command line, and the files that they name.

    Args:
        files: in any order: options, datasets, scripts.
        command: a command line, as one would type it.
        tool: the trainer; None: found out.

    Raises:
        UserError: something cannot be read, is of no known trainer, or of several.
    """
    documents = [_document(path, tool) for path in files]
    if command is not None:
        documents.append(_of_commands(None, command, tool))
    if not documents:
        raise UserError("nothing to import", hint="give a FILE, or --command")
    tools = list(dict.fromkeys(document.tool for document in documents))
    if len(tools) > 1:
        raise UserError(
            f"the files are of several trainers: {', '.join(tools)}",
            hint="import them one at a time, or say which one with --from",
        )
    found = Input(tools[0], files=list(files))
    given = {document.part for document in documents}
    for document in sorted(documents, key=lambda d: d.part == "commands"):  # these win
        _take(found, document, follow="dataset" not in given)
    _expand_arguments(found)
    return found


def read_text(path: Path) -> str:
    """Return a file as text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", hint="it must be UTF-8 text") from None


def _document(path: Path, tool: Tool | None) -> _Document:
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _of_json(path, text, tool)
    if suffix == ".env":
        return _Document(path, _of_env(text), "simpletuner", "options")
    if suffix in {".sh", ".bat", ".cmd", ".ps1", ".txt", ""}:
        return _of_commands(path, text, tool)
    if suffix != ".toml":
        raise UserError(
            f"{path} is of no kind that can be imported",
            hint="known endings: .toml .json .env .sh .bat .cmd .ps1",
        )
    content = _toml(path, text)
    return _Document(path, content, *_recognise_toml(path, content, tool))


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _recognise_toml(
    path: Path, content: Mapping[str, Any], tool: Tool | None
) -> tuple[Tool, Literal["options", "dataset"]]:
    datasets = content.get("datasets")
    if tool == "simpletuner":
        raise UserError(f"{path}: SimpleTuner's configs are .json and .env files")
    if "directory" in content and isinstance(content["directory"], list):
        return "diffusion-pipe", "dataset"
    model = content.get("model")
    if isinstance(model, dict) and ("type" in model or tool == "diffusion-pipe"):
        kind = model.get("type", "wan")
        if kind != "wan":
            raise UserError(f"{path} trains {kind!r}, and Menma trains Wan")
        return "diffusion-pipe", "options"
    if isinstance(datasets, dict) or "target_model" in content or tool == "takenoko":
        return "takenoko", "options"
    if isinstance(datasets, list) or set(content) <= {"general", "datasets"} & set(content):
        return "musubi", "dataset" if not _MUSUBI_KEYS & set(content) else "options"
    if tool == "musubi" or _MUSUBI_KEYS & set(_flattened(content)):
        return "musubi", "options"
    raise UserError(
        f"{path}: no trainer that Menma knows writes this",
        hint=f"say which one it is: --from {'|'.join(TOOLS)}",
    )


def _of_json(path: Path, text: str, tool: Tool | None) -> _Document:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return _Document(path, content, "simpletuner", "dataset")
    if isinstance(content, dict):
        plain = {str(key).lstrip("-").replace("-", "_"): value for key, value in content.items()}
        if tool == "simpletuner" or _SIMPLETUNER_KEYS & set(plain):
            return _Document(path, plain, "simpletuner", "options")
    raise UserError(
        f"{path}: neither SimpleTuner's config.json nor its multidatabackend.json",
        hint="say --from simpletuner if it is",
    )


def _of_env(text: str) -> dict[str, Any]:
    """Return the options of SimpleTuner's config.env: `export LEARNING_RATE=1e-4`."""
    values: dict[str, Any] = {}
    for line in text.splitlines():
        match = re.match(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$", line)
        if match is None or line.lstrip().startswith("#"):
            continue
        value = re.sub(r"\s+#.*$", "", match[2]).strip().strip("\"'")
        if match[1] == "TRAINER_EXTRA_ARGS":
            found = find_commands(f"python train.py {value}")
            values |= found[0].options if found else {}
        else:
            name = match[1].lower()
            values[_ENVIRONMENT.get(name, name)] = value
    return values


def _of_commands(path: Path | None, text: str, tool: Tool | None) -> _Document:
    where = str(path) if path is not None else "--command"
    commands = find_commands(text)
    if path is None and not commands and text.lstrip().startswith("-"):
        commands = find_commands(f"wan_train_network.py {text}")
    others = [c.script for c in commands if _TRAIN.search(c.script)]
    if any(not script.startswith("wan_") for script in others):
        raise UserError(f"{where} trains with {others[0]}.py, and Menma trains Wan")
    known = [c for c in commands if _TRAIN.search(c.script) or _CACHE.search(c.script)]
    if not known:
        raise UserError(
            f"{where}: no command of musubi-tuner's Wan scripts is in it",
            hint="wan_train_network.py, wan_train.py, wan_cache_latents.py, "
            "wan_cache_text_encoder_outputs.py",
        )
    if tool not in (None, "musubi"):
        raise UserError(f"{where} calls musubi-tuner's scripts, not {tool}'s")
    return _Document(path, known, "musubi", "commands")


def _take(found: Input, document: _Document, *, follow: bool) -> None:
    if document.part == "commands":
        _take_commands(found, document)
    elif document.tool == "musubi" and document.part == "dataset":
        found.add(_dataset_keys(document.content, "datasets"), document.path)
    elif document.tool == "musubi":
        found.add(_flattened(document.content), document.path)
    elif document.tool == "takenoko":
        _take_takenoko(found, document)
    elif document.tool == "diffusion-pipe":
        _take_diffusion_pipe(found, document)
    elif document.part == "dataset":
        found.add(_listed(document.content, "backends"), document.path)
    else:
        found.add(document.content, document.path)
    if follow:
        _follow(found, document)


def _follow(found: Input, document: _Document) -> None:
    """Read the dataset that the options name, if it can be found."""
    key = {"musubi": "dataset_config", "diffusion-pipe": "dataset",
           "simpletuner": "data_backend_config"}.get(document.tool)  # fmt: skip
    name = found.values.get(key) if key is not None else None
    if not isinstance(name, str) or document.part == "dataset":
        return
    path = find_beside(name, document.path)
    if path is None:
        found.notes.append(f"{key} {name} was not found; give it to the import, too")
        return
    if path in found.files:
        return
    try:
        dataset = _document(path, document.tool)
    except UserError as error:
        found.notes.append(f"{key} {name} could not be read: {error.message}")
        return
    if dataset.part == "dataset":
        found.files.append(path)
        _take(found, dataset, follow=False)


def find_beside(name: str, path: Path | None) -> Path | None:
    """Return a file named in another one: as it is, or beside that one, or above it."""
    places = [Path(name).expanduser()]
    if path is not None and not places[0].is_absolute():
        places += [path.parent / name, path.parent.parent / name]
    return next((place for place in places if place.is_file()), None)


def _take_commands(found: Input, document: _Document) -> None:
    training = [c for c in document.content if _TRAIN.search(c.script)]
    if len(training) > 1:
        found.notes.append(
            f"{len(training)} training commands: the first one is imported; give the others "
            "one by one with --command"
        )
    for command in document.content:
        if _CACHE.search(command.script):
            values = {f"{command.script}.{key}": value for key, value in command.options.items()}
            found.add(values, document.path, over=False)
    for command in training[:1]:
        _take_options_file(found, command, document.path)
        found.add(command.options, document.path)
        launcher = {f"accelerate.{key}": value for key, value in command.launcher.items()}
        found.add(launcher, document.path)
        if command.script == "wan_train" and "network_module" not in found.values:
            found.add({"network_module": "networks.wan_finetune"}, document.path)
            found.notes.append('wan_train.py trains the whole model: adapter.kind = "none"')
    cached = "wan_cache_latents.dataset_config"
    if cached in found.values and "dataset_config" not in found.values:
        found.add({"dataset_config": found.values[cached]}, document.path)


def _take_options_file(found: Input, command: Command, path: Path | None) -> None:
    name = command.options.get("config_file")
    if not isinstance(name, str):
        return
    full = name if name.endswith(".toml") else f"{name}.toml"
    file = find_beside(full, path)
    if file is None:
        found.notes.append(f"config_file {name} was not found; give it to the import, too")
        return
    if file not in found.files:
        found.files.append(file)
        found.add(_flattened(_toml(file, read_text(file))), file, over=False)


def _take_takenoko(found: Input, document: _Document) -> None:
    content = dict(document.content)
    datasets = content.pop("datasets", {})
    if isinstance(datasets, list):
        datasets = {"train": datasets}
    values = _dataset_keys({"general": datasets.get("general", {}),
                            "datasets": datasets.get("train", [])}, "datasets")  # fmt: skip
    values |= _listed(datasets.get("val", []), "val")
    values |= _listed(content.pop("val_datasets", []), "val")
    for section, table in datasets.items():
        if section not in {"general", "train", "val"}:
            values |= _flattened_deep({section: table})
    prompts = content.pop("sample_prompts", None)
    if isinstance(prompts, list):
        values |= _listed(prompts, "sample_prompts")
    elif prompts is not None:
        values["sample_prompts"] = prompts
    found.add({**_flattened_deep(content), **values}, document.path)


def _take_diffusion_pipe(found: Input, document: _Document) -> None:
    content = dict(document.content)
    if document.part == "dataset":
        directories = content.pop("directory", [])
        values = {f"dataset.{key}": value for key, value in content.items()}
        found.add({**values, **_listed(directories, "directory")}, document.path)
        return
    values = {}
    for key, value in content.items():
        if isinstance(value, dict):
            values |= {f"{key}.{name}": part for name, part in value.items()}
        else:
            values[key] = value
    found.add(values, document.path)


def _dataset_keys(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    general = content.get("general", {})
    rest = {k: v for k, v in content.items() if k not in {"general", "datasets"}}
    values = {f"general.{key}": value for key, value in _table(general).items()}
    return {**values, **_listed(content.get("datasets", []), name), **_flattened(rest)}


def _listed(tables: Any, name: str) -> dict[str, Any]:
    """Return a list of tables flat: `name[0].key`."""
    found: dict[str, Any] = {}
    for index, table in enumerate(tables if isinstance(tables, list) else [tables]):
        if isinstance(table, dict):
            for key, value in table.items():
                if isinstance(value, dict) and value:
                    found |= {f"{name}[{index}].{key}.{k}": part for k, part in value.items()}
                else:
                    found[f"{name}[{index}].{key}"] = value
        else:
            found[f"{name}[{index}]"] = table
    return found


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys without their sections, which musubi-tuner ignores."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= value
        else:
            found[key] = value
    return found


def _flattened_deep(content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": part for name, part in _flattened_deep(value).items()}
        else:
            found[key] = value
    return found


def _expand_arguments(found: Input) -> None:
    """Make keys of their own of what stands in `optimizer_args` and the like."""
    for name in ARGUMENT_LISTS:
        raw = found.values.get(name)
        if not raw or raw is True:
            continue
        if isinstance(raw, str) and "," in raw and raw.count("=") > 1:
            raw = re.split(r",(?=\s*\w+=)", raw)
        parts: Iterable[Any] = raw if isinstance(raw, list) else [raw]
        arguments = split_arguments([part for p in parts for part in _spaced(p)])
        origin = found.origins.pop(name)
        found.values = {
            new: value
            for key, old in found.values.items()
            for new, value in (
                [(f"{name}.{k}", part) for k, part in arguments.items()]
                if key == name
                else [(key, old)]
            )
        }
        found.origins |= {f"{name}.{k}": origin for k in arguments}


def _spaced(argument: Any) -> list[str]:
    """Return `a=1 b=2` as two arguments."""
    text = str(argument).strip()
    return re.split(r"\s+(?=\w+=)", text) if text else []
