"""Where a user's own files are: what they write, and what the app remembers."""

from __future__ import annotations

import os
from pathlib import Path


def config_folder() -> Path:
    """Return the folder of what the user writes: `$XDG_CONFIG_HOME/menma` (~/.config)."""
    from trainer.contract.config_io import presets_dirs  # pydantic, which a queue does not need

    return presets_dirs()[0].parent


def state_folder() -> Path:
    """Return the folder of what programs keep: `$XDG_STATE_HOME/menma` (~/.local/state)."""
    if os.name == "nt":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        root = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return root / "menma"
