"""A list of items: one JSON object a line, with the path of an image or a video and its caption."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import DataError, Problem
from trainer.data.sources.item import MediaItem, SourceScan

_UNSUPPORTED = ("control_path", "image_path_", "video_path_")


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
    name, caption = values.get(key), values.get("caption")
    unsupported = [k for k in values if k != key and k.startswith(_UNSUPPORTED)]
    if unsupported:
        raise DataError(f"{', '.join(unsupported)}: Menma does not support this key so far")
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"has no {key!r}")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{name} has no caption")
    if name in known:
        raise DataError(f"{name} is in the list twice", hint="use num_repeats to repeat items")
    path = Path(name).expanduser()
    in_folder = source.media_path.parent / path
    if not in_folder.exists() and path.exists():
        in_folder = Path.cwd() / path
    if not in_folder.exists():
        raise DataError(f"there is no {name}")
    return MediaItem(name, in_folder, source.kind, caption.strip())


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
