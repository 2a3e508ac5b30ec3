"""Writes and reads H.264 videos, PNG images and folders of PNG frames.

A file appears whole or not at all. What made a sample (prompt, seed, steps, …) travels in it: as
JSON in the mp4's `comment`, as text chunk `menma` in a PNG.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from trainer.contract.errors import DataError
from trainer.contract.files import atomic_path, disk_errors
from trainer.data.frame_pixels import rgb_pixels

Frame = NDArray[np.uint8] | NDArray[np.uint16]
"""One picture, (H, W, 3), RGB, 8 bits a colour; 16 for formats that keep more than 8."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".gif"}
)
_PNG_KEY = "menma"
_H273_BT709 = 1


def write_video(
    path: Path,
    frames: Iterable[Frame],
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    crf: int = 17,
) -> None:
    """Encode frames to H.264 (yuv420p, mp4), one by one, and put the file in place.

    An odd width or height is made even by repeating the last column or row: yuv420p has one colour
    sample for 2 x 2 pixels.

    Args:
        path: the mp4; what was there is replaced once the new file is whole.
        frames: uint8 (H, W, 3), all of one size; consumed as they come.
        fps: frames a second.
        metadata: kept as JSON in the `comment`.
        crf: quality of x264, 0 lossless to 51; 17 is visually lossless.

    Raises:
        DiskError: disk full or read-only.
        ValueError: no frame.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a video needs a frame")
    height, width = first.shape[:2]
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        if metadata:
            container.metadata["comment"] = _to_json(metadata)
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)}
        )
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        _tag_bt709(stream.codec_context)
        for frame in chain([first], frames):
            picture = av.VideoFrame.from_ndarray(_even(frame), format="rgb24")
            container.mux(stream.encode(_to_bt709(picture)))
        container.mux(stream.encode(None))


def write_png(path: Path, frame: Frame, metadata: Mapping[str, Any] | None = None) -> None:
    """Write one picture; `metadata` becomes JSON in its text chunk.

    Raises:
        DiskError: disk full or read-only.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", pnginfo=_png_info(metadata))


def write_frames(
    folder: Path, frames: Iterable[Frame], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write 00000.png, 00001.png, … into a new folder, which appears when it is whole.

    Raises:
        DiskError: disk full or read-only.
        FileExistsError: `folder` exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    partial = folder.parent / f".{folder.name[:80]}.{secrets.token_hex(4)}.partial"
    with disk_errors(folder):
        partial.mkdir(parents=True)
        try:
            for index, frame in enumerate(frames):
                write_png(partial / f"{index:05d}.png", frame, metadata)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@dataclass(frozen=True, slots=True)
class Video:
    """A decoded video: frames uint8 (F, H, W, 3), RGB."""

    frames: NDArray[np.uint8]
    fps: float
    metadata: Mapping[str, Any]


def read_video(path: Path) -> Video:
    """Decode a whole video.

    Raises:
        DataError: missing, damaged, or without a picture.
    """
    with _open(path) as container:
        rate = container.streams.video[0].average_rate
        frames = [rgb_pixels(picture) for picture in _decoded(path, container)]
        if not frames:
            raise DataError(f"{path} holds no picture")
        return Video(np.stack(frames), float(rate or 0), _from_json(_comment(container)))


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode a video picture by picture, uint8 (H, W, 3).

    Raises:
        DataError: missing or damaged.
    """
    with _open(path) as container:
        for picture in _decoded(path, container):
            yield rgb_pixels(picture)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what Menma wrote into a video or PNG; empty for files of others.

    Raises:
        DataError: missing or damaged.
    """
    if path.suffix.lower() != ".png":
        with _open(path) as container:
            return _from_json(_comment(container))
    try:
        with Image.open(path) as image:
            return _from_json(str(image.info.get(_PNG_KEY, "")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an image that can be read: {error}") from error


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} is not a video that can be read: {error}") from error
    with container:
        if not container.streams.video:
            raise DataError(f"{path} has no picture, only sound")
        yield container


def _decoded(path: Path, container: InputContainer) -> Iterator[av.VideoFrame]:
    try:
        yield from container.decode(video=0)
    except av.FFmpegError as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _comment(container: InputContainer) -> str:
    return container.metadata.get("comment", "")


def _tag_bt709(codec: av.VideoCodecContext) -> None:
    # Untagged, players guess the matrix from the size, and colours differ from player to player.
    codec.colorspace = Colorspace.ITU709
    codec.color_primaries = codec.color_trc = _H273_BT709
    codec.color_range = ColorRange.MPEG


def _to_bt709(picture: av.VideoFrame) -> av.VideoFrame:
    return picture.reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )


def _even(frame: Frame) -> Frame:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _png_info(metadata: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo | None:
    if not metadata:
        return None
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_PNG_KEY, _to_json(metadata))
    return info


def _to_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, default=str)


def _from_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:  # another program's comment
        return {}
    return value if isinstance(value, dict) else {}
