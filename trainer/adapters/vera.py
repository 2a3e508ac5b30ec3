"""VeRA: random matrices that all layers share, of which each learns to weigh rows and columns.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454:
ΔW = diag(b) B diag(d) A. A and B are frozen and the same for all layers of a width; d (R) and b (O)
are trained. They start as the paper and PEFT have them: b is zero, d a constant.

Shape letters: R rank, I input width, O output width, N rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.linear_adapter import LinearAdapter, LinearOptions, Rank
from trainer.adapters.lora_linear import add_low_rank
from trainer.adapters.start import CLOSE
from trainer.contract.adapter_start import VERA_KEY
from trainer.contract.errors import ModelFileError
from trainer.core.rng import generator


class Projections:
    """The frozen random matrices, made from a seed when a width is first met.

    Kaiming-uniform as in PEFT: A within ±√(6 / I), B within ±√(6 / R). Not part of any module:
    they are neither trained nor saved, and one copy serves all layers.
    """

    def __init__(self, rank: int, seed: int, device: torch.device) -> None:
        self.rank = rank
        self.seed = seed
        self._device = device
        self._made: dict[tuple[str, int], Tensor] = {}

    def down(self, inputs: int) -> Tensor:
        """Return A for layers of this input width, (R, I) float32."""
        return self._get("down", inputs, (self.rank, inputs), inputs)

    def up(self, outputs: int) -> Tensor:
        """Return B for layers of this output width, (O, R) float32."""
        return self._get("up", outputs, (outputs, self.rank), self.rank)

    def _get(self, which: str, width: int, shape: tuple[int, int], fan_in: int) -> Tensor:
        if (which, width) not in self._made:
            bound = math.sqrt(6 / fan_in)
            random = generator(self.seed, "vera", which, width)
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=random)
            self._made[which, width] = drawn.to(self._device)
        return self._made[which, width]


class VeRALinear(AdapterLinear):
    """Adds b ∘ B (d ∘ A x) to the output of `base`.

    Args:
        base: the linear layer.
        projections: A and B.
        down_scale_R: d; trained.
        up_scale_O: b; trained.
    """

    down_scale: Tensor
    up_scale: Tensor

    def __init__(
        self, base: nn.Module, projections: Projections, down_scale_R: Tensor, up_scale_O: Tensor
    ) -> None:
        super().__init__(base)
        self.hold("down_scale", down_scale_R)
        self.hold("up_scale", up_scale_O)
        self.projections = projections
        self._down_RI = projections.down(self.in_features)
        self._up_OR = projections.up(self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if self.strength == 0.0:
            result: Tensor = self.base(x)
            return result
        x_NI = x.reshape(-1, x.shape[-1])
        low_NR = F.linear(x_NI, self._down_RI.to(x.dtype)) * self.down_scale.to(x.dtype)
        # Not b ∘ (B low): for the gradient of b that would keep a tensor of the output's size.
        up_OR = self.up_scale.to(x.dtype)[:, None] * self._up_OR.to(x.dtype)
        return add_low_rank(self.base, x, low_NR, up_OR, self.strength)


class VeRA(LinearAdapter):
    """Trains two vectors a layer; the file is an ordinary LoRA."""

    kind = "vera"

    class Config(LinearOptions):
        """Options of `[adapter] kind = "vera"`."""

        rank: Rank = 256
        """Rank of the random matrices; it costs few parameters, and the file is a LoRA of it.
        `from_weights`: layers and rank of `init_from`."""
        d_initial: float = Field(0.1, gt=0)
        """What the weights of the ranks start at."""
        projection_seed: int = Field(0, ge=0)
        """Fixes the random matrices."""

    config: VeRA.Config

    @cached_property
    def _projections(self) -> Projections:
        """The random matrices; all layers have the same rank, known once it is injected."""
        rank = next(iter(self.plan.values())).rank
        assert rank is not None, "plan_layers gives a kind with a rank its rank"
        return Projections(rank, self.config.projection_seed, self.build.device)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same vectors weigh other rows where the matrices are others."""
        return {"projection_seed": self.config.projection_seed}

    def make_layer(self, name: str, base: nn.Module, seed: int) -> VeRALinear:
        """Return a branch that adds nothing yet; nothing of it is random but the matrices."""
        outputs = int(base.out_features)  # type: ignore[arg-type]
        device = self.build.device
        down_scale = torch.full((self._projections.rank,), self.config.d_initial, device=device)
        up_scale = torch.zeros(outputs, device=device)
        return VeRALinear(base, self._projections, nn.Parameter(down_scale), nn.Parameter(up_scale))

    def from_file(self, layer: AdapterLinear, update: Update) -> Mapping[str, Tensor]:
        """Return d and b of a LoRA with down = diag(d) A and up = diag(b) B, by least squares.

        Raises:
            ModelFileError: its factors are not made of these A and B.
        """
        down_RI, up_OR = (update.tensors()[name].double() for name in ("down", "up"))
        a_RI = self._projections.down(layer.in_features).to(down_RI)
        b_OR = self._projections.up(layer.out_features).to(up_OR)
        d_R, b_O = _weights_of(down_RI, a_RI), _weights_of(up_OR, b_OR)
        if d_R is None or b_O is None:
            raise ModelFileError(
                f"{self.config.init_from}: a layer of {update.shape} is not made of the random "
                f"matrices of projection_seed {self.config.projection_seed}",
                hint='name another adapter.init_from, or set adapter.kind = "lora"',
            )
        return {"down_scale": d_R.float(), "up_scale": (b_O * update.scale).float()}

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return down = diag(d) A and up = diag(b) B, in float32."""
        names = [key.removesuffix(".up_scale") for key in state if key.endswith(".up_scale")]
        found: dict[str, Update] = {}
        for name in names:
            layer = self._layers[name]
            d_R, b_O = state[f"{name}.down_scale"], state[f"{name}.up_scale"]
            down = d_R[:, None] * self._projections.down(layer.in_features).to(d_R.device)
            up = b_O[:, None] * self._projections.up(layer.out_features).to(b_O.device)
            found[name] = LoRAFactors(down, up, float(len(d_R)))
        return found

    def file_metadata(self) -> dict[str, str]:
        """Return what the matrices were made from."""
        made_from = {
            "rank": self._projections.rank,
            "projection_seed": self.config.projection_seed,
        }
        return {VERA_KEY: json.dumps(made_from)}


def _weights_of(weighed: Tensor, rows: Tensor) -> Tensor | None:
    """Return w with diag(w) rows = weighed, both (M, K); None: there is none."""
    weights_M = (weighed * rows).sum(1) / rows.square().sum(1)
    left = (weighed - weights_M[:, None] * rows).norm()
    return weights_M if float(left) <= CLOSE * float(weighed.norm()) else None
