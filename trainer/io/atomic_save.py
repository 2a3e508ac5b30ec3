"""Writing safetensors files that are either whole and verified, or not there at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.contract.errors import DiskError
from trainer.contract.files import atomic_path


def save_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    *,
    verify: bool = True,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `tensors` to `path` in one step: temporary file, read back, fsync, rename.

    A file that stood at `path` before stays as it was until the new one is complete and, with
    `verify`, has been read back equal to the last byte. Views and tensors that share memory are
    written as tensors of their own. `check` gets the complete temporary file; what it raises
    keeps the file from being renamed.

    Raises:
        DiskError: the disk is full, read-only or gone, or what was read back differs.
    """
    path = Path(path)
    owned = _owned(tensors)
    with atomic_path(path) as temporary:
        _write(owned, temporary, dict(metadata or {}), path)
        if verify:
            _verify(owned, temporary, dict(metadata or {}), path)
        if check is not None:
            check(temporary)


def _write(
    tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str], path: Path
) -> None:
    try:
        save_file(tensors, temporary, metadata=metadata or None)
    except SafetensorError as error:
        # The Rust side reports an OSError as text, so its errno is lost.
        raise DiskError(
            f"cannot write {path}: {error}",
            hint="free some space or choose another folder; files written before are intact",
        ) from error


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses non-contiguous tensors and tensors that share a storage.
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        address = value.untyped_storage().data_ptr()
        if address in storages or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        owned[name] = value
    return owned


def _verify(
    tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str], path: Path
) -> None:
    problem = _difference(tensors, temporary, metadata)
    if problem:
        raise DiskError(
            f"{path} was not written: {problem} after reading it back",
            hint="the disk or its file system is faulty; files written before are intact",
        )


def _difference(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> str:
    try:
        with safe_open(file, framework="pt", device="cpu") as written:
            if set(written.keys()) != set(tensors):
                return "the names differ"
            if (written.metadata() or {}) != metadata:
                return "the metadata differ"
            for name, tensor in tensors.items():
                if not same_bytes(written.get_tensor(name), tensor):
                    return f"{name} differs"
    except SafetensorError as error:
        return f"the file is not readable ({error})"
    return ""


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two CPU tensors have equal dtype, shape and bytes (NaN equals itself)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
    return torch.equal(*flat)
