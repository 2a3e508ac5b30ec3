"""A folder of images or videos with caption files beside them. Sub-folders are not searched."""

from __future__ import annotations

from pathlib import Path

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.contract.media_kinds import (
    IMAGE_EXTENSIONS,
    OTHER_MEDIA_EXTENSIONS,
    VIDEO_EXTENSIONS,
)
from trainer.data.captions import caption_texts, read_captions
from trainer.data.sources.item import MediaItem, SourceScan, list_images
from trainer.data.sources.paired import paired_folders

_MEDIA_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS | OTHER_MEDIA_EXTENSIONS


def scan_folder(source: SourceOptions) -> SourceScan:
    """List the media of a folder, sorted by name. Media of another kind are problems."""
    folder = source.media_path
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        reason = error.strerror or str(error)
        return SourceScan((), (Problem(f"the folder cannot be read: {reason}", file=folder),))
    try:
        paired = paired_folders(source)
    except DataError as error:
        return SourceScan((), (Problem(error.message, file=folder),))
    own = {source.cache_path, source.control_directory, source.mask_directory}
    items, problems = [], []
    for path in paths:
        if path.name.startswith(".") or path in own:
            continue
        try:
            if _is_item(path, source):
                captions = read_captions(path, source.caption_extension)
                first, *more = caption_texts(captions, source)
                files = {key: folder.of(path) for key, folder in paired.items()}
                items.append(MediaItem(path.name, path, source.kind, first, tuple(more), **files))
        except DataError as error:
            problems.append(Problem(error.message, file=path, hint=error.hint))
    if not items and not problems:
        problems.append(Problem(f"the folder holds no {source.kind}s", file=folder))
    return SourceScan(tuple(items), tuple(problems))


def _is_item(path: Path, source: SourceOptions) -> bool:
    """Tell items from files that are none of our business; media we cannot use raise."""
    if not path.name.isprintable():
        raise DataError("its name holds characters that are no text", hint="rename it")
    if path.is_dir():
        return _is_clip_folder(path, source)
    extension = path.suffix.lower()
    if extension in (IMAGE_EXTENSIONS if source.kind == "image" else VIDEO_EXTENSIONS):
        return True
    if extension in OTHER_MEDIA_EXTENSIONS:
        raise DataError(f"{extension} files are not read", hint="convert it, e.g. with ffmpeg")
    if extension in _MEDIA_EXTENSIONS:
        other = "a video in a source of images"
        if source.kind == "video":
            other = "an image in a source of videos"
        raise DataError(f"is {other}", hint="give it a source of its own")
    return False


def _is_clip_folder(path: Path, source: SourceOptions) -> bool:
    if source.kind == "video" and list_images(path):
        return True
    if any(inner.suffix.lower() in _MEDIA_EXTENSIONS for inner in path.iterdir()):
        raise DataError("sub-folders are not searched", hint="give it a source of its own")
    return False
