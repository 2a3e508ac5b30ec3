from __future__ import annotations

from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av import VideoFrame
from data_clips import numbered_frame, read_number, write_images, write_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.contract.errors import DataError
from trainer.data import media
from trainer.data.media import index_clip, probe, read_window, to_video
from trainer.data.resampling import constant_rate, nearest_frames

B_FRAMES = {"preset": "medium", "crf": "20", "bf": "3", "g": "12"}
OPEN_GOP = B_FRAMES | {"x264-params": "open-gop=1:scenecut=0"}
FIXTURES = [HealthCheck.function_scoped_fixture]
X265 = "keyint=12:min-keyint=12:open-gop=1:bframes=3:log-level=none"

CLIPS = {
    "b_frames.mp4": {"options": B_FRAMES},
    "open_gop.mp4": {"options": OPEN_GOP},
    "open_gop.mkv": {"options": OPEN_GOP},
    "open_gop.flv": {"options": OPEN_GOP},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "fast", "x265-params": X265}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"speed": "8", "g": "15"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}},
    "one_gop.mov": {},
}


def numbers(clip, frames):
    return [read_number(image) for image in read_window(clip, frames, (64, 32)).numpy()]


@pytest.mark.parametrize("name", CLIPS)
def test_every_window_holds_exactly_its_frames(tmp_path, name):
    path = write_video(tmp_path / name, 40, **CLIPS[name])
    clip = index_clip(path, "video", target_fps=16)
    assert (clip.num_frames, clip.width, clip.height) == (40, 128, 64)
    for start in (0, 1, 10, 11, 12, 13, 23, 24, 29, 35):
        assert numbers(clip, range(start, start + 5)) == list(range(start, start + 5))
    assert probe(path, "video").num_frames == 40


@pytest.mark.parametrize("name", ["open_gop.mp4", "open_gop.mkv", "vp9.webm"])
def test_late_windows_start_at_a_key_frame(tmp_path, name, monkeypatch):
    path = write_video(tmp_path / name, 40, **CLIPS[name])
    clip = index_clip(path, "video", target_fps=16)
    monkeypatch.setattr(media, "_decode_from_start", lambda *_: iter(()))
    assert numbers(clip, range(30, 35)) == list(range(30, 35))


def test_a_misleading_index_leads_back_to_the_start(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 40, options=OPEN_GOP)
    clip = index_clip(path, "video", target_fps=16)

    class SeeksTooFar:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def seek(self, offset, **more):
            self.container.seek(offset * 10, **more)

    original = media._opened

    @contextmanager
    def opened(path):
        with original(path) as (container, stream):
            yield SeeksTooFar(container), stream

    monkeypatch.setattr(media, "_opened", opened)
    assert numbers(clip, range(14, 19)) == list(range(14, 19))


def test_windows_of_images_in_the_order_people_count(tmp_path):
    clip = index_clip(write_images(tmp_path / "walk", 12), "video", target_fps=16)
    assert clip.num_frames == 12
    assert numbers(clip, range(8, 12)) == [8, 9, 10, 11]


def test_images_of_two_sizes_are_no_clip(tmp_path):
    folder = write_images(tmp_path / "walk", 2)
    write_images(tmp_path / "other", 1, size=(64, 64))
    (tmp_path / "other" / "frame_0.png").rename(folder / "frame_9.png")
    with pytest.raises(DataError, match=r"frame_0.png has 128x64, frame_9.png 64x64"):
        index_clip(folder, "video", target_fps=16)


