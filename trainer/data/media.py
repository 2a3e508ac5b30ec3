"""Clips: what is in them, and exact windows of their frames.

A clip is a video file, a folder of images, or one image (a clip of one frame). Frames are found by
their time stamps, so a window holds the same frames whether the decoder came from the start or
from a key frame in the middle, with B-frames and open groups of pictures, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from trainer.contract.dataset_config import MediaKind, SourceFps
from trainer.contract.errors import DataError
from trainer.data.frame_pixels import rgb_pixels
from trainer.data.images import image_size, read_image
from trainer.data.resampling import constant_rate, nearest_frames
from trainer.data.resize import Pixels, resize_cover
from trainer.data.sources.item import list_images

if TYPE_CHECKING:  # torch is loaded by who wants tensors: looking at clips starts without it
    from torch import Tensor

_EXACT_CONTAINERS = {"mov", "mp4", "m4a", "3gp", "3g2", "mj2"}
_LENGTH_IN_HEADER = _EXACT_CONTAINERS | {"matroska", "webm"}


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """What `probe` tells of a clip."""

    width: int
    """As seen: after rotation, with square pixels."""
    height: int
    num_frames: int
    fps: float | None = None
    """Mean rate; None for images."""
    duration_s: float | None = None
    constant_rate: bool | None = None
    """Whether frames are evenly spaced in time; None for images, and where nobody has looked."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip whose frames have been listed, so that any of them can be read."""

    path: Path
    width: int
    """As seen: after rotation, with square pixels."""
    height: int
    source_frames: tuple[int, ...]
    """The file's frame for each frame of the clip; not 0, 1, 2, … after resampling in time."""
    images: tuple[Path, ...] = ()
    """The files, when the clip is an image or a folder of images."""
    pts: tuple[int, ...] = ()
    """Time stamp of each frame of the file; empty: it has none to rely on, frames are counted."""
    key_pts: tuple[int, ...] = ()
    """Time stamps of frames that decoding can start at."""
    file_fps: float | None = None
    """Rate that the file gives, if it is constant."""
    mean_fps: float | None = None
    duration_s: float | None = None
    """Of the file, before resampling; None for images."""

    @property
    def num_frames(self) -> int:
        """Frames of the clip after resampling in time."""
        return len(self.source_frames)

    @property
    def info(self) -> ClipInfo:
        """What there is to tell of it; frames after resampling, rate and length of the file."""
        constant = None if self.images else self.file_fps is not None
        return ClipInfo(
            self.width, self.height, self.num_frames, self.mean_fps, self.duration_s, constant
        )


def probe(path: Path, kind: MediaKind) -> ClipInfo:
    """Look at a clip without decoding more than its first frame, where its container is reliable.

    MP4 and MOV files list their frames; for these only the end of the file is looked for. The
    packets of other containers are counted.

    Raises:
        DataError: it cannot be read, is damaged, or has no frames.
    """
    if kind == "image" or path.is_dir():
        clip = index_clip(path, kind, target_fps=1)
        return ClipInfo(clip.width, clip.height, clip.num_frames)
    with _opened(path) as (container, stream):
        width, height = _shown_size(_first_frame(container, stream), stream)
        num_frames = _reliable_count(container, stream)
    if num_frames is None:
        packets = _packets(path)
        return ClipInfo(width, height, len(packets.pts), packets.fps, packets.duration_s)
    assert stream.duration is not None
    assert stream.time_base is not None
    duration_s = float(stream.duration * stream.time_base)
    return ClipInfo(width, height, num_frames, num_frames / duration_s, duration_s)


