"""Writes and reads videos, PNG images and folders of PNG frames.

A file appears whole or not at all. What made a sample (prompt, seed, steps, …) travels in it: as
JSON in the `comment` of a video, as text chunk `menma` in a PNG.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageSequence, PngImagePlugin

from trainer.contract.errors import DataError
from trainer.contract.files import atomic_path, disk_errors, utf8
from trainer.data.frame_pixels import rgb_pixels

Frame = NDArray[np.uint8]
"""One picture, (H, W, 3), RGB."""
AnyFrame = Frame | NDArray[np.uint16]
"""The same, or with 16 bits a colour for formats that keep more than 8."""

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg", ".gif"}
)
_IMAGE_SUFFIXES = frozenset({".png", ".webp", ".gif", ".jpg", ".jpeg"})
EXIF_DESCRIPTION = 0x010E
_EXIF = {EXIF_DESCRIPTION: "description", 0x010F: "make", 0x0110: "model"}
_PNG_KEY = "menma"
_H273_BT709 = 1


@dataclass(frozen=True, slots=True)
class Codec:
    """An encoder of PyAV, and the container its packets go into."""

    name: str
    container: str
    pix_fmt: str
    options: Mapping[str, str] = field(default_factory=dict)
    tag: str = ""
    """Four letters that name the codec in the container; empty: the usual ones."""
    even: tuple[int, int] = (1, 1)
    """Height and width must be multiples of these."""


def h264(crf: int = 17) -> Codec:
    """Return x264 in mp4; CRF 0 is lossless, 17 visually lossless, 51 the worst."""
    return Codec("libx264", "mp4", "yuv420p", {"crf": str(crf)}, even=(2, 2))


def write_video(
    path: Path,
    frames: Iterable[Frame],
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    crf: int = 17,
) -> None:
    """Encode frames to H.264 (yuv420p, mp4); see `encode_video`.

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
    encode_video(path, frames, fps, metadata, h264(crf))


def encode_video(
    path: Path,
    frames: Iterable[AnyFrame],
    fps: float,
    metadata: Mapping[str, Any] | None,
    codec: Codec,
) -> None:
    """Encode frames one by one, and put the file in place.

    Where the codec asks for it, an odd width or height is made even by repeating the last column
    or row: yuv420p has one colour sample for 2 x 2 pixels.

    Raises:
        DiskError: disk full or read-only.
        ValueError: no frame.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a video needs a frame")
    height, width = _padded(first, codec.even).shape[:2]
    muxer = {"movflags": "faststart"} if codec.container in {"mp4", "mov"} else {}
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary), "w", format=codec.container, options=muxer) as container,
    ):
        if metadata:
            container.metadata["comment"] = as_json(metadata)
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast(
            "VideoStream", container.add_stream(codec.name, rate=rate, options=dict(codec.options))
        )
        stream.width, stream.height = width, height
        stream.pix_fmt = codec.pix_fmt
        if codec.tag:
            stream.codec_context.codec_tag = codec.tag
        _tag_bt709(stream.codec_context)
        for frame in chain([first], frames):
            layout = "rgb24" if frame.dtype == np.uint8 else "rgb48le"
            picture = av.VideoFrame.from_ndarray(_padded(frame, codec.even), format=layout)
            container.mux(stream.encode(_to_bt709(picture, codec.pix_fmt)))
        container.mux(stream.encode(None))


def write_png(path: Path, frame: AnyFrame, metadata: Mapping[str, Any] | None = None) -> None:
    """Write one picture; `metadata` becomes JSON in its text chunk.

    Raises:
        DiskError: disk full or read-only.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG", pnginfo=_png_info(metadata))


def write_frames(
    folder: Path, frames: Iterable[AnyFrame], metadata: Mapping[str, Any] | None = None
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
    return Video(np.stack(frames), float(rate or 0), read_metadata(path))


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode a video, a WebP or a folder of PNGs, picture by picture, uint8 (H, W, 3).

    Raises:
        DataError: missing or damaged.
    """
    if path.is_dir():
        for file in sorted(path.glob("*.png")):
            yield from _moving_image(file)
        return
    if path.suffix.lower() == ".webp":
        yield from _moving_image(path)
        return
    with _open(path) as container:
        for picture in _decoded(path, container):
            yield rgb_pixels(picture)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what Menma wrote into a video or an image; empty for files of others.

    Raises:
        DataError: missing or damaged.
    """
    texts = read_texts(path)
    return _from_json(texts.get(_PNG_KEY) or texts.get("comment") or texts.get("description", ""))


def read_texts(path: Path) -> dict[str, str]:
    """Return all words that a video or an image says of itself, by the names of their tags.

    An image's EXIF tags have the names `description`, `make` and `model`, a GIF's comment is
    `comment`, as a video's. Names are in small letters: a webm writes them in capitals.

    Raises:
        DataError: missing or damaged.
    """
    if path.suffix.lower() not in _IMAGE_SUFFIXES:
        with _open(path) as container:
            return {key.lower(): value for key, value in container.metadata.items()}
    try:
        with Image.open(path) as image:
            texts = {str(key).lower(): _text(value) for key, value in image.info.items()}
            exif = image.getexif() if "exif" in image.info else {}
            return texts | {name: str(exif[tag]) for tag, name in _EXIF.items() if tag in exif}
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: a damaged PNG
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


def _moving_image(path: Path) -> Iterator[NDArray[np.uint8]]:
    # FFmpeg reads still WebP only.
    try:
        with Image.open(path) as image:
            for picture in ImageSequence.Iterator(image):
                yield np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not an image that can be read: {error}") from error


def _tag_bt709(codec: av.VideoCodecContext) -> None:
    # Untagged, players guess the matrix from the size, and colours differ from player to player.
    codec.colorspace = Colorspace.ITU709
    codec.color_primaries = codec.color_trc = _H273_BT709
    codec.color_range = ColorRange.MPEG


def _to_bt709(picture: av.VideoFrame, pix_fmt: str) -> av.VideoFrame:
    converted = picture.reformat(
        format=pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    # ProRes writes the tags of the frames, not those of the stream.
    converted.color_primaries = converted.color_trc = _H273_BT709
    return converted


def _padded(frame: AnyFrame, even: tuple[int, int]) -> AnyFrame:
    height, width = frame.shape[:2]
    sides = ((0, -height % even[0]), (0, -width % even[1]), (0, 0))
    return cast("AnyFrame", np.pad(frame, sides, mode="edge"))


def _png_info(metadata: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo | None:
    if not metadata:
        return None
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_PNG_KEY, as_json(metadata))
    return info


def as_json(metadata: Mapping[str, Any], *, ascii_only: bool = False) -> str:
    """Return metadata as JSON; with `ascii_only`, other letters are escaped."""
    return utf8(json.dumps(metadata, ensure_ascii=ascii_only, default=str)).decode()


def _from_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):  # another program's comment
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
