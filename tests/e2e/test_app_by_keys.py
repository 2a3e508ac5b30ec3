"""From the wizard to a training, a sample and a merge, by keys alone; real jobs, nano model."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open
from screens import screen_text
from textual.pilot import Pilot

from app.runs.state import State, read_state
from app.tui.app import MenmaApp
from app.tui.sources import Sources
from trainer.contract.run_dir import RunDir
from trainer.demo.clips import concept_scenes
from trainer.nano.scene_files import write_scenes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_processes")]
SIZE = (110, 36)
STEPS = 6
PATIENCE_S = 240.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with captioned clips and nothing else; no process is left in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("HOME", str(tmp_path))  # no weights of the user's are found
    write_scenes(concept_scenes(7)[0][:4], tmp_path / "clips")
    yield tmp_path
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(tmp_path)) and process.pid != os.getpid():
                process.kill()
        except psutil.Error:
            continue


class Hands:
    """Presses keys and reads the screen, and knows nothing else of the app."""

    def __init__(self, pilot: Pilot[None], app: MenmaApp) -> None:
        self._pilot, self._app = pilot, app

    async def press(self, *keys: str) -> None:
        await self._pilot.press(*keys)

    async def type(self, text: str) -> None:
        names = {" ": "space", "-": "minus", "/": "slash", ".": "full_stop", "_": "underscore"}
        for char in text:
            await self._pilot.press(names.get(char, char))

    async def retype(self, text: str) -> None:
        await self._pilot.press("end", *["backspace"] * 60)
        await self.type(text)

    async def see(self, *words: str) -> str:
        """Wait until all words are on the screen; return the screen."""
        end = time.monotonic() + PATIENCE_S
        while True:
            text = screen_text(self._app)
            if all(word in text for word in words):
                return text
            assert time.monotonic() < end, f"{words} do not come:\n{text}"
            await self._pilot.pause(0.1)

    async def go_to(self, words: str) -> None:
        """Go down the list, again and again, until words are on the screen."""
        end = time.monotonic() + PATIENCE_S
        for number in itertools.count():
            if words in screen_text(self._app):
                return
            assert time.monotonic() < end, f"{words} does not come:\n{screen_text(self._app)}"
            await self._pilot.press("j" if number % 8 else "g")

    async def state_of(self, name: str, kind: str) -> str:
        """Return the state that the list of jobs shows for one line."""
        for line in screen_text(self._app).splitlines():
            cells = line.split()
            if kind in cells and any(cell.startswith(name) for cell in cells):
                return line
        return ""

    async def done(self, name: str, kind: str) -> None:
        """Wait until a line of the list says that it is done."""
        end = time.monotonic() + PATIENCE_S
        while "+ done" not in (line := await self.state_of(name, kind)):
            bad = [word for word in ("failed", "lost", "blocked") if word in line]
            assert not bad, screen_text(self._app)
            assert time.monotonic() < end, screen_text(self._app)
            await self._pilot.pause(0.2)


def test_from_the_wizard_to_a_merged_model(home: Path) -> None:
    asyncio.run(_whole_way())
    run = RunDir(Path("runs/zorp"))
    state = read_state(run)
    assert (state.state, state.step) == (State.DONE, STEPS)
    lora = run.output / "zorp.safetensors"
    with safe_open(lora, "pt") as file:
        assert any("lora" in name for name in file.keys())  # noqa: SIM118  (not a dict)
    assert list(run.samples.rglob("*.mp4")), "the wizard's chain makes a sample"
    merged = run.output / "zorp-merged.safetensors"
    with safe_open(merged, "pt") as file:
        assert not any("lora" in name for name in file.keys())  # noqa: SIM118


async def _whole_way() -> None:
    app = MenmaApp(Sources(Path("runs")))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        hands = Hands(pilot, app)
        await hands.see("Nothing here yet")
        await _wizard(hands)
        await hands.see("KIND", "zorp")
        await hands.done("zorp", "train")
        await _curve(hands)
        await hands.press("1")
        await hands.done("zorp", "sample")
        await _from_the_library(hands)
        await hands.press("1")
        await hands.done("zorp", "merge")


async def _wizard(hands: Hands) -> None:
    await hands.press("n")
    await hands.see("Which model", "the demo model")
    await hands.press("end", "enter")
    await hands.see("What is the model to learn?")
    await hands.press("enter")
    await hands.see("Which folder")
    await hands.retype("clips")
    await hands.see("4 clips, all captioned")
    await hands.press("enter")
    await hands.see("Name, length")
    await hands.retype("zorp")
    await hands.press("tab")
    await hands.retype(str(STEPS))
    await hands.see("config: configs/zorp.toml")
    await hands.press("enter", "enter")  # past the prompt
    await hands.see("queue chain configs/zorp.toml", "run now")
    await hands.press("escape")
    await hands.see("Name, length", "zorp")  # back, and what was answered is still there
    await hands.press("enter", "enter", "enter")
    await hands.see("queue chain configs/zorp.toml", "run now")
    await hands.press("enter")


async def _curve(hands: Hands) -> None:
    await hands.go_to("menma train")  # what is said of the line that the cursor is on
    await hands.press("enter")
    text = await hands.see(f"step {STEPS}/{STEPS}", "loss")
    assert any(0x2800 < ord(char) < 0x2900 for char in text), "no curve is drawn"


async def _from_the_library(hands: Hands) -> None:
    await hands.press("5")
    await hands.see("zorp.safetensors")
    await hands.press("m")
    await hands.see("Queue this?", "merge")
    await hands.press("y")
    await hands.see("Queued as job")
