from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.contract.errors import DataError
from trainer.data.images import image_size, read_image
from trainer.data.resize import resize_cover

FIXTURES = [HealthCheck.function_scoped_fixture]


def photo(height=40, width=60):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 4, columns * 3, (rows + columns) % 256], -1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(photo()).save(path, exif=exif)
    turned = {  # what the standard says to do with rows and columns
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }[orientation](photo())
    image = read_image(path)
    assert np.array_equal(image, turned)
    assert image_size(path) == (image.shape[1], image.shape[0])


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (255, 0, 0, 255)
    rgba[:, 1] = (0, 0, 0, 0)
    rgba[:, 2] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[0, 1].tolist() == [255, 255, 255]
    assert np.abs(image[0, 2].astype(int) - 127).max() <= 1


def test_transparent_colour_of_a_palette_is_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putdata([0, 1])
    palette.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png").tolist() == [[[255] * 3, [200, 0, 0]]]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    grey = read_image(tmp_path / "a.png")[0, :, 0]
    assert grey.tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(photo()).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (40, 60, 3)
    assert image.dtype == np.uint8


def test_floats_and_animations_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "a.tiff")
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="animation"):
        read_image(tmp_path / "a.webp")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), st.data())
def test_damaged_images_are_read_or_refused(tmp_path, kind, data):
    buffer = io.BytesIO()
    Image.fromarray(photo(16, 16)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.png"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for read in (read_image, image_size):
        with suppress(DataError):  # anything else fails the test
            read(path)


# Resizing -------------------------------------------------------------------------------------


def test_same_size_is_the_same_image():
    assert np.array_equal(resize_cover(photo(), 60, 40), photo())


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_shrinking_by_a_whole_number_is_the_mean_of_the_cells(factor):
    image = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)
    small = resize_cover(image, 36 // factor, 24 // factor)
    video = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    mean = torch.nn.functional.avg_pool2d(video, factor)[0].permute(1, 2, 0).numpy()
    assert np.abs(small - mean).max() <= 0.5 + 1e-3


@settings(max_examples=50, deadline=None)
@given(
    source=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    target=st.tuples(st.integers(2, 8), st.integers(2, 8)),
)
def test_shrinking_is_the_area_mean_of_the_centre_crop(source, target):
    # Independent: enlarge by repetition so that every border falls on a pixel, then average.
    (width, height), (new_width, new_height) = source, target
    image = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    small = resize_cover(image, new_width, new_height)
    assert small.shape == (new_height, new_width, 3)
    scale = min(width / new_width, height / new_height)
    x0, y0 = (width - scale * new_width) / 2, (height - scale * new_height) / 2
    for y in range(new_height):
        for x in range(new_width):
            columns = _parts(x0 + x * scale, x0 + (x + 1) * scale, width)
            rows = _parts(y0 + y * scale, y0 + (y + 1) * scale, height)
            mean = np.einsum("h,w,hwc->c", rows, columns, image.astype(float))
            assert np.abs(small[y, x] - mean).max() <= 0.51


def _parts(low, high, size):
    parts = np.array([max(0.0, min(high, i + 1) - max(low, i)) for i in range(size)])
    return parts / parts.sum()


def test_enlarging_is_lanczos():
    image = photo(16, 16)
    reference = Image.fromarray(image).resize((48, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(resize_cover(image, 48, 48), np.asarray(reference))


@pytest.mark.parametrize(("width", "height"), [(40, 40), (20, 40), (60, 10), (90, 60), (13, 57)])
def test_the_centre_is_kept_and_nothing_is_stretched(width, height):
    image = np.zeros((40, 60, 3), np.uint8)
    image[18:22, 28:32] = 255  # a square in the middle stays a square in the middle
    result = resize_cover(image, width, height)[..., 0].astype(float)
    assert result.shape == (height, width)
    rows, columns = result.sum(1), result.sum(0)
    centre = (rows @ np.arange(height)) / rows.sum(), (columns @ np.arange(width)) / columns.sum()
    assert centre == pytest.approx(((height - 1) / 2, (width - 1) / 2), abs=0.1)
    spread = [
        np.sqrt(profile @ (np.arange(len(profile)) - middle) ** 2 / profile.sum())
        for profile, middle in zip((rows, columns), centre, strict=True)
    ]
    assert spread[0] == pytest.approx(spread[1], rel=0.35)
