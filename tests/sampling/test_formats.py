"""Every kind of file: size, length, rate, pixels and words come back as they went in."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.contract.config import SamplingSection
from trainer.contract.errors import DataError, RunError
from trainer.contract.sample_formats import (
    SAMPLE_FORMATS,
    FormatEntry,
    format_entry,
    format_rule,
    formats_of_suffix,
)
from trainer.sampling.formats.base import Content, SampleFormat, crf_of, require_encoder
from trainer.sampling.formats.gif import with_comment
from trainer.sampling.latent_files import read_latents
from trainer.sampling.results import read_sample_metadata
from trainer.sampling.video_io import read_frames

METADATA = {"prompt": 'eine "schöne" Katze\n猫 🐈 <&>', "seed": 7, "guidance_scale": [5.0, 4.0]}
VIDEOS = [entry.name for entry in SAMPLE_FORMATS if entry.name not in {"png", "latents"}]
CODECS = {
    "h264": ("h264", "yuv420p"),
    "h265": ("hevc", "yuv420p"),
    "prores": ("prores", "yuv422p10le"),
    "vp9": ("vp9", "yuv420p"),
    "av1": ("libdav1d", "yuv420p10le"),
}


def smooth(num_frames: int, height: int, width: int) -> np.ndarray:
    """Slow gradients in [0, 1]: what a codec keeps."""
    f, y, x = np.meshgrid(*map(np.arange, (num_frames, height, width)), indexing="ij")
    channels = [x / width, y / height, (f + 1) / (num_frames + 1)]
    return np.stack(channels, axis=-1) * 0.8 + 0.1


def content(pixels: np.ndarray, fps: float = 16, *, bits: int = 8, **fields: object) -> Content:
    return Content(frames=in_bits(pixels, bits), fps=fps, **({"metadata": METADATA} | fields))


def in_bits(pixels: np.ndarray, bits: int) -> np.ndarray:
    return (pixels * (2**bits - 1)).round().astype(np.uint8 if bits == 8 else np.uint16)


def write(name: str, folder: Path, pixels: np.ndarray, fps: float = 16, **fields: object) -> Path:
    fmt: SampleFormat = SAMPLE_FORMATS.load(name)
    fmt.check()
    what = content(pixels, fps, bits=fmt.bits, **fields)
    path = folder / f"v{format_entry(name).suffix}"
    fmt.write(path, what)
    assert [p.name for p in folder.iterdir()] == [path.name]
    return path


def psnr(frames: np.ndarray, pixels: np.ndarray) -> float:
    error = ((frames / 255 - pixels) ** 2).mean()
    return float(-10 * np.log10(error))


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("size", [(64, 96), (67, 91)])
def test_a_video_comes_back(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    pixels = smooth(9, *size)
    path = write(name, tmp_path, pixels)
    frames = np.stack(list(read_frames(path)))
    height, width = size
    padded = (height + height % 2, width + width % 2)
    assert frames.shape in {(9, height, width, 3), (9, height, padded[1], 3), (9, *padded, 3)}
    if name in {"vp9", "gif", "webp"}:
        assert frames.shape[1:3] == size
    assert psnr(frames[:, :height, :width], pixels) > (30 if name == "gif" else 36)
    assert read_sample_metadata(path) == METADATA


@pytest.mark.parametrize("name", CODECS)
def test_codec_rate_and_colour_tags(tmp_path: Path, name: str) -> None:
    path = write(name, tmp_path, smooth(25, 64, 64), fps=23.976)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == CODECS[name]
        assert float(stream.average_rate) == pytest.approx(23.976, abs=2e-3)
        pictures = list(container.decode(stream))
        assert float(pictures[-1].time) == pytest.approx(24 / 23.976, abs=2e-3)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)
        assert codec.color_range == 1


@pytest.mark.parametrize("name", CODECS)
def test_colours_are_those_of_the_named_matrix(tmp_path: Path, name: str) -> None:
    colours = np.array([(0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8), (0.85, 0.8, 0.15)])
    pixels = np.broadcast_to(colours[:, None, None], (4, 64, 64, 3))
    path = write(name, tmp_path, pixels, quality=95)
    read = np.stack(list(read_frames(path)))[:, 32, 32] / 255
    assert np.abs(read - colours).max() < 0.02  # the matrix of the other standard is off by 0.08


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_few_frames_are_written_each_time(tmp_path: Path, num_frames: int) -> None:
    """x265 reads past the frames where B-frames have none behind them: it fails now and then."""
    for index in range(15):
        folder = tmp_path / str(index)
        folder.mkdir()
        path = write("h265", folder, smooth(num_frames, 32, 32))
        with av.open(str(path)) as container:
            times = [packet.dts for packet in container.demux(video=0) if packet.size]
            assert times == sorted(set(times))
            assert container.streams.video[0].frames == num_frames
            assert container.duration == pytest.approx(num_frames / 16 * 1e6, abs=2e3)


@pytest.mark.parametrize("name", ["prores", "av1"])
def test_ten_bits_are_ten_bits(tmp_path: Path, name: str) -> None:
    """A grey ramp of 400 columns over a quarter of the range has more steps than 8 bits have."""
    ramp = np.broadcast_to(np.linspace(0.4, 0.65, 400)[None, None, :, None], (5, 64, 400, 3))
    path = write(name, tmp_path, ramp, quality=100)
    with av.open(str(path)) as container:
        luma = next(container.decode(video=0)).to_ndarray(format="gray10le")[32]
    assert len(np.unique(luma)) > 150  # 8 bits have some 55


@pytest.mark.parametrize("name", ["gif", "webp"])
@pytest.mark.parametrize("fps", [16, 24, 10])
def test_images_play_as_long_as_they_should(tmp_path: Path, name: str, fps: int) -> None:
    path = write(name, tmp_path, smooth(33, 16, 16), fps=fps)
    durations = []
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            durations.append(image.info["duration"])
    assert len(durations) == 33
    assert sum(durations) / 1000 == pytest.approx(33 / fps, abs=0.011)


@pytest.mark.parametrize("name", [entry.name for entry in SAMPLE_FORMATS])
def test_quality_changes_the_size_where_there_is_one(tmp_path: Path, name: str) -> None:
    if not format_entry(name).has_quality:
        sampling = SamplingSection(format=name, quality=50)
        assert [problem.key for problem in format_rule(sampling)] == ["sampling.quality"]
        return
    noisy = np.clip(
        smooth(5, 64, 64) + np.random.default_rng(0).normal(0, 0.1, (5, 64, 64, 3)), 0, 1
    )
    sizes = []
    for quality in (5, 60, 100):
        folder = tmp_path / str(quality)
        folder.mkdir()
        sizes.append(write(name, folder, noisy, quality=quality).stat().st_size)
    assert sizes == sorted(set(sizes))


def test_the_rate_factor_of_a_quality() -> None:
    assert [crf_of(quality, 17, 51) for quality in (None, 100, 1)] == [17, 1, 51]


def test_an_encoder_that_is_not_there_is_named() -> None:
    with pytest.raises(RunError, match="no encoder nonesuch") as raised:
        require_encoder("nonesuch")
    assert "--format" in raised.value.hint


@pytest.mark.parametrize("name", VIDEOS)
def test_no_frame_is_no_video(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="needs a frame"):
        write(name, tmp_path, np.zeros((0, 16, 16, 3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", VIDEOS)
def test_nothing_is_said_when_nothing_shall_be(tmp_path: Path, name: str) -> None:
    path = write(name, tmp_path, smooth(5, 64, 64), metadata={})
    assert read_sample_metadata(path) == {}
    assert b"Katze" not in path.read_bytes()


def test_png_is_a_file_or_a_folder(tmp_path: Path) -> None:
    pixels = smooth(3, 17, 19)
    PNG = SAMPLE_FORMATS.load("png")
    PNG.write(tmp_path / "i.png", content(pixels[:1]))
    PNG.write(tmp_path / "f", content(pixels))
    exact = (pixels * 255).round().astype(np.uint8)
    assert (np.asarray(Image.open(tmp_path / "i.png")) == exact[0]).all()
    files = sorted((tmp_path / "f").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    assert all((np.asarray(Image.open(f)) == e).all() for f, e in zip(files, exact, strict=True))
    for path in (tmp_path / "i.png", tmp_path / "f", files[1]):
        assert read_sample_metadata(path) == METADATA


def test_latents_come_back_bit_for_bit(tmp_path: Path) -> None:
    latents = torch.randn(16, 3, 4, 6)
    path = write("latents", tmp_path, np.zeros(0), latents_CFHW=latents, fps=24)
    read = read_latents(path, channels=16)
    assert torch.equal(read.latents_CFHW, latents)
    assert (read.metadata, read.fps) == (METADATA, 24)
    assert read_sample_metadata(path) == METADATA
    with pytest.raises(DataError, match="16 channels, and this VAE decodes 48"):
        read_latents(path, channels=48)


def test_a_comment_of_any_length_is_in_the_gif(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "plain.gif")
    for length in (1, 254, 255, 256, 700):
        comment = bytes(97 + index % 26 for index in range(length))
        path = tmp_path / f"{length}.gif"
        path.write_bytes(with_comment((tmp_path / "plain.gif").read_bytes(), comment))
        with Image.open(path) as image:
            assert image.info["comment"] == comment
            assert image.convert("RGB").getpixel((1, 1)) == (9, 9, 9)


ODD_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("name", ["h264", "prores", "vp9", "gif", "webp", "latents"])
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompt=ODD_TEXTS, negative=ODD_TEXTS)
def test_any_words_come_back(tmp_path: Path, name: str, prompt: str, negative: str) -> None:
    metadata = {"prompt": prompt, "negative_prompt": negative, "seed": 1}
    what = content(smooth(1, 64, 64), metadata=metadata, latents_CFHW=torch.zeros(16, 1, 2, 2))
    path = tmp_path / f"w{format_entry(name).suffix}"
    SAMPLE_FORMATS.load(name).write(path, what)
    assert read_sample_metadata(path) == metadata


@pytest.mark.parametrize(
    ("name", "hint"), [("mp4", "h264 or h265"), ("GIF", "gif"), ("h264x", "h264")]
)
def test_unknown_formats_have_a_hint(name: str, hint: str) -> None:
    (problem,) = format_rule(SamplingSection(format=name))
    assert hint in problem.hint


def test_endings_name_formats() -> None:
    assert formats_of_suffix(".MP4") == ("h264", "h265")
    assert formats_of_suffix(".txt") == ()
    assert all(isinstance(entry, FormatEntry) for entry in SAMPLE_FORMATS)