@pytest.mark.parametrize(
    ("fps", "source_fps", "expected"),
    [
        (
            24,
            24.0,
            [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16],
        ),  # 0.75 s make 12
        (16, 16.0, list(range(18))),
        (32, 32.0, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (8, 8.0, [n // 2 for n in range(36)]),
        (48, 16.0, list(range(18))),  # constant rate: the user's word counts, not the file's
    ],
)
def test_resampling_takes_the_nearest_frame(tmp_path, fps, source_fps, expected):
    path = write_video(tmp_path / "a.mp4", 18, fps=fps)
    clip = index_clip(path, "video", target_fps=16, source_fps=source_fps)
    assert list(clip.source_frames) == expected
    assert numbers(clip, range(clip.num_frames)) == expected


def test_varying_rate_follows_the_time_stamps(tmp_path):
    # 10 frames a second for a second, then 40: at 20 a second, each of the first twice.
    times = [n * 100 for n in range(10)] + [1000 + n * 25 for n in range(20)]
    path = write_video(tmp_path / "v.mkv", 30, times_ms=times, options=OPEN_GOP)
    clip = index_clip(path, "video", target_fps=20, source_fps=24.0)
    expected = [n // 2 for n in range(20)] + [10 + 2 * n for n in range(10)]
    # In the middle between two frames the earlier is taken, except before the change of rate.
    assert numbers(clip, range(clip.num_frames)) == expected


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16]),
        (16, list(range(18))),
        (32, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
    ],
)
def test_auto_takes_each_clip_at_its_own_rate(tmp_path, fps, expected):
    path = write_video(tmp_path / "a.mp4", 18, fps=fps)
    clip = index_clip(path, "video", target_fps=16, source_fps="auto")
    assert numbers(clip, range(clip.num_frames)) == expected
    times = [n * 100 for n in range(10)] + [1000 + n * 25 for n in range(20)]
    varying = write_video(tmp_path / "v.mkv", 30, times_ms=times)
    clips = [
        index_clip(varying, "video", target_fps=20, source_fps=rate) for rate in (24.0, "auto")
    ]
    assert clips[0].source_frames == clips[1].source_frames


def test_a_folder_of_images_has_no_rate_of_its_own(tmp_path):
    folder = write_images(tmp_path / "walk", 3)
    with pytest.raises(DataError, match="no rate of its own"):
        index_clip(folder, "video", target_fps=16, source_fps="auto")


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p10le", "yuv420p"])
def test_ten_bits_are_brought_to_eight_without_losing_the_range(tmp_path, pix_fmt):
    """Grey ramps in limited range: black is 64 of 1023 and white 940 (16 and 235 of 255)."""
    deep = "10" in pix_fmt
    luma = np.linspace(64, 940, 128) if deep else np.linspace(16, 235, 128)
    luma = np.tile(luma.round(), (64, 1)).astype(np.uint16 if deep else np.uint8)
    planes = VideoFrame(128, 64, pix_fmt)
    for index, plane in enumerate(planes.planes):
        values = luma if index == 0 else np.full((plane.height, plane.width), 512 if deep else 128)
        row = plane.line_size // luma.itemsize
        padded = np.zeros((plane.height, row), luma.dtype)
        padded[:, : plane.width] = values
        plane.update(padded.tobytes())
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 128, 64, pix_fmt
        for number in range(5):
            planes.pts = number
            container.mux(stream.encode(planes))
        container.mux(stream.encode(None))
    clip = index_clip(tmp_path / "a.mkv", "video", target_fps=16)
    frames = read_window(clip, range(5), (128, 64)).numpy()
    black, white = (64, 940) if deep else (16, 235)
    expected = (luma[0].astype(float) - black) / (white - black) * 255
    assert np.abs(frames[:, 32].astype(float) - expected[None, :, None]).max() <= 1.5
    assert frames.min() <= 1
    assert frames.max() >= 254


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), 25, 60])
def test_rounded_time_stamps_are_still_a_constant_rate(tmp_path, rate):
    for name in ("a.mp4", "a.mkv"):
        path = write_video(tmp_path / name, 33, fps=rate)
        assert constant_rate(index_clip(path, "video", target_fps=1).pts)


