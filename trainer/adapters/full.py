"""Full fine-tuning: no adapter, the model's own weights are trained, all or chosen ones."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from trainer.adapters.linear_adapter import TargetOptions
from trainer.contract.targets import plan_parameters
from trainer.core.seams import BuildContext, Technique
from trainer.models.wan.loading import save_transformer
from trainer.models.wan.transformer import WanTransformer

_WRAPPED = re.compile(r"(?:\.base)+\.")
"""In the names of parameters under adapters that are not trained."""


class FullFineTune:
    """Trains parameters of the transformer itself and writes a whole model."""

    class Config(TargetOptions):
        """Options of `[adapter] kind = "none"`. Patterns match parameters
        (`blocks.3.norm3.weight`) and modules (`blocks.3.norm3`, `blocks.3`)."""

    def __init__(self, config: FullFineTune.Config, build: BuildContext) -> None:
        self.config = config
        self._transformer: WanTransformer | None = None
        self._factors: dict[str, float] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """Weights mean what they mean, beside those that are not trained."""
        if len(self._factors) == len(self._parameters()):
            return {}
        names = "\n".join(self._factors)
        return {"choice of weights": f"{len(self._factors)}, {zlib.crc32(names.encode()):08x}"}

    def inject(self, transformer: WanTransformer, seed: int) -> None:
        """Let the chosen parameters be trained; `seed` is not needed, nothing is added.

        Raises:
            ConfigError: a pattern is wrong or matches nothing, or nothing is left.
        """
        self._transformer = transformer
        parameters = self._parameters()
        self._factors = plan_parameters(parameters, self.config.model_dump())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self._factors)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the chosen parameters by their canonical names."""
        return {n: value for n, value in self._parameters().items() if n in self._factors}

    def lr_scales(self) -> Mapping[str, float]:
        """Return the factors of `lr_pattern`."""
        return {name: factor for name, factor in self._factors.items() if factor != 1.0}

    def techniques(self) -> Sequence[Technique]:
        """Return nothing: plain training is all."""
        return ()

    def suspended(self) -> NoReturn:
        """Refuse: there is no copy of what the weights were.

        Raises:
            RuntimeError: always; `technique_problems` refuses such a config.
        """
        raise RuntimeError("a full fine-tune has no untrained model beside it")

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

        What is not trained comes from the file that the model was loaded from, since a process need
        not hold it whole, or in that file's precision. `layout` is not used: there is one layout
        for models (`config_rules` refuses others).

        Raises:
            ModelFileError: a value is not finite or does not fit `dtype`.
            DiskError: the disk is full, read-only or faulty.
        """
        model = self._model()
        whole = {
            name: state[name] if name in state else _kept(model, name, value)
            for name, value in self._parameters().items()
        }
        save_transformer(model, path, state=whole, dtype=dtype, metadata=metadata)

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = self._model().named_parameters()
        return {_WRAPPED.sub(".", name): parameter for name, parameter in named}

    def _model(self) -> WanTransformer:
        if self._transformer is None:
            raise RuntimeError("inject the adapter first")
        return self._transformer


def _kept(model: WanTransformer, name: str, parameter: nn.Parameter) -> Tensor:
    return parameter.detach() if model.stored is None else model.stored(name)
