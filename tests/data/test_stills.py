"""Single frames: the right ones, from any kind of clip, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_clips import numbered_frame, read_number, write_images, write_video
from PIL import Image

from trainer.contract.errors import DataError
from trainer.contract.jobs import FramesRequest
from trainer.data import media, stills
from trainer.data.media import index_clip
from trainer.jobs import frames

MANY_KEYS = {"preset": "ultrafast", "crf": "18", "g": "5"}


def ask(path: Path, **wanted: Any) -> dict[str, Any]:
    """Run the job; return its end with the pictures' numbers as `shown`, and their size."""
    told: list[dict[str, Any]] = []
    request = FramesRequest(path=path, output=path.parent / "pictures", **wanted)
    frames.run(request, lambda kind, /, **fields: told.append({"type": kind, **fields}))
    (end,) = told
    pictures = [np.asarray(Image.open(request.output / name)) for name in end["files"]]
    return {**end, "shown": [read_number(p) for p in pictures], "size": pictures[0].shape[1::-1]}


def test_frames_are_spread_over_a_video_and_keep_its_aspect(tmp_path):
    found = ask(write_video(tmp_path / "a.mp4", 40, options=MANY_KEYS), num_frames=4, max_width=64)
    assert found["shown"] == found["numbers"] == [0, 13, 26, 39]
    assert found["size"] == (64, 32)
    assert (found["num_frames"], found["width"], found["height"]) == (40, 128, 64)
    assert found["fps"] == 24


def test_frames_are_chosen_in_any_order_and_from_the_end(tmp_path):
    video = write_video(tmp_path / "a.mp4", 40, options=MANY_KEYS)
    assert ask(video, frames=(-1, 3, 3, 20))["shown"] == [39, 3, 3, 20]
    with pytest.raises(DataError, match=r"a\.mp4 has no frame 40: it has 40"):
        ask(video, frames=(40,))


def test_a_video_of_varying_rate_has_its_own_frames(tmp_path):
    times = [0, 10, 50, 60, 90, 200, 210, 400]
    found = ask(write_video(tmp_path / "a.mp4", 8, times_ms=times), num_frames=8)
    assert found["shown"] == list(range(8))
    assert found["fps"] is None


def test_folders_of_images_and_images(tmp_path):
    folder = write_images(tmp_path / "walk", 12)
    assert ask(folder, num_frames=3)["shown"] == [0, 6, 11]
    image = tmp_path / "one.png"
    Image.fromarray(numbered_frame(5)).save(image)
    found = ask(image, num_frames=9, max_height=32)
    assert (found["shown"], found["num_frames"], found["size"]) == ([5], 1, (64, 32))


def test_what_lies_between_key_frames_is_not_decoded(tmp_path, monkeypatch):
    clip = index_clip(write_video(tmp_path / "a.mp4", 60, options=MANY_KEYS), "video", target_fps=1)
    decoded = []
    pixels = media._pick

    def counting(frames, *rest):
        return pixels((decoded.append(frame.pts) or frame for frame in frames), *rest)

    monkeypatch.setattr(media, "_pick", counting)
    assert [number for number, _ in stills.read_stills(clip, [1, 56], (64, 32))] == [1, 56]
    assert len(decoded) < 12


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.mp4", b"", "is empty"),
        ("a.mp4", b"no video" * 100, "is damaged or no video"),
        ("a.png", b"no image", "is no readable image"),
        ("a.mp4", None, "there is no"),
    ],
)
def test_what_is_wrong_is_said_with_its_name(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        ask(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message


def test_spread_has_both_ends():
    assert stills.spread(3, 8) == [0, 1, 2]
    assert stills.spread(9, 1) == [4]
    assert stills.spread(101, 3) == [0, 50, 100]


def test_the_job_loads_no_torch():
    script = "import trainer.jobs.frames, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
