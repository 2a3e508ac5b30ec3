"""Identity of files: by content, found out once and then recognised by size and time stamps."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.errors import DataError, ModelFileError
from trainer.data.sources.item import list_images

_CHUNK_BYTES = 1 << 20
_COARSEST_CLOCK_NS = 2_000_000_000  # FAT keeps time to two seconds


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a clip's content is, and how to tell cheaply that it has not been touched."""

    content: str
    """Hash of every byte (of a folder: of its images' names and bytes)."""
    stat: str
    """Hash of names, sizes and time stamps."""
    settled: bool
    """The time stamps were old enough when the content was read to show any later change."""


def identify(path: Path, known: FileIdentity | None = None) -> FileIdentity:
    """Return a clip's identity; `known` spares reading it when its time stamps are the same.

    `touch` changes the time stamps and not the content; an edit that keeps size and modification
    time still moves the change time.

    Raises:
        DataError: it cannot be read.
    """
    try:
        stat, newest_ns = _stat(path)
        if known is not None and known.settled and known.stat == stat:
            return known
        settled = time.time_ns() - newest_ns > _COARSEST_CLOCK_NS
        if path.is_dir():
            content = digest([[file.name, _content(file)] for file in list_images(path)])
        else:
            content = _content(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from None
    return FileIdentity(content, stat, settled)


def stat_of(path: Path) -> str:
    """Return a clip's names, sizes and time stamps as one hash; empty if it cannot be looked at."""
    try:
        return _stat(path)[0]
    except OSError:
        return ""


def model_identity(path: Path) -> str:
    """Return a short identity of a weight file or folder, from sizes and both ends of each file.

    Reads at most 2 MiB of each file: header (names and shapes) and first weights, last weights.

    Raises:
        ModelFileError: it cannot be read.
    """
    path = Path(path)
    try:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        if not files:
            raise ModelFileError(f"{path}: there are no files in this folder")
        return digest([_ends(file) for file in files])
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from None


def digest(value: Any) -> str:
    """Return a hash of anything JSON can hold; equal for equal values, whatever the key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _stat(path: Path) -> tuple[str, int]:
    lines, newest_ns = [], 0
    for file in list_images(path) if path.is_dir() else [path]:
        status = file.stat()
        lines.append([file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        newest_ns = max(newest_ns, status.st_mtime_ns, status.st_ctime_ns)
    return digest(lines), newest_ns


def _content(file: Path) -> str:
    content = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            content.update(chunk)
    return content.hexdigest()


def _ends(file: Path) -> list[Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        ends = hashlib.blake2b(stream.read(_CHUNK_BYTES), digest_size=16)
        stream.seek(max(0, size - _CHUNK_BYTES))
        ends.update(stream.read(_CHUNK_BYTES))
    return [file.name, size, ends.hexdigest()]
