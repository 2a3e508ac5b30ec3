"""What the app remembers from one time to the next: the theme that was chosen by a key."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from app.domain.user_folders import state_folder
from trainer.contract.errors import DiskError
from trainer.contract.files import write_json


def memory_file() -> Path:
    """Return where it is kept."""
    return state_folder() / "app.json"


def remembered_theme() -> str:
    """Return the name of the theme that was chosen last; empty: none."""
    try:
        theme = json.loads(memory_file().read_text(encoding="utf-8"))["theme"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return theme if isinstance(theme, str) else ""


def remember_theme(name: str) -> None:
    """Keep the name of a theme; a disk that cannot be written forgets it, and nothing else."""
    with suppress(DiskError, OSError):
        write_json(memory_file(), {"theme": name})
