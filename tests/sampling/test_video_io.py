"""Written videos and images: content, size, metadata, and that failures leave nothing behind."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from trainer.contract.errors import DataError
from trainer.sampling.video_io import (
    read_frames,
    read_metadata,
    read_video,
    write_frames,
    write_png,
    write_video,
)

METADATA = {"prompt": 'eine Katze, "schön" 猫', "seed": 7, "num_steps": 4}


def smooth_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """Slow gradients: what a codec keeps."""
    f, y, x = np.meshgrid(*map(np.arange, (num_frames, height, width)), indexing="ij")
    channels = [x / width, y / height, (f + 1) / (num_frames + 1)]
    return (np.stack(channels, axis=-1) * 200 + 20).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (33, 48)])
def test_video_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = smooth_frames(9, *size)
    path = tmp_path / "deep" / "v.mp4"
    write_video(path, iter(frames), 16, METADATA)
    video = read_video(path)
    height, width = size
    assert video.frames.shape == (9, height + height % 2, width + width % 2, 3)
    difference = np.abs(video.frames[:, :height, :width].astype(int) - frames)
    assert difference.mean() < 3
    assert video.fps == 16
    assert video.metadata == METADATA
    assert read_metadata(path) == METADATA
    assert len(list(read_frames(path))) == 9
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
    assert [p.name for p in path.parent.iterdir()] == ["v.mp4"]


def test_colours_are_kept_and_their_matrix_is_named(tmp_path: Path) -> None:
    colours = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 40)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 32, 32, 3))
    write_video(tmp_path / "v.mp4", frames, 16, crf=1)
    read = read_video(tmp_path / "v.mp4").frames[:, 16, 16].astype(int)
    assert np.abs(read - colours).max() <= 4  # the matrix of the other standard is off by 20
    with av.open(str(tmp_path / "v.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)


def test_one_frame_and_fractional_rates(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", smooth_frames(1, 16, 16), 23.976)
    assert len(read_video(tmp_path / "v.mp4").frames) == 1
    write_video(tmp_path / "w.mp4", smooth_frames(5, 16, 16), 23.976)
    assert read_video(tmp_path / "w.mp4").fps == pytest.approx(23.976, abs=1e-3)
    assert read_video(tmp_path / "w.mp4").metadata == {}


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, smooth_frames(5, 16, 16), 16, METADATA)
    before = path.read_bytes()

    def breaking() -> Iterator[np.ndarray]:
        yield from smooth_frames(3, 16, 16)
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="broke"):
        write_video(path, breaking(), 16)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="needs a frame"):
        write_video(path, iter(()), 16)
    with pytest.raises(RuntimeError, match="broke"):
        write_frames(tmp_path / "frames", breaking())
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_png_keeps_every_pixel_and_the_metadata(tmp_path: Path) -> None:
    frame = smooth_frames(1, 17, 19)[0]
    write_png(tmp_path / "i.png", frame, METADATA)
    with Image.open(tmp_path / "i.png") as image:
        assert (np.asarray(image) == frame).all()
    assert read_metadata(tmp_path / "i.png") == METADATA


def test_frames_folder(tmp_path: Path) -> None:
    frames = smooth_frames(3, 16, 16)
    write_frames(tmp_path / "out", frames, METADATA)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]
    with pytest.raises(FileExistsError):
        write_frames(tmp_path / "out", frames)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can be read"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises(DataError):
        read_video(tmp_path / "bad.mp4")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError):
        read_metadata(tmp_path / "bad.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_metadata(tmp_path / "plain.png") == {}


def test_frames_are_consumed_as_they_come(tmp_path: Path) -> None:
    """Python must never hold more than a few of the 200 frames (200 x 0.2 MB)."""
    frame = smooth_frames(1, 256, 256)[0]
    tracemalloc.start()
    write_video(tmp_path / "v.mp4", (frame.copy() for _ in range(200)), 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * frame.nbytes
