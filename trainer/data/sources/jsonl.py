"""A list of items: one JSON object a line, with the path of an image or a video and its caption."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.data.captions import caption_texts, several_captions
from trainer.data.sources.item import MediaItem, SourceScan

_UNSUPPORTED = ("control_path_", "image_path_", "video_path_")
_PAIRED = ("control", "mask")


def scan_jsonl(source: SourceOptions) -> SourceScan:
    """List the items of a JSONL file, in its order. Each bad line is a problem with its number.

    Relative paths are looked up from the list's folder, then from the working directory.
    """
    file = source.media_path
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except OSError as error:
        reason = error.strerror or str(error)
        return SourceScan((), (Problem(f"the list cannot be read: {reason}", file=file),))
    except UnicodeDecodeError:
        return SourceScan((), (Problem("the list is not UTF-8 text", file=file),))
    items: dict[str, MediaItem] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = _item(line, source, items)
            items[item.name] = item
        except DataError as error:
            problems.append(Problem(error.message, file=file, line=number, hint=error.hint))
    if not items and not problems:
        problems.append(Problem("the list holds no items", file=file))
    return SourceScan(tuple(items.values()), tuple(problems))


def _item(line: str, source: SourceOptions, known: Container[str]) -> MediaItem:
    values = _parse(line)
    key = f"{source.kind}_path"
    name = values.get(key)
    unsupported = [k for k in values if k != key and k.startswith(_UNSUPPORTED)]
    if unsupported:
        raise DataError(f"{', '.join(unsupported)}: Menma does not support this key so far")
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"has no {key!r}")
    captions = several_captions(values.get("caption"))
    captions = tuple(text for caption in captions or () if (text := caption.strip()))
    if not captions:
        raise DataError(f"{name} has no caption")
    if name in known:
        raise DataError(f"{name} is in the list twice", hint="use num_repeats to repeat items")
    if source.alpha_mask and values.get("mask_path") is not None:
        raise DataError(f"{name} has a mask_path, and alpha_mask takes its transparency instead")
    first, *more = caption_texts(captions, source)
    files = {
        what: _existing(values[f"{what}_path"], source)
        for what in _PAIRED
        if values.get(f"{what}_path") is not None
    }
    path = _existing(name, source)
    return MediaItem(name, path, source.kind, first, tuple(more), **files)


def _existing(name: object, source: SourceOptions) -> Path:
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{name!r} is no path")
    path = Path(name).expanduser()
    in_folder = source.media_path.parent / path
    if not in_folder.exists() and path.exists():
        in_folder = Path.cwd() / path
    if not in_folder.exists():
        raise DataError(f"there is no {name}")
    return in_folder


def _parse(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        json.dumps(values, ensure_ascii=False).encode()  # "\\ud800" is JSON and no text
    except UnicodeEncodeError:
        raise DataError("holds half a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError("is no JSON object")
    return values
