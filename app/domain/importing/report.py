"""What became of every key of a foreign config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["carried", "renamed", "different", "unsupported", "unknown"]

STATUSES: dict[Status, str] = {
    "carried": "same key, same meaning",
    "renamed": "same meaning under another name",
    "different": "done in another way",
    "unsupported": "not carried over",
    "unknown": "no key that Menma knows of this trainer",
}


@dataclass(slots=True)
class Row:
    """One key of the input."""

    key: str
    """As it is named there; `datasets[0].resolution` in a table."""
    value: Any
    status: Status
    target: str = ""
    """Key of Menma's config; empty: nothing is written for it."""
    new_value: Any = None
    note: str = ""
    """Why it is done in another way, or not at all."""
    hint: str = ""
    """What to do."""
    file: str = ""
    """File the key stands in; empty: the command line."""

    @property
    def is_lost(self) -> bool:
        """Whether nothing of it is in the config."""
        return self.status in {"unsupported", "unknown"}


@dataclass(slots=True)
class DefaultRow:
    """A value that is written because the other trainer's default is not Menma's."""

    target: str
    value: Any
    key: str
    """The key that was left out."""


@dataclass(slots=True)
class Imported:
    """A foreign config as one of Menma's."""

    tool: str
    """Name of the trainer (`reading.TOOLS`)."""
    name: str
    """Name of the run."""
    text: str
    """The config, ready to be written."""
    rows: list[Row]
    defaults: list[DefaultRow]
    files: list[Path]
    """What was read."""
    notes: list[str] = field(default_factory=list)
    """What is to be done before the config can be used."""

    def counts(self) -> dict[str, int]:
        """Return how many keys there are of each status."""
        return {status: sum(row.status == status for row in self.rows) for status in STATUSES}

    def to_json(self, output: Path | None) -> dict[str, Any]:
        """Return plain values; `output` is where the config was written."""
        return {
            "from": self.tool,
            "name": self.name,
            "output": str(output) if output is not None else None,
            "files": [str(file) for file in self.files],
            "counts": self.counts(),
            "keys": [asdict(row) for row in self.rows],
            "defaults": [asdict(row) for row in self.defaults],
            "notes": self.notes,
        }
