"""Values as other trainers write them, as plain values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


def as_is(value: Any) -> Any:
    """Return the value."""
    return value


def text(value: Any) -> str | None:
    """Return a text; None for an empty one.

    Raises:
        TypeError: it is a list or a table.
    """
    if isinstance(value, dict | list):
        raise TypeError("one text is expected")
    return str(value).strip() or None if value is not None else None


def number(value: Any) -> float | None:
    """Return a number, also from its text; None for none.

    Raises:
        ValueError: it is none.
        TypeError: it is something else altogether.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        raise TypeError("a number is expected, not true or false")
    found = float(value)
    if not math.isfinite(found):
        raise ValueError("a finite number is expected")
    return found


def whole(value: Any) -> int | None:
    """Return a whole number, also from its text; None for none.

    Raises:
        ValueError: it is none.
    """
    found = number(value)
    if found is None:
        return None
    if found != int(found):
        raise ValueError("a whole number is expected")
    return int(found)


def positive(value: Any) -> int | None:
    """Return a whole number; None for none and for 0, which means the same there."""
    return whole(value) or None


def flag(value: Any) -> bool:
    """Return a switch: what stands in TOML or JSON, or what a command line says.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    if value is None or word in {"none", ""}:
        return False
    raise ValueError("true or false is expected")


def is_on(value: Any) -> bool:
    """Tell whether a switch is on; what cannot be read counts as off."""
    try:
        return flag(value)
    except ValueError:
        return False


def several(value: Any) -> list[Any]:
    """Return a list: the value itself if it is one, else a list of it; nothing for none."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def numbers(value: Any) -> list[float]:
    """Return a list of numbers, also from `0.9,0.999` or `(0.9, 0.999)`.

    Raises:
        ValueError: one of them is none.
    """
    if isinstance(value, str):
        value = [part for part in re.split(r"[,;\s]+", value.strip(" ()[]")) if part]
    found = [number(part) for part in several(value)]
    if any(part is None for part in found):
        raise ValueError("numbers are expected")
    return [part for part in found if part is not None]


def words(value: Any) -> list[str]:
    """Return a list of texts, also from `a, b`."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    return [str(part) for part in several(value) if str(part)]


def literal(value: Any) -> Any:
    """Return what a text such as `0.9,0.999`, `1e-8`, `True` or `"a"` means; no code is run."""
    if not isinstance(value, str):
        return value
    word = value.strip()
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    if word.lower() in {"none", "null", ""}:
        return None
    if re.fullmatch(r"[+-]?\d+", word):
        return int(word)
    try:
        return numbers(word) if re.search(r"[,()\[\]]", word) else number(word)
    except ValueError:
        return word.strip("'\"")


def patterns(value: Any) -> list[str]:
    """Return regular expressions from a list, or from its text `['a.*', 'b']`."""
    if not isinstance(value, str):
        return [str(part) for part in several(value)]
    inner = value.strip()
    if not (inner.startswith("[") and inner.endswith("]")):
        return [inner] if inner else []
    found = re.findall(r"""r?'((?:[^'\\]|\\.)*)'|r?"((?:[^"\\]|\\.)*)\"""", inner)
    return [(single or double).replace("\\\\", "\\") for single, double in found]


def one_of(table: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a converter of words by a table (small letters).

    The converter raises ValueError for a word that is not in it.
    """

    def convert(value: Any) -> Any:
        word = str(value).strip().lower()
        if word not in table:
            raise ValueError(f"{value!r} is none of {', '.join(table)}")
        return table[word]

    return convert


def split_arguments(value: Any) -> dict[str, Any]:
    """Return `key=value` arguments as a table; one without `=` gets the value None."""
    found: dict[str, Any] = {}
    for argument in several(value):
        name, _, rest = str(argument).partition("=")
        if name.strip():
            found[name.strip()] = rest.strip() if "=" in str(argument) else None
    return found


def minutes(value: Any) -> float | None:
    """Return minutes as seconds."""
    found = number(value)
    return None if found is None else 60 * found
