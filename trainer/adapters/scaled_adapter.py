"""What kinds have in common whose tensors are an update at a scale alpha / rank of each layer."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from trainer.adapters.linear_adapter import LinearAdapter, RankOptions


class ScaledOptions(RankOptions):
    """Options of such a kind, which says itself what its rank is."""

    alpha: float | None = Field(None, gt=0)
    """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1, or the file's
    with rank `from_weights`."""


class ScaledAdapter(LinearAdapter):
    """Knows rank and alpha of each layer, once it is injected."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same tensors are another update at another scale."""
        scales = {name: self.scale_of(name) for name in self.plan}
        told: float | str = next(iter(scales.values()), 1.0)
        if len(set(scales.values())) > 1:
            told = f"by layer, {zlib.crc32(json.dumps(scales).encode()):08x}"
        return {"scale (alpha / rank)": told}

    def rank_of(self, name: str) -> int:
        """Return the rank that the config, or the file that it starts from, gives a layer."""
        rank = self.plan[name].rank
        assert rank is not None, "plan_layers gives a kind with a rank its rank"
        return rank

    def alpha_of(self, name: str) -> float:
        """Return the alpha of a layer."""
        alpha = self.plan[name].alpha
        if alpha is None:
            alpha = self.file_alphas.get(name)
        return float(self.rank_of(name)) if alpha is None else alpha

    def scale_of(self, name: str) -> float:
        """Return what a layer's update is multiplied with."""
        return self.alpha_of(name) / self.rank_of(name)


def by_module(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return trained tensors, keyed `<module>.<name in the layer>`, module by module."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(".")
        grouped.setdefault(module, {})[name] = tensor
    return grouped
