"""Reads and checks the header of a safetensors file before any byte of it is mapped.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, that
many bytes of JSON, then the tensors without holes. A header is untrusted input: everything it
claims is compared with the size of the file.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trainer.contract.errors import ModelFileError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own library."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Every whole-byte type of the format; 4- and 6-bit types are refused by name."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor as the header describes it; `start` and `end` count from the file's first byte."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: spans in file order."""

    spans: dict[str, TensorSpan]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Parse and check the header of `path`.

    Raises:
        ModelFileError: the file is truncated, or the header is not what the format allows; the
            message names the file and the reason.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        raw = _read_json_bytes(path, file, size)
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ is not a table of strings")
    data_start = 8 + len(raw)
    spans = {name: _span(path, name, entry, data_start) for name, entry in content.items()}
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_layout(path, spans, data_start, size)
    return Header(spans, metadata)


def _read_json_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    start = file.read(8)
    if len(start) < 8:
        raise _broken(path, f"the file has only {size} bytes")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER_BYTES:
        raise _broken(path, f"the header claims {length} bytes; {MAX_HEADER_BYTES} are allowed")
    if 8 + length > size:
        raise _broken(path, f"the header claims {length} bytes but the file has {size}")
    return file.read(length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _broken(path, "the header is not a JSON object")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"names given twice: {', '.join(twice[:5])}")
    return table


def _span(path: Path, name: str, entry: Any, data_start: int) -> TensorSpan:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _broken(
            path, f"tensor {name!r} has the data type {kind!r}, which Menma does not read"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} has an impossible shape or position")
    begin, end = offsets
    dtype = DTYPES[kind]
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise _broken(path, f"tensor {name!r} takes {end - begin} bytes, its shape needs {needed}")
    return TensorSpan(tuple(shape), dtype, data_start + begin, data_start + end)


def _naturals(value: Any) -> bool:
    # bool is an int to Python; 2**63 and more cannot be a tensor's size or position.
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def _check_layout(path: Path, spans: dict[str, TensorSpan], data_start: int, size: int) -> None:
    position = data_start
    for name, span in spans.items():
        if span.start < position:
            raise _broken(path, f"tensor {name!r} overlaps the one before it")
        if span.start > position:
            raise _broken(path, f"there is a hole before tensor {name!r}")
        position = span.end
    if position > size:
        raise ModelFileError(
            f"{path} is truncated: {size} bytes of {position}", hint="download or copy it again"
        )
    if position < size:
        raise _broken(path, f"{size - position} bytes follow the last tensor")


def _broken(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is not a valid safetensors file: {reason}",
        hint="the file is damaged, incomplete or of another kind; download or copy it again",
    )
