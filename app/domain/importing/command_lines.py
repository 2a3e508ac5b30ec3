"""Command lines in shell scripts, batch files and PowerShell scripts, read and never run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

_CONTINUED = re.compile(r"[ \t]*[\\^`][ \t]*\r?\n[ \t]*")
_SH_SET = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)$")
_BAT_SET = re.compile(r"^\s*@?set\s+\"?([A-Za-z_]\w*)=([^\"\n]*)\"?\s*$", re.IGNORECASE)
_PS_SET = re.compile(r"^\s*\$(?:env:)?([A-Za-z_]\w*)\s*=\s*(.*)$")
_VARIABLE = re.compile(r"\$\{(?:env:)?(\w+)\}|\$(?:env:)?(\w+)|%(\w+)%")
_COMMENT = re.compile(r"^\s*(?:#|::|rem\b)", re.IGNORECASE)
_TOKEN = re.compile(r'(?:"((?:[^"\\]|\\.)*)"|\'([^\']*)\'|([^\s"\']+))')
_OPTION = re.compile(r"--?[A-Za-z]\w*(?:[-.]\w+)*")


@dataclass(frozen=True, slots=True)
class Command:
    """One call of a Python script."""

    script: str
    """File name without folder and `.py`."""
    options: dict[str, Any]
    """Name without dashes -> True for a lone switch, a text, or a list of texts."""
    launcher: dict[str, Any]
    """Options of `accelerate launch` and the like, before the script."""


def find_commands(text: str) -> list[Command]:
    """Return the calls of Python scripts in a text, in their order."""
    variables: dict[str, str] = {}
    commands: list[Command] = []
    for line in _CONTINUED.sub(" ", text).splitlines():
        if _COMMENT.match(line) or not line.strip():
            continue
        if assigned := _assignment(line):
            variables[assigned[0]] = _filled(assigned[1], variables)
            continue
        commands += _commands_of(_tokens(_filled(line, variables)))
    return commands


def _assignment(line: str) -> tuple[str, str] | None:
    for pattern in (_BAT_SET, _PS_SET, _SH_SET):
        match = pattern.match(line)
        if match and not re.search(r"\.py\b", match[2]):
            return match[1], match[2].strip().strip("\"'")
    return None


def _filled(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = next(part for part in match.groups() if part)
        return variables.get(name, match[0])

    return _VARIABLE.sub(value, text)


def _tokens(line: str) -> list[str]:
    """Split at spaces outside of quotes. A backslash is one: most are of Windows' paths."""
    tokens: list[str] = []
    end = -1
    for match in _TOKEN.finditer(line):
        double, single, bare = match.groups()
        part = double.replace('\\"', '"') if double is not None else single or bare or ""
        if match.start() == end:  # --name="a value": no space between the two
            tokens[-1] += part
        else:
            tokens.append(part)
        end = match.end()
    return tokens


def _commands_of(tokens: Sequence[str]) -> Iterator[Command]:
    rest = list(tokens)
    while rest:
        place = next((i for i, token in enumerate(rest) if _is_script(token)), None)
        if place is None:
            return
        end = next(
            (i for i in range(place + 1, len(rest)) if rest[i] in {"&&", ";", "||", "&"}), len(rest)
        )
        script = PurePosixPath(rest[place].replace("\\", "/")).name.removesuffix(".py")
        launcher = _options(rest[:place])
        yield Command(script, _options(rest[place + 1 : end]), launcher)
        rest = rest[end + 1 :]


def _is_script(token: str) -> bool:
    return token.endswith(".py") and not token.startswith("-")


def _options(tokens: Sequence[str]) -> dict[str, Any]:
    """Return options with their values; of one that is given twice the last counts."""
    options: dict[str, Any] = {}
    name = ""
    for token in tokens:
        option, equals, value = token.partition("=")
        if _OPTION.fullmatch(option) and not _is_number(token):
            name = option.lstrip("-").replace("-", "_")
            options[name] = value if equals else True
        elif name:
            before = options[name]
            if before is True:
                options[name] = token
            else:
                options[name] = [*(before if isinstance(before, list) else [before]), token]
    return options


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True
