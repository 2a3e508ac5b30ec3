"""The app's screens, driven by keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from app_runs import Runs, wait_for
from screens import screen_text
from textual.pilot import Pilot

from app.domain import environment
from app.queue.jobs import JobSpec
from app.queue.store import QueueStore
from app.runs.state import State, read_state
from app.tui.app import MenmaApp
from app.tui.curve_view import SeriesCurve
from app.tui.overview import read_overview
from app.tui.screens import jobs as jobs_screen
from app.tui.screens import library as library_screen
from app.tui.screens.jobs import JobsScreen
from app.tui.sources import Sources
from app.tui.theme import THEMES
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir

SMALL, LARGE = (80, 24), (120, 40)
Steps = Callable[[Pilot, MenmaApp], Awaitable[None]]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> Sources:
    """Return an empty queue, and the folder of `runs`; no worker is started."""
    monkeypatch.setattr(jobs_screen, "ensure_worker", lambda folder: None)
    return Sources(tmp_path / "runs", tmp_path / "queue")


def drive(sources: Sources, steps: Steps, size: tuple[int, int] = SMALL) -> MenmaApp:
    """Open the app and do something in it."""

    async def work() -> MenmaApp:
        app = MenmaApp(sources)
        async with app.run_test(size=size) as pilot:
            await seen(pilot, app, "live")
            await steps(pilot, app)
        return app

    return asyncio.run(work())


async def seen(pilot: Pilot, app: MenmaApp, words: str) -> str:
    """Wait until words are on the screen; return the screen."""
    for _ in range(1200):
        text = screen_text(app)
        if words in text:
            return text
        await pilot.pause(0.05)
    raise AssertionError(f"{words!r} does not come:\n{text}")


async def true(pilot: Pilot, what: Callable[[], object]) -> None:
    """Wait until something is so."""
    for _ in range(1200):
        if what():
            return
        await pilot.pause(0.05)
    raise AssertionError("waited in vain")


def finished_run(folder: Path, name: str = "fish", steps: int = 50) -> RunDir:
    run = RunDir(folder / name)
    emit = EventWriter(run.events)
    for step in range(1, steps + 1):
        emit(
            "step", step=step, total_steps=steps, loss=1 / step, lr=1e-4, grad_norm=0.5,
            step_time_s=2.5, eta_s=0.0, epoch=step / 10, rss_gib=3.25,
        )  # fmt: skip
    emit("validation", step=steps, loss=0.125)
    emit("warning", message="it is warm")
    emit("end", reason="done", step=steps)
    run.command.write_text(json.dumps({"argv": ["menma", "train", "a b.toml"], "cwd": "/x y"}))
    return run


def add(sources: Sources, *names: str) -> list[int]:
    assert sources.store is not None
    return [
        sources.store.add(JobSpec(argv=("cache", f"{name}.toml"), name=name, cwd=Path("/tmp")))
        for name in names
    ]


def names(sources: Sources) -> list[str]:
    return [entry.name for entry in sources.overview().entries]


def test_an_empty_list_says_what_to_do(folders):
    async def steps(pilot, app):
        text = await seen(pilot, app, "Nothing here yet")
        assert "n makes a training" in text

    drive(folders, steps)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_runs_and_jobs_are_one_list(folders, size):
    finished_run(folders.runs_dir)
    add(folders, "first", "second")

    async def steps(pilot, app):
        await seen(pilot, app, "fish")
        await seen(pilot, app, "Stop")  # the footer
        text = await seen(pilot, app, "menma cache first.toml")  # the last that is laid out
        lines = [line.split() for line in text.splitlines()]
        assert lines[1] == ["ID", "KIND", "NAME", "STATE", "STEP", "ETA", "GPU", "LOSS"]
        assert lines[2][:5] == ["1", "cache", "first", ".", "queued"]
        assert lines[4] == ["train", "fish", "+", "done", "50/50", "0.0200"]
        assert all(len(line) <= size[0] for line in text.splitlines())
        assert text.rstrip().splitlines()[-1].split()[:2] == ["S", "Stop"]

    drive(folders, steps, size)


def test_a_run_is_opened_read_and_left(folders):
    finished_run(folders.runs_dir)

    async def steps(pilot, app):
        await seen(pilot, app, "fish")
        await pilot.press("enter")
        text = await seen(pilot, app, "it is warm")
        assert "+ done   step 50/50" in text
        assert "loss 0.0200" in text
        assert "val 0.1250" in text
        assert "warning: it is warm" in text
        await pilot.press("left")
        text = await seen(pilot, app, "step 50   ")
        assert "step 50   loss 0.02   lr 0.0001   gradient 0.5" in text
        await pilot.press(*["shift+left"] * 8)
        assert "step 1   loss 1 " in await seen(pilot, app, "step 1 ")
        await pilot.press("L", "plus")
        assert app.screen.query_one("#loss", SeriesCurve).logarithmic
        await pilot.press("escape")
        await seen(pilot, app, "KIND")
        await pilot.press("3")
        await seen(pilot, app, "it is warm")

    drive(folders, steps)


def test_a_very_long_run_and_a_change_to_another_while_it_is_read(folders):
    line = json.dumps(
        {"v": 1, "time": 1.0, "type": "step", "step": 0, "total_steps": 60000, "loss": 0.5}
    )
    long = RunDir(folders.runs_dir / "long")
    long.root.mkdir(parents=True)
    long.events.write_text(
        "\n".join(line.replace('"step": 0', f'"step": {step}') for step in range(1, 60_001)) + "\n"
    )
    short = finished_run(folders.runs_dir, "short")

    async def steps(pilot, app):
        for _ in range(3):
            app.screen.post_message(JobsScreen.Opened(long))
            await pilot.pause(0.1)
            await pilot.press("1")
            app.screen.post_message(JobsScreen.Opened(short))
            await seen(pilot, app, "step 50/50")
            await pilot.press("1")
        app.screen.post_message(JobsScreen.Opened(long))
        await seen(pilot, app, "step 60000/60000")
        await pilot.press("left")
        await seen(pilot, app, "step 60000   loss 0.5")

    drive(folders, steps)


def test_a_living_run_is_shown_and_stopped_by_keys(folders, runs: Runs):
    folders.runs_dir = runs.folder
    run = runs.start("steps", "fish")
    wait_for(lambda: read_state(run).step)

    async def steps(pilot, app):
        await seen(pilot, app, "running")
        await pilot.press("enter")
        await seen(pilot, app, "> running")
        await pilot.press("b")
        await true(pilot, lambda: run.control.is_dir() and any(run.control.iterdir()))
        await pilot.press("S")
        await seen(pilot, app, "save a checkpoint")
        await pilot.press("escape")
        assert read_state(run).state is State.RUNNING, "Cancel does nothing"
        await pilot.press("S")
        await seen(pilot, app, "save a checkpoint")
        await pilot.press("y")
        await seen(pilot, app, "- stopped")

    drive(folders, steps)
    assert read_state(run).state is State.STOPPED


def test_jobs_are_moved_cancelled_and_queued_again(folders):
    add(folders, "a", "b", "c")

    async def steps(pilot, app):
        await seen(pilot, app, "queued")
        await pilot.press("J")
        await true(pilot, lambda: names(folders) == ["b", "a", "c"])
        await pilot.press("G", "K")
        await true(pilot, lambda: names(folders) != ["b", "a", "c"])
        await pilot.press("P")
        await seen(pilot, app, "queue paused")
        await pilot.press("g", "x")
        await seen(pilot, app, "Cancel job")
        await pilot.press("y")
        await seen(pilot, app, "- cancelled")
        await pilot.press("G", "r")
        await true(pilot, lambda: len(folders.overview().entries) == 4)

    drive(folders, steps)
    states = [entry.state for entry in folders.overview().entries]
    assert states == ["queued", "queued", "queued", "cancelled"]
    assert folders.store.paused


def test_the_command_can_be_copied(folders):
    finished_run(folders.runs_dir)

    async def steps(pilot, app):
        await seen(pilot, app, "fish")
        await pilot.press("c")
        text = await seen(pilot, app, "Command of fish")
        assert "cd '/x y'" in text
        assert "menma train 'a b.toml'" in text
        await pilot.press("y")
        assert app.clipboard == "cd '/x y'\nmenma train 'a b.toml'"
        await pilot.press("escape")
        await seen(pilot, app, "KIND")

    drive(folders, steps)


def test_a_run_directory_that_vanishes_and_a_broken_queue(folders, tmp_path):
    run = finished_run(folders.runs_dir)

    async def steps(pilot, app):
        await seen(pilot, app, "fish")
        await pilot.press("enter")
        await seen(pilot, app, "it is warm")
        for file in run.root.iterdir():
            file.unlink()
        run.root.rmdir()
        await pilot.press("1")
        await seen(pilot, app, "Nothing here yet")

    drive(folders, steps)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "queue.db").write_bytes(b"nonsense" * 1000)
    sources = Sources(folders.runs_dir, broken)
    assert sources.store is None

    async def look(pilot, app):
        await seen(pilot, app, "cannot be used")
        await pilot.press("P", "r", "x", "J", "S", "b", "l", "c", "enter")

    drive(sources, look)


def test_themes_take_turns_and_help_is_there(folders):
    async def steps(pilot, app):
        first = app.theme
        seen_themes = []
        for _ in range(len(THEMES) + 1):
            await pilot.press("T")
            seen_themes.append(app.theme)
        assert seen_themes[-1] == first
        assert len(set(seen_themes)) == len(THEMES) + 1
        await pilot.press("question_mark")
        await seen(pilot, app, "Stop")

    drive(folders, steps)


def test_outputs_are_listed_looked_into_and_queued(folders, monkeypatch):
    monkeypatch.setattr(library_screen, "ensure_worker", lambda folder: None)
    run = finished_run(folders.runs_dir)
    run.output.mkdir()
    file = run.output / "fish.safetensors"
    file.write_bytes(b"x" * 3 * 2**20)

    async def steps(pilot, app):
        await pilot.press("5")
        text = await seen(pilot, app, "fish.safetensors")
        assert "3.0 MiB" in text
        await pilot.press("m")
        await seen(pilot, app, "Queue this?")
        await pilot.press("escape", "m", "y")
        await pilot.press("v")
        await seen(pilot, app, "menma sample")
        await pilot.press("y")
        await pilot.press("y")
        assert app.clipboard == str(file.absolute())
        await pilot.press("enter")  # it is no LoRA
        await seen(pilot, app, "error:")
        await pilot.press("escape")

    drive(folders, steps)
    merge, sample = (job.spec for job in folders.store.jobs())
    merged = run.output / "fish-merged.safetensors"
    assert merge.argv == ("merge", str(run.config), "--lora", str(file), "-o", str(merged))
    assert (merge.gpus, merge.cwd) == (0, Path.cwd())
    assert sample.argv == ("sample", str(run.root))


def test_the_machine_is_described(folders, monkeypatch):
    found = {
        "menma": "1", "python": "3", "executable": "/p", "system": "Linux", "cpus": 2,
        "ram_gib": 24, "ram_free_gib": 20, "disk_free_gib": 9, "disk_folder": "/d", "gpus": [],
        "packages": {"torch": "2.13"}, "problems": ["av is not installed"], "warnings": ["little"],
    }  # fmt: skip
    monkeypatch.setattr(environment, "report", lambda folder: found)

    async def steps(pilot, app):
        await pilot.press("6")
        text = await seen(pilot, app, "av is not installed")
        assert "warning: little" in text
        assert "GPU        none" in text
        await pilot.press("y")
        assert "torch          2.13" in app.clipboard

    drive(folders, steps)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_colours_can_be_read_and_exist_in_256(theme):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    cube = {0, 95, 135, 175, 215, 255}
    greys = {8 + 10 * i for i in range(24)}
    words = [
        theme.foreground,
        theme.primary,
        theme.accent,
        theme.success,
        theme.warning,
        theme.error,
    ]
    for colour in (*words, theme.background, theme.surface, theme.panel):
        parts = {int(colour[i : i + 2], 16) for i in (1, 3, 5)}
        assert parts <= cube or (len(parts) == 1 and parts <= greys), colour
    for ground in (theme.background, theme.panel):
        for colour in words:
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (colour, ground)


def test_the_overview_is_sorted_and_does_not_show_a_run_twice(folders, tmp_path):
    assert read_overview(tmp_path / "none", None, "why").problem == "why"
    finished_run(folders.runs_dir, "old")
    add(folders, "waits")
    assert names(folders) == ["waits", "old"]
    assert QueueStore(tmp_path / "queue").jobs()
