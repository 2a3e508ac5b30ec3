"""The monitor and what belongs to it, by keys; also when files are damaged or vanish."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image
from screens import screen_text
from textual.pilot import Pilot

from app.domain.load import GpuLoad, Load
from app.runs.ask import Cancelled
from app.runs.frames import ClipFrames
from app.runs.lock import RunLock
from app.runs.metrics import RunLog
from app.runs.processes import ProcessId, boot_id
from app.runs.samples import Sample
from app.runs.status import Status
from app.tui import meters
from app.tui.app import MenmaApp
from app.tui.curve_view import SeriesCurve
from app.tui.screens.monitor import pictures
from app.tui.sources import Sources
from trainer.contract.errors import RunError
from trainer.contract.events import EventWriter
from trainer.contract.run_dir import RunDir

Steps = Callable[[Pilot, MenmaApp], Awaitable[None]]
LOOKS = 1200
LOAD = Load((GpuLoad("0", 12.0, 24.0, 98.0, None, None),), "", 16.0, 64.0, 6.25)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch) -> Sources:
    """Return an empty folder of runs, on a machine that is described."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(meters, "read_load", lambda run=None: LOAD)
    return Sources(tmp_path / "runs", tmp_path / "queue")


def a_run(sources: Sources, name: str = "fish", steps: int = 50) -> RunDir:
    run = RunDir(sources.runs_dir / name)
    emit = EventWriter(run.events)
    for step in range(1, steps + 1):
        emit(
            "step", step=step, total_steps=steps, loss=1 / step, lr=step * 1e-6, grad_norm=0.5,
            terms={"flow": 2 / step}, step_time_s=2.5,
        )  # fmt: skip
    emit("validation", step=steps, loss=0.125, by_timestep={"100": 0.25})
    emit("end", reason="done", step=steps)
    return run


def drive(sources: Sources, steps: Steps, *, opens: bool = True, size=(80, 24)) -> None:
    """Open the app, and the newest run in the monitor, and do something in it."""

    async def work() -> None:
        app = MenmaApp(sources)
        async with app.run_test(size=size, notifications=True) as pilot:
            await seen(pilot, app, "fish")
            if opens:
                await pilot.press("enter")
                await seen(pilot, app, "read single steps")
            await steps(pilot, app)

    asyncio.run(work())


async def seen(pilot: Pilot, app: MenmaApp, words: str) -> str:
    """Wait until words are on the screen; return the screen."""
    for _ in range(LOOKS):
        text = screen_text(app)
        if words in text:
            return text
        await pilot.pause(0.05)
    raise AssertionError(f"{words!r} does not come:\n{text}")


def test_the_lower_curve_shows_any_series_and_the_cursor_reads_it(sources):
    a_run(sources)

    async def steps(pilot, app):
        text = await seen(pilot, app, "grad_norm 0.5 at step 50")
        assert "GPU 0 ##########..........  12.0/24.0 GiB  98 % busy" in text
        assert "RAM   #####...............  16.0/64.0 GiB  run 6.2 GiB" in text
        await pilot.press("m")
        text = await seen(pilot, app, "Lower curve")
        listed = [line.split("▊")[1].strip(" ▎") for line in text.splitlines() if "▊" in line]
        assert "* grad_norm" in listed
        assert {"lr", "terms/flow", "validation/timestep_100"} <= set(listed)
        await pilot.press("k", "enter")
        await seen(pilot, app, "lr 5e-05 at step 50")
        assert app.screen.query_one("#lower", SeriesCurve).last_step == 50
        await pilot.press("left", *["shift+left"] * 8)
        await seen(pilot, app, "step 1   loss 1   lr 1e-06")
        assert app.screen.query_one("#lower", SeriesCurve).cursor == 0
        await pilot.press("m", "home", "enter")
        await pilot.pause()
        assert not app.screen.query_one("#lower").display, "the loss alone"
        await pilot.press("m", "escape")

    drive(sources, steps)


def test_a_run_that_is_deleted_and_comes_back_while_it_is_watched(sources):
    run = a_run(sources)

    async def steps(pilot, app):
        shutil.rmtree(run.root)
        text = await seen(pilot, app, "is gone")
        assert "loss 0.0200" in text, "what was read stays"
        await pilot.press("left", "L", "plus", "b", "l", "escape", "e")
        a_run(sources, steps=7)
        await seen(pilot, app, "step 7/7")
        await seen(pilot, app, "grad_norm 0.5 at step 7")

    drive(sources, steps)


