"""The screens that goldens and pictures show: the keys that lead there, the words to wait for."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from screens import screen_text
from stage import staged
from textual.pilot import Pilot

from app.tui.app import MenmaApp

LOOKS = 1200
PAUSE_S = 0.05
CALM = 4
"""So many looks in a row must be the same before a screen counts as finished."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One screen or modal of the staged project."""

    name: str
    steps: tuple[tuple[str, str], ...]
    """Key to press (empty: none) and the words that must be seen then."""
    config: bool = False
    """The config is open from the start."""


MODEL = (("", "fish"), ("n", "weight files found"))
MARK_TWO = (("space", "* fish"), ("G", "fish"), ("k", "fish"), ("space", "* harbour"))
SCENES = (
    Scene("jobs", (("", "harbour"),)),
    Scene("monitor", (("", "fish"), ("enter", "412/600"))),
    Scene("metrics", (("", "fish"), ("enter", "412/600"), ("m", "Lower curve"))),
    Scene("samples", (("", "fish"), ("enter", "412/600"), ("v", "frame 1/1"))),
    Scene("compare", (("", "fish"), *MARK_TWO, ("equals_sign", "validation, best"))),
    Scene("error", (("", "fish"), ("G", "portrait: failed"), ("enter", "What to try"))),
    Scene("config", (("", "VRAM"),), config=True),
    Scene("presets", (("", "VRAM"), ("p", "GiB")), config=True),
    Scene("wizard-model", MODEL),
    Scene("wizard", (*MODEL, ("enter", "2/7"), ("enter", "12 clips, all captioned"))),
    Scene("data", (("", "VRAM"), ("4", "left out"), ("j", "frame 1 of 81")), config=True),
    Scene("library", (("", "fish"), ("5", "harbour.safetensors"))),
    Scene("system", (("", "fish"), ("6", "RTX 4090"))),
    Scene("command", (("", "fish"), ("c", "Command of fish"))),
)


def show(scene: Scene, size: tuple[int, int], theme: str = "") -> tuple[str, str]:
    """Return a scene as text and as SVG."""
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as sources:
        return asyncio.run(_show(scene, size, MenmaApp(sources, _config(scene)), theme))


def _config(scene: Scene) -> Path | None:
    return Path("configs/fish.toml") if scene.config else None


async def _show(scene: Scene, size: tuple[int, int], app: MenmaApp, theme: str) -> tuple[str, str]:
    async with app.run_test(size=size) as pilot:
        if theme:
            app.theme = theme
        for key, words in scene.steps:
            if key:
                await pilot.press(key)
            await _seen(pilot, app, words)
        text = await _calm(pilot, app)
        return text, app.export_screenshot(title="menma")


async def _seen(pilot: Pilot[None], app: MenmaApp, words: str) -> None:
    for _ in range(LOOKS):
        if words in (text := screen_text(app)):
            return
        await pilot.pause(PAUSE_S)
    raise AssertionError(f"{words!r} does not come:\n{text}")


async def _calm(pilot: Pilot[None], app: MenmaApp) -> str:
    """Wait until the screen stays as it is; return it."""
    text, same = "", 0
    for _ in range(LOOKS):
        now = screen_text(app)
        same = same + 1 if now == text else 0
        text = now
        if same >= CALM:
            return text
        await pilot.pause(PAUSE_S)
    raise AssertionError(f"the screen does not come to rest:\n{text}")
