"""Encoded prompts of earlier runs, so that the text encoder is not loaded for them again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.contract.config import RunConfig
from trainer.contract.errors import DataError
from trainer.data.entries import FORMAT_VERSION, TEXT_SUFFIX, read_entry, write_entry
from trainer.data.fingerprint import digest
from trainer.jobs.components import (
    lazy_text_encoder,
    text_encoder_device,
    text_encoder_dtype,
)
from trainer.jobs.window_encoder import LazyModel
from trainer.models.wan.text_encoder import TextEncoder
from trainer.sampling.conditions import TextEncoder as TextEncoding


class RecallingEncoder:
    """Encodes texts one by one; those in its folder are read, the others are put there.

    An entry is named by a hash of the text, the encoder's weights and tokenizer, its precision and
    the kind of device, and keeps every bit. It is not taken from the cache of a dataset: there
    texts are encoded in batches and rounded to `memory.cache_dtype`, so that a sample would depend
    on whether its prompt is a caption.
    """

    def __init__(
        self,
        encoder: LazyModel[TextEncoder],
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Prepare; nothing is loaded.

        Args:
            encoder: loaded when the first text is not in the folder.
            folder: made when something is put there.
            dtype: of the encoder's weights and answers.
            device: where it computes.
        """
        self._lazy, self._folder, self._dtype, self._device = encoder, folder, dtype, device
        self._encoder: TextEncoder | None = None

    def to(self, device: torch.device) -> RecallingEncoder:
        """Move the encoder, if it is loaded; entries are from then on those of this device."""
        if self._encoder is not None:
            self._encoder.to(device)
            self._device = device
        return self

    def __call__(self, texts: list[str]) -> list[Tensor]:
        """Return one (T, D) a text, in the encoder's dtype.

        Raises:
            DiskError: an entry cannot be written.
            ModelFileError: the encoder cannot be loaded.
        """
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Tensor:
        key = digest(
            {
                "format": FORMAT_VERSION,
                "prompt": text,
                "text_encoder": self._lazy.identity,
                "dtype": str(self._dtype),
                "device": self._device.type,
            }
        )
        path = self._folder / f"{key}{TEXT_SUFFIX}"
        try:
            return read_entry(path, key)["context"].to(self._dtype)
        except DataError:  # not there, or damaged: encoded anew, which mends it
            pass
        if self._encoder is None:
            self._encoder = self._lazy.load()
        context: Tensor = self._encoder([text])[0]
        write_entry(path, key, {"context": context}, {})
        return context


def prompt_encoder(config: RunConfig, device: torch.device) -> TextEncoding:
    """Return what encodes prompts: the text encoder, behind `sampling.text_cache` if that is set.

    Raises:
        ModelFileError: the file is no umT5, or damaged, or there is no tokenizer for it.
        ConfigError: none is given.
    """
    lazy, folder = lazy_text_encoder(config, device), config.sampling.text_cache
    if folder is None:
        return lazy.load()
    where = text_encoder_device(config, device)
    return RecallingEncoder(lazy, folder, text_encoder_dtype(config), where)
