"""The job `data_preview`: items as they will be trained, on a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.contract.errors import DataError
from trainer.contract.jobs import DataPreviewRequest
from trainer.data.checks import DatasetCheck, LookedClip, LookedSource
from trainer.data.media import index_clip, read_pixels
from trainer.data.stills import spread
from trainer.data.windows import Window
from trainer.jobs.base import Emit
from trainer.jobs.cache_run import progress_events
from trainer.jobs.data_check import look_at_dataset
from trainer.sampling.sheet import Row, write_frames, write_sheet

_CELL = 128


class _Item(NamedTuple):
    looked: LookedSource
    clip: LookedClip
    window: Window
    validates: bool


def run(request: DataPreviewRequest, emit: Emit) -> None:
    """Draw items: resampled in time, cut to their window, resized and cropped as for the VAE.

    Items are spread evenly over the dataset, frames over each window, both ends among them. The
    `output` event has the sheet's path and, with `request.pictures`, the strips; `end` lists the
    `items`. One that cannot be decoded is a warning.

    Raises:
        ConfigError: the config is wrong.
        DataError: there is no such item, or none can be decoded.
        DiskError: a picture cannot be written.
    """
    looked = look_at_dataset(request, emit, "headers")
    items = [item for item in _items(looked.checked) if request.match in item.clip.item.name]
    if not items:
        named = f" with {request.match!r} in the name of its clip" if request.match else ""
        raise DataError(f"the dataset has no item{named}", hint="`menma data check` says why")
    chosen = [items[place] for place in spread(len(items), request.num_items)]
    progress, rows = progress_events(emit), []
    for done, item in enumerate(chosen, start=1):
        try:
            rows.append((item, _row(item, looked.variant.fps, request.num_frames)))
        except DataError as error:
            emit("warning", message=f"{item.clip.item.path} {error.message}")
        progress("items", done, len(chosen), item.clip.item.name)
    if not rows:
        raise DataError("none of the chosen items can be decoded")
    write_sheet(request.output, [row for _, row in rows], cell=_CELL)
    strips = [] if request.pictures is None else _strips(request.pictures, [r for _, r in rows])
    emit("output", path=str(request.output), strips=strips)
    shown = [
        {"clip": str(item.clip.item.path), "window": list(item.window), "bucket": _bucket(item)}
        for item, _ in rows
    ]
    emit("end", reason="done", num_items=len(items), items=shown)


def _items(checked: DatasetCheck) -> Iterator[_Item]:
    for looked in checked.sources:
        for clips, validates in ((looked.training, False), (looked.validation, True)):
            for clip in clips:
                for window in clip.windows:
                    yield _Item(looked, clip, window, validates)


def _row(item: _Item, target_fps: float, num_frames: int) -> Row:
    media, window = item.clip.item, item.window
    fps = item.looked.source.source_fps
    clip = index_clip(media.path, media.kind, target_fps=target_fps, source_fps=fps)
    frames = [window.frames[place] for place in spread(window.num_frames, num_frames)]
    pixels_FHW3 = read_pixels(clip, frames, item.clip.size)
    cut = f" [{window.start}:{window.start + window.num_frames}]" if media.kind == "video" else ""
    role = "  (validation)" if item.validates else ""
    return Row(f"{media.name}{cut}  {_bucket(item)}{role}", list(pixels_FHW3), media.caption)


def _bucket(item: _Item) -> str:
    return f"{item.clip.size[0]}x{item.clip.size[1]}x{item.window.num_frames}"


def _strips(folder: Path, rows: list[Row]) -> list[dict[str, object]]:
    return [
        {
            "title": f"{row.title}: {row.text}",
            "frames": write_frames(folder, f"item_{number:03}", row, len(row.frames)),
        }
        for number, row in enumerate(rows)
    ]