def index_clip(
    path: Path, kind: MediaKind, *, target_fps: float, source_fps: SourceFps | None = None
) -> Clip:
    """List a clip's frames, resampled to `target_fps` if `source_fps` is given.

    Frame k of the result is the one nearest in time to k / target_fps. A constant-rate clip and a
    folder of images run at `source_fps`, whatever the file says; one of varying rate has its own
    time stamps, and those count. With "auto" the time stamps count in any case.

    Raises:
        DataError: it cannot be read, is damaged, or has no frames.
    """
    if kind == "image" or path.is_dir():
        return _index_images(path, kind, target_fps, source_fps)
    with _opened(path) as (container, stream):
        width, height = _shown_size(_first_frame(container, stream), stream)
    packets = _packets(path)
    frames = tuple(range(len(packets.pts)))
    constant = constant_rate(packets.pts)
    if source_fps is not None:
        times = packets.times
        if constant and source_fps != "auto":
            times = tuple(frame / source_fps for frame in frames)
            end = len(frames) / source_fps
        else:
            end = packets.duration_s
        frames = nearest_frames(times, end, target_fps)
    return Clip(
        path,
        width,
        height,
        frames,
        pts=packets.pts if packets.exact else (),
        key_pts=packets.key_pts,
        file_fps=packets.fps if constant else None,
        mean_fps=packets.fps,
        duration_s=packets.duration_s,
    )


def read_window(clip: Clip, frames: range, size: tuple[int, int]) -> Tensor:
    """Return frames of a clip, brought to (width, height): uint8 RGB, frames_FHW3.

    Raises:
        DataError: a frame is missing or damaged.
    """
    import torch

    return torch.from_numpy(read_pixels(clip, frames, size))


def read_pixels(clip: Clip, frames: Sequence[int], size: tuple[int, int]) -> Pixels:
    """Return the same as an array, frames_FHW3; the frames may be any, in any order.

    Raises:
        DataError: a frame is missing or damaged.
    """
    if clip.images:
        return _picture_pixels(clip, frames, size, read_image)
    wanted = [clip.source_frames[frame] for frame in frames]
    resized: dict[int, Pixels] = {}
    for frame, image, pixel_aspect in _decode(clip, sorted(set(wanted))):
        resized[frame] = resize_cover(image, *size, pixel_aspect=pixel_aspect)
    return np.stack([resized[frame] for frame in wanted])


def read_pictures(
    clip: Clip, frames: range, size: tuple[int, int], read: Callable[[Path], Pixels]
) -> Tensor:
    """Return frames of a clip of images, brought to (width, height): uint8, frames_FHW3.

    Args:
        clip: an image, or a folder of images.
        frames: which of them.
        size: width and height.
        read: makes pixels_HW3 of a file.

    Raises:
        DataError: a frame is damaged.
    """
    import torch

    return torch.from_numpy(_picture_pixels(clip, frames, size, read))


def _picture_pixels(
    clip: Clip, frames: Sequence[int], size: tuple[int, int], read: Callable[[Path], Pixels]
) -> Pixels:
    wanted = [clip.source_frames[frame] for frame in frames]
    resized = {frame: resize_cover(read(clip.images[frame]), *size) for frame in set(wanted)}
    return np.stack([resized[frame] for frame in wanted])


def try_frames(clip: Clip, frames: Sequence[int]) -> None:
    """Decode frames of a clip and let go of them.

    Raises:
        DataError: one is missing or damaged.
    """
    wanted = sorted({clip.source_frames[frame] for frame in frames})
    if clip.images:
        for frame in wanted:
            read_image(clip.images[frame])
    else:
        for _ in _decode(clip, wanted):
            pass


def to_video(frames_FHW3: Tensor) -> Tensor:
    """Return uint8 frames as video_3FHW in [-1, 1], float32: what a VAE takes."""
    import torch

    # In place: of a clip of 1280x720x81 a second copy would take 0.9 GB.
    return frames_FHW3.permute(3, 0, 1, 2).to(torch.float32, copy=True).div_(127.5).sub_(1)