def test_a_log_that_is_cut_off_or_damaged_while_it_is_watched(sources):
    run = a_run(sources)

    async def steps(pilot, app):
        run.events.write_bytes(b"")
        emit = EventWriter(run.events)
        emit("step", step=3, total_steps=9, loss=0.75)
        await seen(pilot, app, "loss 0.7500")
        with run.events.open("ab") as file:
            file.write(b"{half a line\n" + b"[" * 50_000 + b"\n" + os.urandom(999) + b"\n")
            file.write(b'{"type": "step", "step": 4, "loss": "x", "lr": [], "eta_s": 1e999}\n')
            file.write(b'{"type": "step", "step": 5, "loss": null, "time": "noon"}\n')
            file.write(b'{"type": "step", "st')
        await seen(pilot, app, "damaged lines")
        emit("step", step=6, total_steps=9, loss=0.5)
        emit("warning", message="\x1b[2Jbold\x1b[1m words", hint="and a hint")
        text = await seen(pilot, app, "warning: bold words (and a hint)")
        assert "loss 0.5000" in text

    drive(sources, steps)


def test_the_time_left_is_not_told_before_thirty_steps(sources):
    run = RunDir(sources.runs_dir / "fish")
    emit = EventWriter(run.events)
    me = ProcessId.of(os.getpid())
    status = Status(
        supervisor=me, trainer=me, boot_id=boot_id(), host="here", started=0.0, events_from=0
    )
    lock = RunLock.acquire(run.lock)
    status.write(run)

    def make(first: int, last: int) -> None:
        for step in range(first, last + 1):
            emit("step", step=step, total_steps=99, loss=1.0, eta_s=3600.0)

    make(1, 5)

    async def steps(pilot, app):
        await seen(pilot, app, "step 5/99   ETA estimating")
        make(6, 30)
        await seen(pilot, app, "step 30/99   1h00m left")

    try:
        drive(sources, steps)
    finally:
        lock.release()


def write_samples(run: RunDir) -> None:
    emit = EventWriter(run.events)
    run.samples.mkdir()
    for step in (0, 25, 50):
        for index, prompt in enumerate(("a fish", "a bird")):
            path = run.samples / f"step{step:08d}_{index:02d}_42.png"
            Image.new("RGB", (8, 8), (step, 0, 255 * index)).save(path)
            emit("sample", step=step, path=str(path), prompt=prompt, seed=42)


def test_samples_of_steps_stand_beside_one_another(sources):
    run = a_run(sources)
    write_samples(run)

    async def steps(pilot, app):
        await pilot.press("v")
        text = await seen(pilot, app, "frame 1/1")
        assert "1/2  a fish  (seed 42)" in text
        heads = text.splitlines()[2].split()
        assert heads[:2] == ["step", "0"]
        assert heads[3:5] == ["step", "50"]
        await pilot.press("up")
        await seen(pilot, app, "step 2 of 3")
        await pilot.press("b", "down")
        text = await seen(pilot, app, "step 3 of 3")
        assert text.splitlines()[2].split()[:2] == ["step", "25"], "kept on the left"
        await pilot.press("n")
        await seen(pilot, app, "2/2  a bird")
        await pilot.press("y")
        assert app.clipboard == str(run.samples / "step00000050_01_42.png")
        path = run.samples / "step00000075_01_42.png"
        path.write_bytes(b"no picture")
        EventWriter(run.events)("sample", step=75, path=str(path), prompt="a bird", seed=42)
        await seen(pilot, app, "cannot identify image file")
        path.unlink()
        await pilot.press("up", "down")
        await seen(pilot, app, "is gone")
        await pilot.press("escape")
        await seen(pilot, app, "read single steps")

    drive(sources, steps)


