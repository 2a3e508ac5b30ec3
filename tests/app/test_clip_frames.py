"""Pictures of clips for the screens: from the real job, kept until the file changes."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_clips import write_video

from app.runs import child, frames
from app.runs.ask import Cancelled, ask
from app.runs.frames import clip_frames
from trainer.contract.errors import BusyError, RunError, UserError


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Replace the trainer by a script."""

    def use(script: str) -> None:
        file = tmp_path / "trainer.py"
        file.write_text(script)
        monkeypatch.setattr(child, "TRAINER", (sys.executable, str(file)))

    return use


def in_a_thread(work):
    """Call it as a screen does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_pictures_are_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    video, cache = write_video(tmp_path / "a.mp4", 12), tmp_path / "cache"
    asked = []
    monkeypatch.setattr(frames, "ask", lambda *a, **k: asked.append(a) or ask(*a, **k))

    def look():
        return in_a_thread(lambda: clip_frames(video, num_frames=3, max_width=32, cache=cache))

    first = look()
    assert (first.numbers, first.num_frames, first.width, first.fps) == ((0, 6, 11), 12, 128, 24)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first.paths)
    assert look() == first
    assert len(asked) == 1
    os.utime(video, (1, 1))
    assert look().paths != first.paths
    look().paths[0].unlink()
    assert look().paths[0].is_file()
    assert len(asked) == 3
    assert not [folder for folder in cache.iterdir() if "." in folder.name]


def test_a_broken_file_is_told_in_words(tmp_path):
    video = tmp_path / "a.mp4"
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read: No such file"):
        clip_frames(video, cache=tmp_path / "cache")
    video.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4 is damaged or no video"):
        clip_frames(video, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_old_pictures_make_room_for_new_ones(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for name, age in (("old", 1000), ("new", 2000), ("left.half", 5000)):
        (cache / name).mkdir(parents=True)
        (cache / name / "frames.json").write_bytes(b"x" * 100)
        os.utime(cache / name / "frames.json", (age, age))
    monkeypatch.setattr(frames, "MAX_CACHE_BYTES", 150)
    frames._make_room(cache)
    assert [folder.name for folder in cache.iterdir()] == ["new"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    video = write_video(tmp_path / "a.mp4", 2)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="no pictures of"):
        clip_frames(video, cache=tmp_path / "file")


def test_a_job_that_is_not_wanted_any_more_is_ended(scripted):
    scripted('import time; print(\'{"type": "log"}\', flush=True); time.sleep(600)')
    started = threading.Event()
    with pytest.raises(Cancelled):
        in_a_thread(lambda: ask("x", {}, lambda event: started.set(), started.is_set))


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ('print(\'{"type": "error", "message": "no"}\'); exit(2)', UserError, "^no$"),
        ('print(\'{"type": "error", "message": "no"}\'); exit(3)', BusyError, "^no$"),
        ("1/0", RunError, "ZeroDivisionError"),
        ("", RunError, "ended with exit code 0"),
    ],
)
def test_failures_have_their_class_and_words(scripted, script, kind, words):
    scripted(script)
    with pytest.raises(kind, match=words):
        ask("x", {})


def test_the_answer_is_the_end(scripted):
    scripted('print(\'{"type": "log"}\\n{"type": "end", "n": 1}\')')
    events: list = []
    assert ask("x", {}, events.append)["n"] == 1
    assert events == [{"type": "log"}]
