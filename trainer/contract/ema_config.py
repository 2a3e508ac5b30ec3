"""Section of the config for a running average of the weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.contract.options import Options


class EmaSection(Options):
    """Running average of the trained weights: average ← d · average + (1 - d) · weights."""

    decay: float = Field(0.0, ge=0, lt=1)
    """d, e.g. 0.999; 0: no average is kept."""
    warmup: bool = True
    """The n-th update, from 0, uses (1 + n) / (10 + n) where that is smaller than `decay`."""
    every_steps: int = Field(1, ge=1)
    """Steps between two updates of the average."""
    start_step: int = Field(1, ge=1)
    """First step that is averaged; the average starts as the weights after it."""
    device: Literal["train", "cpu"] = "train"
    """Where it is kept, 4 bytes a weight: beside the trained weights, or in RAM."""
    use_for_samples: bool = True
    """Samples during training are made with the average."""
    use_for_validation: bool = True
    """The validation loss is that of the average."""
