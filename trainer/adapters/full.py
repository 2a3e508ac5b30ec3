"""No adapter: the transformer's own weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.contract.errors import ModelFileError
from trainer.contract.options import Options
from trainer.core.seams import BuildContext
from trainer.io.atomic_save import save_safetensors


class FullFineTune:
    """Trains every parameter of the transformer."""

    class Config(Options):
        """`[adapter] kind = "none"` has no options."""

    def __init__(self, config: FullFineTune.Config, build: BuildContext) -> None:
        self._transformer: nn.Module | None = None

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Make every parameter trainable. Nothing is drawn, so `seed` does not matter."""
        transformer.requires_grad_(True)
        self._transformer = transformer

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the transformer's parameters by their own, canonical names."""
        return dict(self._transformer.named_parameters()) if self._transformer is not None else {}

    def write_output(
        self,
        state: Mapping[str, Tensor],
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the whole model under its original names, which every program reads.

        `layout` is about LoRA files and makes no difference here.

        Raises:
            ModelFileError: a value is not finite or does not fit `dtype`.
            DiskError: the disk is full, read-only or faulty.
        """
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise ModelFileError(
                f"{bad[0]} has values that {dtype} cannot hold, or NaN",
                hint="write bf16 or fp32; if that fails too, the training had diverged",
            )
        save_safetensors(tensors, path, metadata)
