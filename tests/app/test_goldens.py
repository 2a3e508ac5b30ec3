"""Every screen, character by character; `MENMA_GOLDENS=write pytest` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scenes import SCENES, Scene, show

GOLDENS = Path(__file__).with_name("goldens")
SIZES = ((80, 24), (120, 40))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_screen_is_as_it_was(scene: Scene, size: tuple[int, int]) -> None:
    text, picture = show(scene, size)
    lines = text.splitlines()
    assert len(lines) <= size[1]
    assert all(len(line) <= size[0] for line in lines)
    golden = GOLDENS / f"{scene.name}-{size[0]}x{size[1]}.txt"
    if os.environ.get("MENMA_GOLDENS") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text + "\n", encoding="utf-8")
        return
    if text + "\n" != golden.read_text(encoding="utf-8"):
        seen = golden.with_suffix(".seen.svg")
        seen.write_text(picture, encoding="utf-8")
        assert text + "\n" == golden.read_text(encoding="utf-8"), f"see {seen}"


def test_every_golden_is_of_a_scene() -> None:
    expected = {f"{scene.name}-{w}x{h}.txt" for scene in SCENES for w, h in SIZES}
    assert {path.name for path in GOLDENS.glob("*.txt")} == expected
