"""Makes clips whose frames can be told apart: each shows its own number in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def numbered_frame(number: int, width: int = 128, height: int = 64) -> np.ndarray:
    """Return an RGB image of 8 vertical bars, white where `number` has a 1 (lowest bit left)."""
    image = np.full((height, width, 3), 16, np.uint8)
    bar = width // BITS
    for bit in range(BITS):
        if number >> bit & 1:
            image[:, bit * bar : (bit + 1) * bar] = 240
    return image


def read_number(image: np.ndarray) -> int:
    """Return the number that a frame shows, at any size."""
    height, width = image.shape[:2]
    bar = width / BITS
    return sum(
        int(image[height // 2, int((bit + 0.5) * bar)].mean() > 128) << bit for bit in range(BITS)
    )


def write_video(
    path: Path,
    num_frames: int = 24,
    *,
    fps: int | Fraction = 24,
    size: tuple[int, int] = (128, 64),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
    rotation: float = 0,
    images: Sequence[np.ndarray] | None = None,
    first_number: int = 0,
) -> Path:
    """Write a numbered clip; `times_ms` gives each frame its own time stamp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [numbered_frame(first_number + n, *size) for n in range(num_frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18"} if options is None else options
        stream.codec_context.time_base = Fraction(1, 1000) if times_ms else 1 / Fraction(fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = times_ms[number] if times_ms else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_images(folder: Path, num_frames: int = 9, *, size: tuple[int, int] = (128, 64)) -> Path:
    """Write a folder of numbered PNGs, named so that sorting as text would mix them up."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_frames):
        Image.fromarray(numbered_frame(number, *size)).save(folder / f"frame_{number}.png")
    return folder


def write_caption(media: Path, caption: str) -> None:
    """Write a caption beside a clip or a folder."""
    path = Path(f"{media}.txt") if media.is_dir() else media.with_suffix(".txt")
    path.write_text(caption, "utf-8")
