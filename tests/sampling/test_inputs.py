"""What is said of the files that samples start from, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.contract.errors import ConfigError
from trainer.contract.variants import get_variant
from trainer.sampling.inputs import check_inputs
from trainer.sampling.requests import SampleRequest
from trainer.sampling.video_io import write_frames, write_video

I2V = get_variant("wan2.2-i2v-a14b")


def request(**changes: object) -> SampleRequest:
    return replace(SampleRequest.of("a", I2V), width=64, height=32, num_frames=5, **changes)


def picture(path: Path, width: int, height: int) -> Path:
    Image.new("RGB", (width, height)).save(path)
    return path


def clip(path: Path, width: int, height: int, num_frames: int = 5) -> Path:
    write_video(path, np.zeros((num_frames, height, width, 3), np.uint8), 16)
    return path


def notes_of(*requests: SampleRequest) -> list[str]:
    return check_inputs(requests, multiple=16)


def test_files_of_the_right_size_need_no_words(tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    write_frames(frames, np.zeros((6, 32, 64, 3), np.uint8))
    first, video = picture(tmp_path / "i.png", 64, 32), clip(tmp_path / "v.mp4", 64, 32)
    for file in (video, frames, first):
        assert notes_of(request(image=first, video=file)) == []


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((128, 64), "is 128x64 and is scaled to 64x32"),
        ((64, 64), "is 64x64 and is scaled to 64x32; 50% of the picture is cut off at its edges; "
                   "48x48 would keep its shape"),
        ((32, 64), "is 32x64 and is scaled to 64x32; 75% of the picture is cut off at its edges; "
                   "32x64 would keep its shape"),
        # A little off, but no multiple of 16 is nearer.
        ((66, 32), "is 66x32 and is scaled to 64x32; 3% of the picture is cut off at its edges"),
    ],
)  # fmt: skip
def test_another_size_is_told_from_which_to_which(
    tmp_path: Path, size: tuple[int, int], words: str
) -> None:
    file = picture(tmp_path / "first.png", *size)
    assert notes_of(request(image=file), request(image=file)) == [f"first.png {words}"]
    assert notes_of(request(video=clip(tmp_path / "v.mp4", *size))) == [f"v.mp4 {words}"]


def test_a_turned_photo_is_measured_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (32, 64)).save(tmp_path / "turned.jpg", exif=exif)
    assert notes_of(request(last_image=tmp_path / "turned.jpg")) == []


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        notes_of(
            request(image=tmp_path / "broken.png", video=tmp_path / "broken.mp4"),
            request(video=clip(tmp_path / "v.mp4", 64, 32, 4)),
            request(control=tmp_path / "empty"),
        )
    found = {problem.key: str(problem) for problem in caught.value.problems}
    assert list(found) == [
        "prompts[0].image", "prompts[0].video", "prompts[1].video", "prompts[2].control"
    ]  # fmt: skip
    assert "broken.png is no readable image" in found["prompts[0].image"]
    assert "broken.mp4" in found["prompts[0].video"]
    short = found["prompts[1].video"]
    assert "v.mp4 has 4 frames, but the sample needs 5 (set num_frames to 1" in short
    assert "holds no images" in found["prompts[2].control"]