@given(
    gaps=st.lists(st.integers(5, 200), min_size=1, max_size=60),
    fps=st.sampled_from([16.0, 24.0, 7.3]),
)
def test_resampling_is_nearest_by_brute_force(gaps, fps):
    times = [sum(gaps[:n]) / 1000 for n in range(len(gaps))]
    end = sum(gaps) / 1000
    frames = nearest_frames(times, end, fps)
    assert len(frames) == max(1, int(end * fps + 1e-6))
    for moment, frame in enumerate(frames):
        distances = [abs(time - moment / fps) for time in times]
        assert distances[frame] <= min(distances) + 2e-6
    assert list(frames) == sorted(frames)


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_rotation_is_applied(tmp_path, turn):
    image = np.full((64, 128, 3), 16, np.uint8)
    image[:32, :64] = 240  # top left
    path = write_video(tmp_path / "a.mp4", images=[image] * 3, rotation=turn)
    expected = np.rot90(image, turn // 90)  # both count counter-clockwise
    clip = index_clip(path, "video", target_fps=16)
    assert (clip.height, clip.width) == expected.shape[:2]
    assert (probe(path, "video").width, probe(path, "video").height) == (clip.width, clip.height)
    frame = read_window(clip, range(1), (clip.width, clip.height))[0].numpy()
    assert np.abs(frame.astype(int) - expected).mean() < 8


def test_anamorphic_pixels_count_by_their_shown_width(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(numbered_frame(5, 96, 64), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = index_clip(path, "video", target_fps=16)
    assert (clip.width, clip.height) == (128, 64)
    frame = read_window(clip, range(1), (128, 64))[0].numpy()
    assert np.abs(frame.astype(int) - numbered_frame(5, 128, 64)).mean() < 8


@pytest.mark.parametrize("colorspace", [1, 5])  # BT.709, BT.601
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_colours_follow_the_files_matrix(tmp_path, colorspace, pix_fmt):
    path, name = tmp_path / "a.mp4", {1: "ITU709", 5: "ITU601"}[colorspace]
    image = np.full((64, 64, 3), (200, 40, 90), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        stream.codec_context.colorspace = colorspace
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format=pix_fmt, dst_colorspace=name)
        frame.pts, frame.colorspace = 0, colorspace
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = index_clip(path, "video", target_fps=16)
    pixel = read_window(clip, range(1), (64, 64))[0, 32, 32].int()
    assert (pixel - torch.tensor([200, 40, 90])).abs().max() <= 4


def test_pixels_reach_both_ends_of_the_range():
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(5, 4, 2, 3)
    video = to_video(frames)
    assert video.shape == (3, 5, 4, 2)
    assert video.dtype == torch.float32
    assert (video.min(), video.max()) == (-1, 1)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.6])
def test_cut_off_files_are_refused(tmp_path, name, part):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 128, 3), np.uint8)
    whole = write_video(tmp_path / f"whole-{name}", images=list(noise))
    path = tmp_path / name
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
    with pytest.raises(DataError):
        index_clip(path, "video", target_fps=16)
    with pytest.raises(DataError):
        probe(path, "video")


def test_a_fast_start_file_that_was_cut_off_is_noticed_without_decoding_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 128, 3), np.uint8)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for number, image in enumerate(noise):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert probe(path, "video").num_frames == 60
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cut off"):
        probe(path, "video")


def test_damaged_pictures_are_found_or_harmless(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 30, options=OPEN_GOP).read_bytes()
    generator = np.random.default_rng(1)
    path, refused = tmp_path / "a.mp4", 0
    for _ in range(30):
        content = bytearray(whole)
        pictures = content.index(b"mdat") + 4, content.index(b"moov") - 104
        start = int(generator.integers(*pictures))
        content[start : start + 100] = generator.bytes(100)
        path.write_bytes(content)
        try:
            clip = index_clip(path, "video", target_fps=16)
            shown = numbers(clip, range(clip.num_frames))
        except DataError:
            refused += 1
        else:
            assert shown == list(range(clip.num_frames))
    assert refused > 5


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".mp4", ".mkv", ".avi", ".mpg"]))
def test_any_bytes_are_a_data_error(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for look in (lambda: probe(path, "video"), lambda: index_clip(path, "video", target_fps=16)):
        with pytest.raises(DataError):
            look()


def test_sound_without_pictures_is_no_clip(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match="no video"):
        probe(path, "video")


def test_a_file_that_is_not_there_is_a_data_error(tmp_path):
    with pytest.raises(DataError):
        probe(tmp_path / "a.mp4", "video")
    with pytest.raises(DataError):
        probe(tmp_path / "a.png", "image")