def test_a_sample_in_work_is_looked_at_until_it_is_made(sources):
    run = a_run(sources)
    write_samples(run)
    emit = EventWriter(run.events)
    told = {"step": 75, "prompt": "a fish", "seed": 42}
    preview, sample = (run.samples / name for name in ("preview_00.png", "step00000075_00_42.png"))

    def draw(done: int, colour: str) -> None:
        Image.new("RGB", (8, 8), colour).save(preview)
        emit("preview", path=str(preview), index=0, done=done, total=20, **told)

    async def steps(pilot, app):
        await pilot.press("v")
        await seen(pilot, app, "step 3 of 3")
        draw(1, "red")
        await seen(pilot, app, "step 4 of 4")
        await seen(pilot, app, "step 75  being made, 1 of 20")
        drawn = app.screen.query_one("#after", pictures.Picture)
        while not drawn._lines:
            await pilot.pause(0.05)
        red = drawn._lines
        draw(5, "blue")
        await seen(pilot, app, "step 75  being made, 5 of 20")
        while drawn._lines == red:
            assert drawn._lines, "the picture before stays until the next one is read"
            await pilot.pause(0.05)
        Image.new("RGB", (8, 8), "green").save(sample)
        emit("sample", path=str(sample), **told)
        text = await seen(pilot, app, sample.name)
        assert "being made" not in text
        assert "step 4 of 4" in text

    drive(sources, steps)


def test_what_was_being_made_is_forgotten_with_the_next_step(tmp_path):
    run = RunDir(tmp_path)
    emit = EventWriter(run.events)
    log = RunLog(run)
    emit("preview", step=3, path="x/preview_00.png", index=0, done=1, total=9, prompt="a", seed=1)
    emit("preview", step=3, path="x/preview_01.png", index=1, done=1, total=9, prompt="b", seed=2)
    emit("sample", step=3, path="x/step00000003_00_1.png", prompt="a", seed=1)
    log.read()
    assert [one.work for one in log.previews.values()] == ["being made, 1 of 9"]
    assert [one.work for one in log.samples] == [""]
    emit("step", step=4, loss=0.5)
    log.read()
    assert not log.previews


def test_videos_are_gone_through_frame_by_frame_and_played_when_asked(sources, monkeypatch):
    run = a_run(sources)
    frames = []
    for number in range(3):
        frames.append(run.root / f"{number}.png")
        Image.new("RGB", (64, 32), (100 * number, 0, 0)).save(frames[-1])
    clip = run.samples / "step00000050_00_42.mp4"
    clip.parent.mkdir()
    clip.write_bytes(b"a video")
    EventWriter(run.events)("sample", step=50, path=str(clip))

    def made(path, **options):
        return ClipFrames(
            paths=tuple(frames), numbers=(0, 16, 32), num_frames=33, width=64, height=32, fps=16.0
        )

    monkeypatch.setattr(pictures, "clip_frames", made)

    async def steps(pilot, app):
        await pilot.press("v")
        text = await seen(pilot, app, "frame 1/33")
        assert "1/1  prompt 1, seed 42" in text
        before = app.screen.query_one("#after").render_line(0)
        assert len(before.text.rstrip()) == 38
        await pilot.press("right")
        await seen(pilot, app, "frame 17/33")
        assert app.screen.query_one("#after").render_line(0) != before
        await pilot.press("right", "right", "right")
        await seen(pilot, app, "frame 33/33")
        await pilot.press("a")
        await seen(pilot, app, "playing, a stops")
        await seen(pilot, app, "frame 17/33")
        assert len(app.screen.query_one("#after").render_line(0).text.rstrip()) == 32, "small"
        await pilot.press("a", "v")
        await seen(pilot, app, "read single steps")

    drive(sources, steps)


@pytest.mark.parametrize(
    ("raised", "problem"),
    [(RunError("no video"), "cannot be shown: no video"), (Cancelled(), None)],
)
def test_a_video_that_cannot_be_read_is_words(tmp_path, monkeypatch, raised, problem):
    def fails(path, **options):
        raise raised

    monkeypatch.setattr(pictures, "clip_frames", fails)
    clip = tmp_path / "a.mp4"
    clip.write_bytes(b"x")
    film = pictures.read_film(Sample(1, clip), 20, 5, lambda: False)
    assert (film.problem if film else None) == (problem and f"a.mp4 {problem}")


