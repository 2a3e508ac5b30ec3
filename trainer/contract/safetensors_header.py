"""The header of safetensors files: names, shapes and metadata; standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

METADATA = "__metadata__"
"""Key of the string table."""
_LARGEST_HEADER = 100 * 2**20


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, {} where it is no safetensors file.

    Args:
        path: a safetensors file, or a folder of shards.
    """
    return {
        name: tuple(tensor["shape"])
        for name, tensor in read_header(path).items()
        if name != METADATA and isinstance(tensor, Mapping) and "shape" in tensor
    }


def read_header(path: Path) -> Mapping[str, Any]:
    """Return the header of a file, or those of a folder's shards together; {} where it has none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return _read_headers(tuple((file, *_state(file)) for file in files))


@lru_cache(maxsize=8)
def _read_headers(files: tuple[tuple[Path, int, int], ...]) -> Mapping[str, Any]:
    header: dict[str, Any] = {}
    for file, _, _ in files:
        header |= _read_header(file)
    return header


def _state(file: Path) -> tuple[int, int]:
    """Return what changes when a file is written anew."""
    try:
        stat = file.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def metadata_of(header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the string table of a header."""
    found = header.get(METADATA)
    return found if isinstance(found, Mapping) else {}


def _read_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                return {}
            content = json.loads(stream.read(length))
    except (OSError, ValueError):  # not there, or no safetensors file
        return {}
    return content if isinstance(content, dict) else {}
