"""What a sheet of samples varies: axes on the command line and in matrix files. No torch."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from trainer.contract.config import Prompt
from trainer.contract.config_io import problems_of
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.options import Options
from trainer.contract.prompt_keys import SPELLINGS, key_of, written_value
from trainer.contract.prompts import prompts_of_tables
from trainer.contract.registry import nearest
from trainer.contract.toml_lines import key_lines, locate

PROMPT = "prompt"
LORA = "lora"
"""Axis: strength of all LoRAs of the command; `lora:FILE` of one file."""
CHECKPOINT = "checkpoint"
"""Axis: output files, one (of two experts: one pair) at a time."""
NO_CHECKPOINT = "none"
"""A value of `checkpoint`: the base model without any."""
MAX_CELLS = 5000
_RANGE = re.compile(r"\s*(\d{1,18})\.\.(\d{1,18})\s*")
_KEYS = ("vary", "prompts", "sample_prompts", "prompts_file", "columns")


class Axis(Options):
    """One thing that differs from cell to cell."""

    key: str
    """Key of a prompt, `lora`, `lora:FILE` or `checkpoint`."""
    values: tuple[str | int | float | bool, ...]
    """Its values, in the order of the sheet."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix file."""

    axes: tuple[Axis, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    prompts_file: Path | None = None
    columns: str | None = None


def parse_vary(text: str) -> Axis:
    """Read `KEY=VALUE,VALUE,…`; quotes hold a value with commas together, `1..4` counts.

    Raises:
        ConfigError: says what is wrong with it.
    """
    is_lora = text.lstrip().startswith(f"{LORA}:")  # the name of a file may have a = in it
    name, separator, values = text.rpartition("=") if is_lora else text.partition("=")
    if not separator or not values.strip():
        raise ConfigError(f"--vary {text}: no values", hint="e.g. --vary seed=1,2,3")
    try:
        (parts,) = csv.reader([values], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"--vary {text}: {error}", hint="quote a value with commas") from None
    key = _axis_key(name.strip())
    if key is None:
        raise ConfigError(f"--vary {text}: unknown key {name!r}", hint=_key_hint(name.strip()))
    found = [value for part in parts for value in _counted(key, part.strip())]
    return checked_axis(key, found, f"--vary {name}")


def read_matrix(path: Path) -> Matrix:
    """Read a matrix file: `[vary]` with lists of values, and prompts.

        columns = "seed"                # what differs from left to right; else the last key
        prompts_file = "prompts.txt"    # or [[prompts]] tables; else the command's, the config's
        [vary]
        seed = [1, 2, 3]
        "lora:cat.safetensors" = [0, 0.5, 1]
        checkpoint = ["runs/cat/output/*.safetensors"]

    Raises:
        ConfigError: everything that is wrong with it, with lines.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"matrix file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="it must be UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # a number without end, or tables in each other
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    lines = key_lines(text)
    problems: list[Problem] = [
        Problem("unknown key", key, hint=nearest(key, _KEYS)) for key in content if key not in _KEYS
    ]
    tables: dict[str, Any] = {
        key: content[key] for key in ("prompts", "sample_prompts") if key in content
    }
    prompts = tuple(prompts_of_tables(tables, problems))
    axes = tuple(_axes_of_table(content.get("vary", {}), problems))
    file, columns = content.get("prompts_file"), content.get("columns")
    for key, value in (("prompts_file", file), ("columns", columns)):
        if value is not None and not isinstance(value, str):
            problems.append(Problem(f"must be a text, not {value!r:.80}", key))
    if problems:
        placed = [Problem(p.message, p.key, path, locate(p.key, lines), p.hint) for p in problems]
        raise ConfigError(problems=placed)
    return Matrix(axes, prompts, None if file is None else Path(file), columns)


def _axes_of_table(table: Any, problems: list[Problem]) -> Iterator[Axis]:
    if not isinstance(table, dict):
        problems.append(Problem("must be a table of lists", "vary"))
        return
    for name, values in table.items():
        key, place = _axis_key(name), f"vary.{name}"
        if key is None:
            problems.append(Problem("unknown key", place, hint=_key_hint(name)))
        elif not isinstance(values, list):
            problems.append(Problem("must be a list of values", place))
        else:
            try:
                yield checked_axis(key, values, place)
            except ConfigError as error:
                problems += [Problem(p.message, place, hint=p.hint) for p in error.problems]


def checked_axis(key: str, values: Sequence[Any], place: str) -> Axis:
    """Return an axis whose values fit its key; patterns of files become the files.

    Args:
        key: of `Axis`.
        values: as read.
        place: what to call it in messages.

    Raises:
        ConfigError: a value does not fit, is there twice, or a file is missing.
    """
    if key == CHECKPOINT:
        found: list[Any] = [value for part in values for value in _files(str(part))]
    elif key == LORA or key.startswith(f"{LORA}:"):
        found = [_number(value, place) for value in values]
        if key != LORA:
            _require(lora_of(key)[0])
    else:
        found = [_value_of_prompt(key, value, place) for value in values]
    if not found:
        raise ConfigError(f"{place}: no values", hint="e.g. seed=1,2,3")
    twice = next((value for value in found if found.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{place}: {twice} is there twice", hint="give each value once")
    return Axis(key=key, values=tuple(found))


def check_axes(axes: Sequence[Axis], num_prompts: int = 1) -> None:
    """Refuse one thing on two axes, and sheets that nobody can look at.

    Raises:
        ConfigError: see there.
    """
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key} is varied twice", hint="give all its values at once")
    num = prod((len(axis.values) for axis in axes), start=num_prompts)
    if num > MAX_CELLS:
        raise ConfigError(
            f"this is a sheet of {num} samples; {MAX_CELLS} at most", hint="vary less at a time"
        )


def lora_of(key: str) -> tuple[Path, Literal["low_noise", "high_noise"] | None]:
    """Return the file of `lora:FILE[@EXPERT]`, and the expert."""
    name = key.removeprefix(f"{LORA}:")
    for expert in EXPERTS:
        if name.endswith(f"@{expert}"):
            return Path(name.removesuffix(f"@{expert}")), expert
    return Path(name), None


def pairs(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Return checkpoints: a file, or the files of both experts that differ in that word alone."""

    def place(path: Path) -> tuple[str, str]:
        return str(path.parent), re.sub(r"(high|low)_noise", "", path.name)

    order = {place(path): index for index, path in reversed(list(enumerate(paths)))}
    ordered = sorted(paths, key=lambda path: order[place(path)])
    return [tuple(sorted(group)) for _, group in groupby(ordered, key=place)]


def _axis_key(name: str) -> str | None:
    if name in {LORA, CHECKPOINT} or name.startswith(f"{LORA}:"):
        return name
    return key_of(name)


def _key_hint(name: str) -> str:
    return nearest(name, [*Prompt.model_fields, *SPELLINGS, LORA, "lora:FILE", CHECKPOINT])


def _counted(key: str, text: str) -> Iterator[Any]:
    match = _RANGE.fullmatch(text)
    if match is None or key == PROMPT:
        yield text
        return
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MAX_CELLS:
        raise ConfigError(f"{text}: from {first} up to {last} are no values, or too many")
    yield from range(first, last + 1)


def _value_of_prompt(key: str, value: Any, place: str) -> Any:
    given = written_value(key, value) if isinstance(value, str) else value
    try:
        prompt = Prompt.model_validate({"prompt": "a", key: given})
    except ValidationError as error:
        (first, *_) = problems_of(error, Prompt)
        raise ConfigError(f"{place}: {first.message}", hint=first.hint) from None
    found = getattr(prompt, key)
    if isinstance(found, str | int | float):
        return found
    if isinstance(found, tuple):
        return ",".join(map(str, found))
    return str(found) if isinstance(found, Path) else str(value)


def _number(value: Any, place: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: {value!r} is no strength") from None


def _files(pattern: str) -> Iterator[str]:
    if pattern == NO_CHECKPOINT:
        yield pattern
        return
    path = Path(pattern)
    if path.exists():
        yield str(path)
        return
    anchor = Path(path.anchor)
    try:
        found = sorted(anchor.glob(str(path.relative_to(anchor)))) if "*" in pattern else []
    except ValueError as error:
        raise ConfigError(f"checkpoint: {pattern}: {error}") from None
    if not found:
        raise ConfigError(f"checkpoint: no file {pattern}", hint=f"or {NO_CHECKPOINT!r}: the base")
    yield from map(str, found)


def _require(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"no such LoRA file: {path}")
