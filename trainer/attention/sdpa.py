"""PyTorch's own attention."""

from __future__ import annotations

from trainer.contract.options import Options
from trainer.core.seams import BuildContext
from trainer.models.wan.attention import TorchAttention


class SDPA(TorchAttention):
    """Fused attention of torch: flash, cuDNN or memory-efficient, whichever fits the inputs."""

    class Config(Options):
        """Options of `attention = "sdpa"`."""

    def __init__(self, config: SDPA.Config, build: BuildContext) -> None:
        """Take nothing from either; every plug-in is made this way."""
