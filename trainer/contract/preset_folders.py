"""Where presets are. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

PRESETS_DIR = Path(__file__).parents[2] / "presets"
"""The shipped ones."""


def config_folder() -> Path:
    """Return the folder of what the user writes: `$XDG_CONFIG_HOME/menma` (~/.config)."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "menma"


def presets_dirs() -> list[Path]:
    """Folders of presets: the user's first, then the shipped ones."""
    return [config_folder() / "presets", PRESETS_DIR]
