"""Reads prompt files: one prompt a line (musubi-tuner's flags), TOML, or JSON."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract.config import Prompt
from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.registry import nearest
from trainer.contract.toml_lines import key_lines, locate

FLAGS: Mapping[str, str] = {
    "w": "width",
    "h": "height",
    "f": "num_frames",
    "d": "seed",
    "s": "num_steps",
    "l": "guidance_scale",
    "fs": "flow_shift",
    "n": "negative_prompt",
    "i": "image",
    "ei": "last_image",
    "cn": "control",
    "v2v": "video",
    "st": "strength",
    "so": "solver",
    "sc": "schedule",
}
"""musubi-tuner's flag after a prompt, or one of our own -> key of `Prompt`."""

_FOREIGN_FLAGS = {
    "g": "Wan has no embedded guidance; classifier-free guidance is --l",
    "ci": "one-frame control images are not for the models Menma samples",
    "of": "one-frame options are not for the models Menma samples",
}
_FLAG = re.compile(r"(?:^|\s)--(?=[^\s-])")


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read all prompts of a file.

    .txt: one prompt a line, `#` starts a comment line, flags follow the prompt
    (`a cat --w 832 --h 480 --f 81 --d 7`; see `FLAGS`). .toml: `[[prompts]]` tables with the
    keys of `Prompt`. .json: a list of such objects or of plain texts. Paths in it count from the
    current folder, as everywhere.

    Raises:
        ConfigError: everything that is wrong with the file, with lines.
    """
    readers = {".txt": _from_text, ".toml": _from_toml, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path} is not a prompt file", hint=f"known endings: {', '.join(readers)}"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"prompt file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="it must be UTF-8 text") from error
    problems: list[Problem] = []
    prompts = tuple(reader(path, text, problems))
    if problems:
        raise ConfigError(problems=problems)
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts


def parse_prompt_line(line: str) -> Prompt:
    """Parse one prompt with musubi-tuner's flags.

    Raises:
        ConfigError: everything that is wrong with the line.
    """
    problems: list[Problem] = []
    fields = _fields_of_line(line, problems)
    if not problems:
        try:
            return Prompt.model_validate(fields)
        except ValidationError as error:
            problems = [_with_flag(problem) for problem in problems_of(error, Prompt)]
    raise ConfigError(problems=problems)


def _from_text(path: Path, text: str, problems: list[Problem]) -> Iterator[Prompt]:
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            yield parse_prompt_line(stripped)
        except ConfigError as error:
            problems += [Problem(p.message, p.key, path, number, p.hint) for p in error.problems]


def split_prompt_line(line: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the text of a prompt, and its flags (without `--`) with their values."""
    prompt, *parts = (part.strip() for part in _FLAG.split(line.strip()))
    flags = [(flag, value.strip()) for flag, _, value in (part.partition(" ") for part in parts)]
    return prompt, flags


def _fields_of_line(line: str, problems: list[Problem]) -> dict[str, str]:
    prompt, flags = split_prompt_line(line)
    fields = {"prompt": prompt}
    if not prompt:
        problems.append(Problem("no text before the first flag", hint="write the prompt first"))
    for flag, value in flags:
        if flag not in FLAGS:
            known = [f"--{name}" for name in FLAGS]
            hint = _FOREIGN_FLAGS.get(flag) or nearest(f"--{flag}", known)
            problems.append(Problem("unknown flag", f"--{flag}", hint=hint))
        elif FLAGS[flag] in fields:
            problems.append(Problem("given twice", f"--{flag}"))
        elif not value and flag != "n":
            problems.append(Problem("no value", f"--{flag}"))
        else:
            fields[FLAGS[flag]] = value
    return fields


def _with_flag(problem: Problem) -> Problem:
    flags = {key: f"--{flag}" for flag, key in FLAGS.items()}
    return Problem(problem.message, flags.get(problem.key, problem.key), hint=problem.hint)


def _from_toml(path: Path, text: str, problems: list[Problem]) -> Iterator[Prompt]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    lines = key_lines(text)
    found: list[Problem] = [
        Problem("unknown key", key, hint=nearest(key, ["prompts"]))
        for key in content
        if key != "prompts"
    ]
    yield from _from_list(content.get("prompts", []), "prompts", found)
    problems += [Problem(p.message, p.key, path, locate(p.key, lines), p.hint) for p in found]


def _from_json(path: Path, text: str, problems: list[Problem]) -> Iterator[Prompt]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not a list of prompts, but nested without end") from None
    found: list[Problem] = []
    yield from _from_list(content, "", found)
    problems += [Problem(p.message, p.key, path, hint=p.hint) for p in found]


def _from_list(items: Any, name: str, problems: list[Problem]) -> Iterator[Prompt]:
    if not isinstance(items, list):
        problems.append(Problem("must be a list of prompts", name))
        return
    for index, item in enumerate(items):
        fields = {"prompt": item} if isinstance(item, str) else item
        try:
            yield Prompt.model_validate(fields)
        except ValidationError as error:
            problems += problems_of(error, Prompt, f"{name}[{index}]")
