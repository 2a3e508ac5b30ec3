"""Where a run's end is told: an address, or the environment variable that holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping

_ADDRESS = re.compile(r"https?://[^\s/]+\S*")
_VARIABLE = re.compile(r"env:([A-Za-z_][A-Za-z0-9_]*)")


def is_webhook(value: str) -> bool:
    """Tell whether `logging.webhook` can be used."""
    return bool(_ADDRESS.fullmatch(value) or _VARIABLE.fullmatch(value))


def address_of(value: str, environment: Mapping[str, str]) -> str | None:
    """Return the address; None where the variable is not set, or holds something else."""
    variable = _VARIABLE.fullmatch(value)
    address = environment.get(variable[1], "") if variable else value
    return address if _ADDRESS.fullmatch(address) else None
