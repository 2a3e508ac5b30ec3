"""The job `frames`: some frames of a clip as small PNG files, for who cannot decode videos.

Loads no torch, so that it answers in well under a second.
"""

from __future__ import annotations

from trainer.contract.errors import DataError
from trainer.contract.jobs import FramesRequest
from trainer.data.media import index_clip
from trainer.data.stills import chosen, fitted, kind_of, read_stills, spread
from trainer.jobs.base import Emit
from trainer.sampling.video_io import write_png


def run(request: FramesRequest, emit: Emit) -> None:
    """Write the pictures; the `end` event says what they are and what the clip is.

    Its fields: `files` (names in `request.output`), `numbers` (frames, in the same order),
    `num_frames`, `width`, `height` of the clip as seen, `fps` (None: not constant, or images).

    Raises:
        DataError: the clip cannot be read, is damaged, or has no such frame; names it.
        DiskError: the pictures cannot be written.
    """
    path = request.path
    if not path.exists():
        raise DataError(f"there is no {path}")
    try:
        kind = kind_of(path)
        clip = index_clip(path, kind, target_fps=1)
        count = clip.num_frames
        numbers = chosen(count, request.frames) or spread(count, request.num_frames)
        size = fitted(clip.width, clip.height, request.max_width, request.max_height)
        for number, pixels in read_stills(clip, numbers, size):
            write_png(request.output / _name(number), pixels)
    except DataError as error:
        raise DataError(f"{path} {error.message}", hint=error.hint) from None
    emit(
        "end",
        reason="done",
        files=[_name(number) for number in numbers],
        numbers=numbers,
        num_frames=count,
        width=clip.width,
        height=clip.height,
        fps=clip.file_fps and round(clip.file_fps, 3),
    )


def _name(number: int) -> str:
    return f"frame_{number:05d}.png"
