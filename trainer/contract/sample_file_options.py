"""What kind of files samples become, and what goes into them: keys of `[sampling]`."""

from __future__ import annotations

from pydantic import Field

from trainer.contract.options import Options


class SampleFiles(Options):
    """A part of `[sampling]`."""

    format: str = "h264"
    """Kind of file of a video; one frame becomes a PNG, unless the format holds images, too."""
    quality: int | None = Field(None, ge=1, le=100)
    """1 is the smallest file, 100 the best; empty: visually lossless."""
    save_latents: bool = False
    """Write the latents beside each sample, to be decoded again later."""
    metadata: bool = True
    """Write into each file what made it: prompt, settings, names of models and LoRAs."""
    preview_every_steps: int = Field(0, ge=0)
    """Solver steps between rough pictures of the sample in work; 0: none."""
