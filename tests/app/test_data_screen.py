"""The Data screen, driven by keys; the trainer's report is a recorded one."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image
from screens import screen_text
from textual.pilot import Pilot

from app.domain.data_report import ClipRow, DataReport, parse_report
from app.runs.ask import Cancelled
from app.runs.frames import ClipFrames
from app.tui.app import MenmaApp
from app.tui.screens.data import screen as data_screen
from app.tui.screens.data import view as data_view
from app.tui.sources import Sources
from trainer.contract.errors import UserError

SMALL, LARGE = (80, 24), (120, 40)
NOTE = "clips: 2 of 3 clips run at 24 frames a second"


def clip(name: str, **fields) -> dict:
    """Return one clip of a report, without a fault."""
    return {
        "source": 0, "name": name, "path": f"clips/{name}", "used": True, "validation": False,
        "width": 832, "height": 480, "num_frames": 81, "fps": 24.0, "duration_s": 3.375,
        "buckets": ["832x480x33"], "caption": f"a fish called {name}",
        "caption_file": f"clips/{Path(name).stem}.txt", "caption_tokens": 9, "problem": "",
        "hint": "", "warnings": [],
    } | fields  # fmt: skip


def report(*clips: dict) -> DataReport:
    """Return a report of these clips."""
    unknown = dict.fromkeys(("width", "height", "num_frames", "fps", "duration_s", "caption"))
    unknown |= {"used": False, "buckets": [], "caption_tokens": None}
    clips = clips or (
        clip("good.mp4"),
        clip("long.mp4", warnings=["its caption has 600 tokens, the model reads 512"]),
        clip("none.mp4", problem="has no caption: there is no none.txt", **unknown),
        clip("held.mp4", validation=True, buckets=["832x480x33", "832x480x17"]),
    )
    cache = {"folder": "clips/menma_cache", "state": "out of date", "detail": "", "bytes": 2**30}
    source = {
        "number": 0, "media": "clips", "clips": 2, "validation_clips": 1, "left_out": 1,
        "items": 3, "num_repeats": 2, "share": 1.0, "cache": cache,
    }  # fmt: skip
    bucket = {
        "bucket": "832x480x33", "items": 3, "items_per_epoch": 6, "share": 1.0, "batches": 6,
        "smaller_batches": 0, "tokens": 14040,
    }  # fmt: skip
    counts = {
        "clips": 2, "validation_clips": 1, "items": 3, "batches_per_epoch": 6, "left_out": 1,
        "clips_with_warnings": 1,
    }  # fmt: skip
    return parse_report(
        {
            "clips": clips,
            "sources": [source],
            "buckets": [bucket],
            "counts": counts,
            "notes": [NOTE],
        }
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Be in a folder with a config and captions; return what the trainer is asked for."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/fish.toml").write_text('name = "fish"\n')
    Path("clips").mkdir()
    for name in ("good", "long", "none", "held"):
        Path(f"clips/{name}.mp4").touch()
        Image.new("RGB", (32, 16), "red").save(f"clips/{name}.png")
    Path("clips/good.txt").write_text("a fish called good.mp4\n")
    asked: list[str] = []

    def read(config, *, decode, on_progress, cancelled):
        asked.append(f"{config} {decode}")
        on_progress(1, 4, "good.mp4")
        return report()

    def frames(path: Path, **options) -> ClipFrames:
        asked.append(path.name)
        picture = path.with_suffix(".png")
        return ClipFrames(
            paths=(picture, picture),
            numbers=(0, 80),
            num_frames=81,
            width=832,
            height=480,
            fps=24.0,
        )

    monkeypatch.setattr(data_screen, "read_report", read)
    monkeypatch.setattr(data_view, "clip_frames", frames)
    return asked


def drive(steps, size=SMALL, config: Path | None = None) -> None:
    async def work() -> None:
        app = MenmaApp(Sources(Path("runs"), Path("queue").absolute()), config)
        async with app.run_test(size=size, notifications=True) as pilot:
            await seen(pilot, app, "live" if config is None else "fish")
            await steps(pilot, app)

    asyncio.run(work())


async def seen(pilot: Pilot[None], app: MenmaApp, words: str, *, gone: bool = False) -> str:
    """Wait until words are on the screen, or are not any more; return the screen."""
    for _ in range(1200):
        if (words in (text := screen_text(app))) is not gone:
            return text
        await pilot.pause(0.05)
    raise AssertionError(f"{words!r}:\n{text}")


async def opened(pilot: Pilot[None], app: MenmaApp) -> str:
    """Show the screen and choose the only config."""
    await pilot.press("4")
    await seen(pilot, app, "configs/fish.toml")
    await pilot.press("enter")
    return await seen(pilot, app, "left out")


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_clips_are_listed_with_problems_first(project, size):
    async def steps(pilot, app):
        await opened(pilot, app)
        text = await seen(pilot, app, "frame 1 of 81")
        lines = text.splitlines()
        assert all(len(line) <= size[0] for line in lines)
        assert "2 clips, 3 items, 6 batches an epoch" in lines[1]
        assert lines[2].split()[:5] == ["STATE", "NAME", "FRAMES", "SIZE", "FPS"]
        names = [word for line in lines[3:7] for word in line.split() if word.endswith(".mp4")]
        assert names == ["none.mp4", "long.mp4", "good.mp4", "held.mp4"]
        assert "left out: has no caption: there is no" in text
        await pilot.press("G")
        text = await seen(pilot, app, "for validation, not trained on")
        assert "832x480x33 +1" in text
        assert "a fish called held.mp4" in text

    drive(steps, size)
    assert project[0] == "configs/fish.toml False"


def test_frames_are_scrubbed_and_buckets_and_sources_are_shown(project):
    async def steps(pilot, app):
        await opened(pilot, app)
        await pilot.press("G", "k")
        await seen(pilot, app, "a fish called good.mp4")
        text = await seen(pilot, app, "frame 1 of 81")
        assert "▀" in text
        await pilot.press("right", "right")
        await seen(pilot, app, "frame 81 of 81")
        await pilot.press("left")
        await seen(pilot, app, "frame 1 of 81")
        await pilot.press("v")
        assert "14,040" in await seen(pilot, app, "TOKENS")
        await pilot.press("v")
        assert "out of date, 1.0 GiB" in await seen(pilot, app, "FOLDER")
        await pilot.press("v", "exclamation_mark")
        await seen(pilot, app, NOTE)
        await pilot.press("escape", "y")
        assert app.clipboard == str(Path("clips/good.mp4").absolute())

    drive(steps)


def test_clips_are_found_by_words_and_problems_alone_are_shown(project):
    async def steps(pilot, app):
        await opened(pilot, app)
        await pilot.press("slash", *"validation")
        text = await seen(pilot, app, "1 of 4 shown")
        assert "held.mp4" in text
        assert "good.mp4" not in text
        await pilot.press("enter", "escape")
        await seen(pilot, app, "shown", gone=True)
        await pilot.press("p")
        assert "good.mp4" not in await seen(pilot, app, "2 of 4 shown")
        await pilot.press("slash", *"zebra")
        await seen(pilot, app, "No clip is shown.")

    drive(steps)


def test_a_caption_is_edited_and_the_dataset_looked_at_again(project, monkeypatch):
    async def steps(pilot, app):
        await opened(pilot, app)
        await pilot.press("e")
        await seen(pilot, app, "cannot be lent")
        monkeypatch.setattr(app, "suspend", nullcontext)
        monkeypatch.setenv("VISUAL", "true")
        await pilot.press("e")
        await seen(pilot, app, "An empty caption")
        monkeypatch.setenv("VISUAL", "false")
        await pilot.press("e")
        await seen(pilot, app, "ended with an error")
        monkeypatch.setenv("VISUAL", "cp clips/good.txt")
        await pilot.press("e")
        await seen(pilot, app, "edited: r looks again")
        assert Path("clips/none.txt").read_text() == "a fish called good.mp4\n"
        await pilot.press("r")
        await seen(pilot, app, "edited: r looks again", gone=True)
        await pilot.press("G", "k", "e")
        await seen(pilot, app, "The caption is as it was")
        await pilot.press("d")
        for _ in range(1200):
            if "configs/fish.toml True" in project:
                break
            await pilot.pause(0.05)

    drive(steps)
    assert [words for words in project if "toml" in words] == [
        "configs/fish.toml False",
        "configs/fish.toml False",
        "configs/fish.toml True",
    ]


def test_the_config_that_is_open_is_followed(project):
    async def steps(pilot, app):
        await pilot.press("escape", "4")
        await seen(pilot, app, "left out")

    drive(steps, config=Path("configs/fish.toml"))
    assert project[0].startswith("configs/fish.toml")


def test_errors_are_shown_and_another_config_can_be_chosen(project, monkeypatch):
    def fail(config, **options):
        raise UserError("clips: no such folder", hint="look at dataset.sources")

    monkeypatch.setattr(data_screen, "read_report", fail)

    async def steps(pilot, app):
        await pilot.press("4")
        await seen(pilot, app, "configs/fish.toml")
        await pilot.press("escape")
        await seen(pilot, app, "No config is chosen")
        await pilot.press("r", "enter")
        text = await seen(pilot, app, "look at dataset.sources")
        assert "clips: no such folder" in text
        await pilot.press("escape")
        await seen(pilot, app, "error: clips: no such folder")
        await pilot.press("e", "p", "v", "left", "y", "exclamation_mark")
        await seen(pilot, app, "Nothing to note")

    drive(steps)


def test_a_reading_that_is_not_wanted_any_more_is_ended(project, monkeypatch):
    ended = threading.Event()

    def forever(config, *, cancelled, **options):
        while not cancelled():
            ended.wait(0.02)
        ended.set()
        raise Cancelled

    monkeypatch.setattr(data_screen, "read_report", forever)

    async def steps(pilot, app):
        await pilot.press("4", "enter")
        await seen(pilot, app, "Looking at the clips")

    drive(steps)
    assert ended.wait(60)


def test_frames_that_cannot_be_read_are_said(project, monkeypatch):
    def broken(path: Path, **options):
        raise UserError(f"{path.absolute()} is damaged or no video")

    monkeypatch.setattr(data_view, "clip_frames", broken)

    async def steps(pilot, app):
        await opened(pilot, app)
        await seen(pilot, app, "no frames: is damaged or no video")

    drive(steps)


def test_rows_sort_filter_and_say_what_they_are():
    rows = report().rows
    assert [row.state for row in rows] == ["left out", "warning", "ok", "validation"]
    good: ClipRow = rows[2]
    changed = report().replaced(good.with_caption("a cat"))
    assert changed.rows[2].state == "edited"
    assert changed.shown("CAT", problems_only=False) == [changed.rows[2]]
    assert [row.name for row in report().shown("832x480x17", problems_only=False)] == ["held.mp4"]