def _index_images(
    path: Path, kind: MediaKind, target_fps: float, source_fps: SourceFps | None
) -> Clip:
    images = tuple(list_images(path)) if path.is_dir() else (path,)
    if not images or (kind == "image" and path.is_dir()):
        raise DataError("is a folder, not an image" if kind == "image" else "holds no images")
    sizes = {image: image_size(image) for image in images}
    width, height = sizes[images[0]]
    for image, size in sizes.items():
        if size != (width, height):
            raise DataError(
                f"its frames differ in size: {images[0].name} has {width}x{height}, "
                f"{image.name} {size[0]}x{size[1]}"
            )
    frames = tuple(range(len(images)))
    if source_fps == "auto" and path.is_dir():
        raise DataError(
            "is a folder of images, which has no rate of its own",
            hint='set source_fps to a number instead of "auto", in a source of its own',
        )
    if isinstance(source_fps, float | int) and kind == "video":
        times = tuple(frame / source_fps for frame in frames)
        frames = nearest_frames(times, len(frames) / source_fps, target_fps)
    return Clip(path, width, height, frames, images=images)


@dataclass(frozen=True, slots=True)
class _Packets:
    """A file's frames in the order they are shown."""

    pts: tuple[int, ...]
    key_pts: tuple[int, ...]
    time_base: float
    last_duration: int
    exact: bool
    """Every frame has a time stamp of its own."""

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds from the first frame on."""
        return tuple((pts - self.pts[0]) * self.time_base for pts in self.pts)

    @property
    def duration_s(self) -> float:
        return (self.pts[-1] - self.pts[0] + self.last_duration) * self.time_base

    @property
    def fps(self) -> float | None:
        return len(self.pts) / self.duration_s if self.duration_s > 0 else None


def _packets(path: Path) -> _Packets:
    """Read all packets of a video without decoding; where they have no time stamps, decode."""
    with _opened(path) as (container, stream):
        time_base = float(stream.time_base or 1 / 1000)
        shown, end_s = [], 0.0
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index and packet.size and not packet.is_discard:
                shown.append((packet.pts, packet.is_keyframe, packet.duration or 0))
        _refuse_cut_off(container, end_s)
    stamps = {pts for pts, _, _ in shown if pts is not None}
    exact = len(stamps) == len(shown)
    if not exact:
        shown, time_base = _decoded_frames(path)
    if not shown:
        raise DataError("has no frames")
    shown.sort()
    pts = tuple(stamp for stamp, _, _ in shown if stamp is not None)
    steps = sorted(after - before for before, after in pairwise(pts))
    last_duration = shown[-1][2] or (steps[len(steps) // 2] if steps else 0)
    keys = tuple(stamp for stamp, is_key, _ in shown if is_key and stamp is not None)
    return _Packets(pts, keys, time_base, last_duration, exact)


def _refuse_cut_off(container: InputContainer, end_s: float) -> None:
    """Compare the end of what is there with the length that the file's header promises."""
    if not _LENGTH_IN_HEADER & set(container.format.name.split(",")) or not container.duration:
        return
    promised_s = (container.duration + (container.start_time or 0)) / av.time_base
    if promised_s - end_s > 0.5:
        raise DataError(f"is cut off: {end_s:.1f} s of {promised_s:.1f} s are there")


def _decoded_frames(path: Path) -> tuple[list[tuple[int | None, bool, int]], float]:
    """Count frames by decoding them all; their times are those of an even rate."""
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        count = sum(1 for _ in container.decode(stream))
    return [(frame, False, 1) for frame in range(count)], 1 / rate


def _decode(clip: Clip, wanted: Sequence[int]) -> Iterator[tuple[int, Pixels, float]]:
    """Yield (frame, image_HW3, pixel aspect) of the wanted frames of the file, ascending."""
    found = -1
    with suppress(DataError):
        for frame, image, aspect in _decode_from_key_frame(clip, wanted):
            yield frame, image, aspect
            found = frame
    missing = [frame for frame in wanted if frame > found]
    if missing:
        # There is no key frame to start at, or the container's index led past it.
        for frame, image, aspect in _decode_from_start(clip, missing):
            yield frame, image, aspect
            found = frame
    if found != wanted[-1]:
        frame = next(frame for frame in wanted if frame > found)
        raise DataError(f"frame {frame} is missing or damaged")


