"""Images and videos that samples start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.contract.errors import DataError
from trainer.sampling.media import load_frames, load_image
from trainer.sampling.video_io import write_frames, write_video


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "i.png")
    loaded = load_image(tmp_path / "i.png", 32, 16)
    assert loaded.shape == (1, 3, 16, 32)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(loaded[0], expected)


def test_the_middle_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "i.png")
    loaded = load_image(tmp_path / "i.png", 16, 16)
    assert (loaded[..., 2:-2] > 0.9).all()


def test_orientation_transparency_and_grey(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    picture = Image.new("RGB", (32, 16))
    picture.paste((255, 0, 0), (0, 0, 16, 16))  # red on the left, so on top after the turn
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = load_image(tmp_path / "turned.jpg", 16, 32)
    assert float(turned[0, 0, 4].mean()) > 0.9
    assert float(turned[0, 0, -4].mean()) < -0.9
    Image.new("LA", (8, 8), (255, 255)).save(tmp_path / "grey.png")
    assert (load_image(tmp_path / "grey.png", 8, 8) == 1).all()


def test_unreadable_images_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_image(tmp_path / "none.png", 8, 8)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 9)
    with pytest.raises(DataError, match=r"bad\.png"):
        load_image(tmp_path / "bad.png", 8, 8)


def test_transparent_parts_are_white_and_shrinking_averages_as_in_training(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png", 8, 8) == 1).all()
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 200
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert load_image(tmp_path / "stripes.png", 16, 16).unique().tolist() == [
        pytest.approx(100 / 127.5 - 1)
    ]


def grey(values: list[int]) -> np.ndarray:
    return np.stack([np.full((16, 16, 3), value, dtype=np.uint8) for value in values])


def test_frames_from_a_video_a_folder_and_an_image(tmp_path: Path) -> None:
    values = [20, 60, 100, 140, 180, 220]
    write_video(tmp_path / "v.mp4", grey(values), 16, crf=1)
    write_frames(tmp_path / "folder", grey(values))
    Image.fromarray(grey([90])[0]).save(tmp_path / "i.png")
    for name, expected in (("v.mp4", values[:5]), ("folder", values[:5]), ("i.png", [90] * 5)):
        frames = load_frames(tmp_path / name, 5, 16, 16)
        assert frames.shape == (1, 3, 5, 16, 16)
        means = (frames.mean(dim=(0, 1, 3, 4)) + 1) * 127.5
        torch.testing.assert_close(means, torch.tensor(expected).float(), atol=3, rtol=0)


def test_a_clip_that_is_too_short_is_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "folder", grey([1, 2, 3]))
    with pytest.raises(DataError, match="has 3 frames, but the sample needs 5"):
        load_frames(tmp_path / "folder", 5, 16, 16)