def failed_run(sources: Sources, name: str = "fish") -> RunDir:
    run = RunDir(sources.runs_dir / name)
    emit = EventWriter(run.events)
    emit("step", step=7, total_steps=9, loss=1.0)
    emit("error", message="the loss is not a number", hint="look at step 3")
    emit("end", reason="failed", step=7)
    run.console.write_text("one\nlast words\n")
    run.command.write_text(json.dumps({"argv": ["menma", "train", "a.toml"], "cwd": "/x"}))
    return run


def test_why_a_run_failed_is_shown_copied_kept_and_left_for_the_monitor(sources, tmp_path):
    failed_run(sources)

    async def steps(pilot, app):
        await pilot.press("enter")
        text = await seen(pilot, app, "Why we think so")
        assert "the trainer says: the loss is not a number" in text
        await pilot.press("y")
        assert "last words" in app.clipboard
        await pilot.press("w")
        await seen(pilot, app, "Written:")
        await pilot.press("w")
        for _ in range(LOOKS):
            if (tmp_path / "error-of-fish-2.txt").exists():
                break
            await pilot.pause(0.05)
        kept = (tmp_path / "error-of-fish.txt").read_text()
        assert kept == (tmp_path / "error-of-fish-2.txt").read_text()
        assert "look at step 3" in kept
        await pilot.press("j", "k", "o")
        await seen(pilot, app, "read single steps")
        await pilot.press("e")
        text = await seen(pilot, app, "What to try")
        assert "o monitor" not in text
        await pilot.press("o", "escape")
        await seen(pilot, app, "read single steps")

    drive(sources, steps, opens=False)


def test_a_folder_that_cannot_be_written_to_is_said(sources):
    failed_run(sources)

    async def steps(pilot, app):
        await pilot.press("enter")
        await seen(pilot, app, "What to try")
        os.chdir("/proc")
        await pilot.press("w")
        await seen(pilot, app, "No such file")

    before = Path.cwd()
    try:
        drive(sources, steps, opens=False)
    finally:
        os.chdir(before)


def test_marked_runs_are_compared(sources):
    a_run(sources, "bird", steps=30)
    a_run(sources, "fish")
    failed_run(sources, "cat")

    async def steps(pilot, app):
        await pilot.press("equals_sign")
        await seen(pilot, app, "Mark two to 6 trainings")
        await pilot.press("g", "space", "space", "g", "space", "G", "space")
        text = await seen(pilot, app, "* bird")
        assert "* fish" in text
        assert "* cat" not in text
        await pilot.press("equals_sign")
        text = await seen(pilot, app, "FIGURE")
        assert "compare 2 runs" in text
        assert "average of the loss, validation" in text
        await pilot.press("left")
        text = await seen(pilot, app, "step 50   ")
        await pilot.press("L", "plus", "minus", "r", "j", "k", "shift+left", "right")
        await seen(pilot, app, "validation, best")
        await pilot.press("escape")
        await seen(pilot, app, "KIND")

    drive(sources, steps, opens=False)


def test_only_what_has_changed_is_drawn_again(sources):
    """Ten steps more change the last columns of a curve; the rest of it is not sent again."""
    run = a_run(sources, steps=300)

    async def steps(pilot, app):
        curve = app.screen.query_one("#loss", SeriesCurve)
        drawn = []
        original = curve.refresh

        def refresh(*regions, **options):
            drawn.extend(regions or [curve.size.region])
            return original(*regions, **options)

        curve.refresh = refresh
        emit = EventWriter(run.events)
        emit("step", step=301, total_steps=999, loss=0.5, grad_norm=0.5)
        await seen(pilot, app, "step 301")
        await seen(pilot, app, "at step 301")
        assert drawn
        assert all(region.height == 1 and region.width < 12 for region in drawn), drawn

    drive(sources, steps)


def test_the_machine_is_looked_at_in_a_thread_of_its_own(sources, monkeypatch):
    threads = set()

    def read(run=None):
        threads.add(threading.current_thread())
        return LOAD

    monkeypatch.setattr(meters, "read_load", read)
    a_run(sources)

    async def steps(pilot, app):
        await seen(pilot, app, "98 % busy")

    drive(sources, steps, size=(120, 40))
    assert threads
    assert threading.main_thread() not in threads
    assert math.isfinite(LOAD.ram_used_gib)
