"""Reads prompt files: one prompt a line with flags, TOML, or JSON."""

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
from trainer.contract.prompt_keys import (
    REPEATABLE,
    flag_hint,
    key_hint,
    key_of,
    key_of_flag,
    may_be_empty,
    written_value,
)
from trainer.contract.registry import nearest
from trainer.contract.toml_lines import key_lines, locate

_FLAG = re.compile(r"(?:^|\s)--(?=[^\s-])")
_TABLES = ("prompts", "sample_prompts", "prompt")
"""Tables of prompts in TOML: Menma's, Takenoko's, and musubi-tuner's with its subsets."""


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read all prompts of a file.

    .txt: one prompt a line, `#` starts a comment line, flags follow the prompt
    (`a cat --w 832 --h 480 --f 81 --d 7 --solver euler`; see `prompt_keys`). .toml: tables
    `[[prompts]]`, `[[sample_prompts]]`, or `[prompt]` with its `[[prompt.subset]]`. .json: a list
    of such tables or of plain texts, or a library `{nickname: prompt}`. Paths in it count from the
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
    given: dict[str, str] = {}
    fields = _fields_of_line(line, problems, given)
    if not problems:
        try:
            return Prompt.model_validate(fields)
        except ValidationError as error:
            problems = [_with_flag(problem, given) for problem in problems_of(error, Prompt)]
    raise ConfigError(problems=problems)


def _from_text(path: Path, text: str, problems: list[Problem]) -> Iterator[Prompt]:
    # Not `splitlines`: a prompt from a web page may have a U+2028 in it, which ends no line here.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
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


def _fields_of_line(line: str, problems: list[Problem], given: dict[str, str]) -> dict[str, Any]:
    """Return the fields of a line; `given` takes the flag that each key was written with."""
    prompt, flags = split_prompt_line(line)
    fields: dict[str, Any] = {"prompt": prompt}
    if not prompt:
        problems.append(Problem("no text before the first flag", hint="write the prompt first"))
    for flag, value in flags:
        key = key_of_flag(flag)
        if key is None:
            problems.append(Problem("unknown flag", f"--{flag}", hint=flag_hint(flag)))
        elif key in fields and key in REPEATABLE:
            fields[key] += written_value(key, value)
        elif key in fields:
            other = "" if given[key] == flag else f" (--{given[key]} is the same)"
            problems.append(Problem(f"given twice{other}", f"--{flag}"))
        elif not value and not may_be_empty(key):
            problems.append(Problem("no value", f"--{flag}"))
        else:
            fields[key] = written_value(key, value)
            given[key] = flag
    return fields


def _with_flag(problem: Problem, given: Mapping[str, str]) -> Problem:
    flag = given.get(problem.key.partition("[")[0].partition(".")[0])
    return Problem(problem.message, f"--{flag}" if flag else problem.key, hint=problem.hint)


def _from_toml(path: Path, text: str, problems: list[Problem]) -> Iterator[Prompt]:
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number without end, or tables in each other
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    lines = key_lines(text)
    found: list[Problem] = [
        Problem("unknown key", key, hint=nearest(key, _TABLES))
        for key in content
        if key not in _TABLES
    ]
    yield from prompts_of_tables(content, found)
    problems += [Problem(p.message, p.key, path, locate(p.key, lines), p.hint) for p in found]


def prompts_of_tables(content: Mapping[str, Any], problems: list[Problem]) -> Iterator[Prompt]:
    """Yield the prompts of a parsed TOML file; `problems` takes what is wrong with them."""
    for name in _TABLES:
        if name in content:
            items = content[name]
            if name == "prompt":
                items, name = _subsets(items), "prompt.subset"  # noqa: PLW2901
            yield from _from_list(items, name, problems)


def _subsets(table: Any) -> Any:
    """Return the prompts of musubi-tuner's `[prompt]`: what is in it holds for all its subsets."""
    if not isinstance(table, dict) or not isinstance(table.get("subset", []), list):
        return table
    common = {key: value for key, value in table.items() if key != "subset"}
    return [
        {**common, **part} if isinstance(part, dict) else part for part in table.get("subset", [{}])
    ]


def _from_json(path: Path, text: str, problems: list[Problem]) -> Iterator[Prompt]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except ValueError as error:  # a number without end
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not a list of prompts, but nested without end") from None
    found: list[Problem] = []
    if isinstance(content, dict):
        yield from _from_library(content, found)
    else:
        yield from _from_list(content, "", found)
    problems += [Problem(p.message, p.key, path, hint=p.hint) for p in found]


def _from_library(library: Mapping[str, Any], problems: list[Problem]) -> Iterator[Prompt]:
    for nickname, item in library.items():
        yield from _prompt(item, nickname, problems, {"name": nickname})


def _from_list(items: Any, name: str, problems: list[Problem]) -> Iterator[Prompt]:
    if not isinstance(items, list):
        problems.append(Problem("must be a list of prompts", name))
        return
    for index, item in enumerate(items):
        yield from _prompt(item, f"{name}[{index}]", problems, {})


def _prompt(
    item: Any, place: str, problems: list[Problem], fields: dict[str, Any]
) -> Iterator[Prompt]:
    """Yield the prompt that a table or a text is, if it is right.

    Args:
        item: the table or text.
        place: what it is called in messages.
        problems: takes what is wrong with it.
        fields: what it has already; it wins over them.
    """
    if not isinstance(item, str | dict):
        problems.append(Problem(f"must be a text or a table, not {item!r:.80}", place))
        return
    written = {"prompt": item} if isinstance(item, str) else item
    spelled: dict[str, str] = {}
    before = len(problems)
    for name, value in written.items():
        key = key_of(name)
        if key is None:
            problems.append(Problem("unknown key", f"{place}.{name}", hint=key_hint(name)))
        elif key in spelled:
            problems.append(Problem(f"given twice ({spelled[key]} is the same)", f"{place}.{name}"))
        else:
            spelled[key] = name
            fields[key] = value
    if len(problems) > before:
        return
    try:
        yield Prompt.model_validate(fields)
    except ValidationError as error:
        for problem in problems_of(error, Prompt):
            key = spelled.get(problem.key, problem.key)
            problems.append(Problem(problem.message, f"{place}.{key}", hint=problem.hint))
