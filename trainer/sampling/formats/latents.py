"""The latents themselves, to be decoded later; see `trainer.sampling.latent_files`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from trainer.sampling.formats.base import Bits, Content
from trainer.sampling.latent_files import write_latents


class Latents:
    """One safetensors file; no VAE is loaded for it."""

    bits: ClassVar[Bits] = 8

    @staticmethod
    def check() -> None:
        """Every machine has it."""

    @staticmethod
    def write(path: Path, content: Content) -> None:
        """Write the latents; see `SampleFormat`."""
        if content.latents_CFHW is None:
            raise ValueError("there are frames, but no latents")
        write_latents(path, content.latents_CFHW, content.metadata, fps=content.fps)
