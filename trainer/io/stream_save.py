"""Writing a safetensors file tensor by tensor, for models that shall not be in memory whole."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from trainer.contract.errors import DiskError
from trainer.contract.files import atomic_path
from trainer.io.safetensors_header import DTYPES, read_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
_CHUNK = 64 * 2**20


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Shape and dtype of a tensor that is written later."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stream_safetensors(
    slots: Mapping[str, TensorSlot],
    read: Callable[[str], Tensor],
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    *,
    on_tensor: Callable[[str], None] | None = None,
    in_order: bool = False,
    verify: bool = True,
) -> None:
    """Write a safetensors file, asking `read` for one tensor at a time.

    What stood at `path` stays until the new file is complete and its checksums, taken while
    writing, have been found again in it.

    Args:
        slots: what will be written; the order in the file is by element size, then by name, as
            the format's own library has it (readers rely on aligned tensors).
        read: returns the tensor of a name, with the slot's shape and dtype.
        path: the file.
        metadata: of the header.
        on_tensor: called after each tensor was written.
        in_order: keep the order of `slots`, which must fall in element size.
        verify: read the file back.

    Raises:
        DiskError: the disk is full, read-only or gone, or what is read back differs.
    """
    path = Path(path)
    by_size = sorted(slots, key=lambda name: (-slots[name].dtype.itemsize, name))
    order = list(slots) if in_order else by_size
    with atomic_path(path) as temporary:
        checksums: dict[str, int] = {}
        with temporary.open("wb") as file:
            file.write(_header(slots, order, metadata or {}))
            for name in order:
                checksums[name] = _write_tensor(file, name, slots[name], read(name))
                if on_tensor is not None:
                    on_tensor(name)
        if verify:
            _verify(temporary, checksums, path)


def _header(
    slots: Mapping[str, TensorSlot], order: list[str], metadata: Mapping[str, str]
) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        slot = slots[name]
        end = position + slot.nbytes
        table[name] = {
            "dtype": _NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, slot: TensorSlot, tensor: Tensor) -> int:
    if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {slot}")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    content = flat.numpy().data
    file.write(content)
    return zlib.crc32(content)


def _verify(temporary: Path, checksums: Mapping[str, int], path: Path) -> None:
    header = read_header(temporary)
    with temporary.open("rb") as file:
        for name, span in header.spans.items():
            file.seek(span.start)
            if _checksum(file, span.end - span.start) != checksums[name]:
                raise DiskError(
                    f"{path} was not written: {name} differs after reading it back",
                    hint="the disk or its file system is faulty; files written before are intact",
                )


def _checksum(file: BinaryIO, length: int) -> int:
    value = 0
    while length:
        chunk = file.read(min(length, _CHUNK))
        value = zlib.crc32(chunk, value)
        length -= len(chunk)
    return value