def _decode_from_key_frame(
    clip: Clip, wanted: Sequence[int]
) -> Iterator[tuple[int, Pixels, float]]:
    first = clip.pts[wanted[0]] if clip.pts else -1
    key = max((pts for pts in clip.key_pts if pts <= first), default=None)
    if key is None or key == clip.key_pts[0]:
        return
    with _opened(clip.path) as (container, stream):
        container.seek(key, stream=stream, backward=True)
        packets = container.demux(stream)
        packet = next(packets)
        if packet.pts is None or packet.pts > key or packet.pts not in clip.key_pts:
            return
        yield from _pick(_decode_packets(packet, packets), clip, wanted, stream)


def _decode_from_start(clip: Clip, wanted: Sequence[int]) -> Iterator[tuple[int, Pixels, float]]:
    with _opened(clip.path) as (container, stream):
        if clip.pts:
            yield from _pick(container.decode(stream), clip, wanted, stream)
            return
        remaining = set(wanted)
        for number, frame in enumerate(container.decode(stream)):
            if number in remaining:
                yield number, _pixels(frame), _pixel_aspect(frame, stream)
            if number >= wanted[-1]:
                return


def _decode_packets(first: Any, rest: Iterator[Any]) -> Iterator[VideoFrame]:
    yield from first.decode()
    for packet in rest:
        yield from packet.decode()


def _pick(
    decoded: Iterator[VideoFrame], clip: Clip, wanted: Sequence[int], stream: VideoStream
) -> Iterator[tuple[int, Pixels, float]]:
    """Yield the wanted frames in order; stop at the first that does not come whole."""
    remaining = iter(wanted)
    number = next(remaining)
    for frame in decoded:
        if frame.pts is None or frame.pts < clip.pts[number]:
            continue
        if frame.pts > clip.pts[number] or frame.is_corrupt:
            return
        yield number, _pixels(frame), _pixel_aspect(frame, stream)
        following = next(remaining, None)
        if following is None:
            return
        number = following


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame:
    frame = next(container.decode(stream), None)
    if frame is None:
        raise DataError("has no frame that can be decoded")
    return frame


def _reliable_count(container: InputContainer, stream: VideoStream) -> int | None:
    """Return the frame count of the container's own list, if it can be believed."""
    rate, time_base, duration = stream.average_rate, stream.time_base, stream.duration
    if not _EXACT_CONTAINERS & set(container.format.name.split(",")):
        return None
    if not stream.frames or not rate or not time_base or not duration:
        return None
    if abs(float(duration * time_base * rate) - stream.frames) > 0.5:
        return None  # an edit list hides some of them
    container.seek(duration + (stream.start_time or 0), stream=stream, backward=True)
    last = max((p.pts + (p.duration or 0) for p in container.demux(stream) if p.pts), default=0)
    missing = float((duration + (stream.start_time or 0) - last) * time_base * rate)
    if missing > 1.5:
        raise DataError(f"is cut off: about {round(missing)} frames or more are missing")
    return stream.frames


def _pixels(frame: VideoFrame) -> Pixels:
    """Return a frame as it is meant to be seen, RGB (H, W, 3)."""
    return np.ascontiguousarray(np.rot90(rgb_pixels(frame), _quarter_turns(frame)))


def _quarter_turns(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


def _pixel_aspect(frame: VideoFrame, stream: VideoStream) -> float:
    """Width over height of a pixel of the frame as seen."""
    ratio = float(stream.sample_aspect_ratio or 1) or 1.0
    return 1 / ratio if _quarter_turns(frame) % 2 else ratio


def _shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    turned = _quarter_turns(frame) % 2
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    return max(1, round(width * _pixel_aspect(frame, stream))), height


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video; whatever libav says against the file becomes a `DataError`."""
    try:
        if path.stat().st_size == 0:
            raise DataError("is empty (0 bytes)")
        with av.open(str(path)) as container:
            stream = container.streams.best("video")  # not a cover picture
            if not isinstance(stream, VideoStream):
                raise DataError("has no video in it")
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"is damaged or no video: {reason}") from None
