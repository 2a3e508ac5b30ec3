"""Draws docs/pictures/*.svg from the real app: `python tests/app/pictures.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
PICTURES = HERE.parents[2] / "docs" / "pictures"
SIZE = (100, 30)
FONT = "DejaVu Sans Mono"
"""Has the dots of the curves; the picture loads nothing from elsewhere."""


def self_contained(picture: str) -> str:
    """Return the SVG without the web font that it would load, and always with the same ids."""
    without_font = re.sub(r"@font-face\s*\{.*?\}\s*", "", picture, flags=re.DOTALL)
    return re.sub(r"terminal-\d+", "terminal", without_font.replace("Fira Code", FONT))


def main() -> None:
    """Write all pictures."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]
    from scenes import SCENES, show

    from app.tui.theme import DARK

    PICTURES.mkdir(exist_ok=True)
    for scene in SCENES:
        _, picture = show(scene, SIZE, DARK.name)
        path = PICTURES / f"{scene.name}.svg"
        path.write_text(self_contained(picture), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
