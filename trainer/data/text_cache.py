"""Encoded captions: one file a caption, tensor `context` (T, D), unpadded."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from trainer.data.cache_settings import CacheSettings
from trainer.data.entries import DTYPES, FORMAT_VERSION, TEXT_SUFFIX, write_entry
from trainer.data.fingerprint import digest


def text_key(caption: str, settings: CacheSettings) -> str:
    """Return the key of a caption: its text, the encoder, the token limit and the precision."""
    return digest(
        {
            "format": FORMAT_VERSION,
            "caption": caption,
            "text_encoder": settings.text_encoder,
            "text_len": settings.text_len,
            "dtype": settings.dtype,
        }
    )


def text_file(key: str) -> str:
    """Return the name, in the cache folder, of the caption with this key."""
    return f"{key}{TEXT_SUFFIX}"


def write_text_entry(
    folder: Path, caption: str, context_TD: Tensor, settings: CacheSettings
) -> None:
    """Store an encoded caption.

    Raises:
        DiskError: the disk is full, read-only or gone.
    """
    key = text_key(caption, settings)
    metadata = {"caption": caption, "text_encoder": settings.text_encoder or ""}
    context = context_TD.to(DTYPES[settings.dtype])
    write_entry(folder / text_file(key), key, {"context": context}, metadata)
