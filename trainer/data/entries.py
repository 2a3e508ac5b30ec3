"""Entries of a cache: safetensors files that say in their metadata what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.contract.errors import DataError
from trainer.contract.files import write_bytes

FORMAT_VERSION = "1"
LATENTS_SUFFIX = ".latents.safetensors"
TEXT_SUFFIX = ".text.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_entry(
    path: Path, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write an entry whole: it is not there before it is complete and on the disk.

    Raises:
        DiskError: the disk is full, read-only or gone.
    """
    own = {"menma_cache": FORMAT_VERSION, "key": key}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(stored, {**metadata, **own}))


def entry_key(path: Path) -> str | None:
    """Return the key an entry was written under; None for anything that is no whole entry."""
    try:
        with safe_open(path, "pt") as entry:
            metadata = entry.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return metadata.get("key") if metadata.get("menma_cache") == FORMAT_VERSION else None


def is_menma_entry(path: Path) -> bool:
    """Tell whether a file was written by `write_entry`, of this format or of another version."""
    try:
        with safe_open(path, "pt") as entry:
            return "menma_cache" in (entry.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_entry(path: Path, key: str) -> dict[str, Tensor]:
    """Return an entry's tensors as float32.

    Raises:
        DataError: as `read_whole_entry`.
    """
    return read_whole_entry(path, key)[0]


def read_whole_entry(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an entry's tensors as float32, and its metadata.

    Raises:
        DataError: it is missing, damaged, or was made from something else than `key` stands for.
    """
    try:
        with safe_open(path, "pt") as entry:
            metadata = entry.metadata() or {}
            if metadata.get("menma_cache") != FORMAT_VERSION or metadata.get("key") != key:
                raise DataError(
                    f"{path} was made from something else than the index says",
                    hint="run `menma cache` again",
                )
            tensors = {
                name: entry.get_tensor(name).to(torch.float32, copy=True)
                for name in entry.offset_keys()
            }
            return tensors, metadata
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="run `menma cache` again") from None
