"""Full fine-tuning: no adapter, the model's own weights are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, Technique
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer


class FullFineTune:
    """Trains every parameter of the transformer and writes a whole model."""

    class Config(Options):
        """Options of `[adapter] kind = "none"`: none."""

    def __init__(self, config: FullFineTune.Config, build: BuildContext) -> None:
        self.config = config
        self._transformer: WanTransformer | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Weights mean what they mean."""
        return {}

    def inject(self, transformer: WanTransformer, seed: int) -> None:
        """Let every parameter be trained; `seed` is not needed, nothing is added."""
        transformer.requires_grad_(True)
        self._transformer = transformer

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return all parameters by their canonical names."""
        return dict(self._model().named_parameters())

    def lr_scales(self) -> Mapping[str, float]:
        """Return nothing: all learn at the same rate."""
        return {}

    def techniques(self) -> Sequence[Technique]:
        """Return nothing: plain training is all."""
        return ()

    def write_output(
        self,
        state: Mapping[str, Tensor],
        path: Path,
        *,
        layout: str,
        dtype: torch.dtype,
        metadata: Mapping[str, str],
    ) -> None:
        """Write the whole transformer under Wan's own names, readable by `load_transformer`.

        `layout` is not used: there is one layout for models (`config_rules` refuses others).

        Raises:
            ModelFileError: a value is not finite or does not fit `dtype`.
            DiskError: the disk is full, read-only or faulty.
        """
        save_transformer(self._model(), path, state=state, dtype=dtype, metadata=metadata)

    def _model(self) -> WanTransformer:
        if self._transformer is None:
            raise RuntimeError("inject the adapter first")
        return self._transformer
