"""SingLoRA: a low-rank update made of one matrix, ΔW = s · u(t) · A Aᵀ.

Bensaïd et al., "SingLoRA: Low Rank Adaptation Using a Single Matrix", arXiv:2507.05566. With one
matrix there are no two that must learn at different rates. Since A Aᵀ is not zero at the start, the
update is faded in: u(t) = min(t / T, 1) after t updates of the weights. For a layer that is not
square, A has as many rows as the longer side, and the shorter side takes the first of them.

Shape letters: R rank, I input width, O output width, M the larger of the two, N rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.linear_adapter import LinearOptions, Rank
from trainer.adapters.lora_linear import add_low_rank
from trainer.adapters.scaled_adapter import ScaledAdapter
from trainer.adapters.start import CLOSE
from trainer.contract.adapter_start import SINGLORA_KEY
from trainer.contract.errors import ModelFileError
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, Technique


class SingLoRALinear(AdapterLinear):
    """Adds s · u · A_O (A_Iᵀ x) to the output of `base`; A_O and A_I are the first rows of A.

    Args:
        base: the linear layer.
        factor_MR: A; trained.
        scale: s.
        ramp: u, shape (), shared by all layers.
    """

    factor: Tensor

    def __init__(self, base: nn.Module, factor_MR: Tensor, scale: float, ramp: Ramp) -> None:
        super().__init__(base)
        self.hold("factor", factor_MR)
        self.scale = scale
        self.ramp = ramp

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        scale = self.scale * self.strength
        if scale == 0.0:
            result: Tensor = self.base(x)
            return result
        factor_MR = self.factor.to(x.dtype)
        low_NR = F.linear(x.reshape(-1, self.in_features), factor_MR[: self.in_features].t())
        low_NR = low_NR * self.ramp.share.to(x.dtype)
        return add_low_rank(self.base, x, low_NR, factor_MR[: self.out_features], scale)


class Ramp(Technique):
    """Fades the update in: u = min(updates of the weights / `steps`, 1).

    A function of the step alone, so that a resumed run has the value of one that never stopped.

    Attributes:
        share: u, float32 of shape (): a tensor, since compiled layers take numbers as constants.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.step = 0
        self.share = torch.zeros((), device=device)
        self.after_step(0)

    @property
    def value(self) -> float:
        """The value of u."""
        return min(self.step / self.steps, 1.0) if self.steps else 1.0

    def after_step(self, step: int) -> None:
        """Go on to what holds after `step` updates."""
        self.step = step
        self.share.fill_(self.value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return how many updates there were."""
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.after_step(int(state["step"]))


class SingLoRA(ScaledAdapter):
    """Trains one factor a layer; the file is an ordinary LoRA."""

    kind = "singlora"

    class Config(LinearOptions):
        """Options of `[adapter] kind = "singlora"`."""

        rank: Rank = 16
        """Rank of the update; a layer has about half the parameters of a LoRA of this rank.
        `from_weights`: layers and ranks of `init_from`."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1, or the
        file's with rank `from_weights`."""
        ramp_steps: int = Field(1000, ge=0)
        """Steps over which the update is faded in; 0: it is whole from the start, as it has to be
        with `init_from`."""

    config: SingLoRA.Config

    def __init__(self, config: SingLoRA.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self._ramp = Ramp(config.ramp_steps, build.device)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same factor at another scale or faded in otherwise is another update."""
        return {**super().facts, "ramp_steps": self.config.ramp_steps}

    def techniques(self) -> Sequence[Technique]:
        """Return what fades the update in."""
        return (self._ramp,)

    def make_layer(self, name: str, base: nn.Module, seed: int) -> SingLoRALinear:
        """Return a branch whose factor (M, R) is Kaiming-uniform (a = √5, so ±1/√M)."""
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        longer = max(inputs, outputs)
        bound = 1 / math.sqrt(longer)
        factor = torch.empty(longer, self.rank_of(name)).uniform_(
            -bound, bound, generator=generator(seed, "adapter", name)
        )
        return SingLoRALinear(
            base, nn.Parameter(factor.to(self.build.device)), self.scale_of(name), self._ramp
        )

    def from_file(self, layer: AdapterLinear, update: Update) -> Mapping[str, Tensor]:
        """Return the factor (M, R) of a LoRA with down = A_Iᵀ and up = c · A_O.

        c is found by least squares; it has the file's ramp in it, and its scale where that is
        folded in. What it is more than the layer's own scale goes into A, by its root.

        Raises:
            ModelFileError: up and down are not of one matrix.
        """
        down_IR, up_OR = (update.tensors()[name].double() for name in ("down", "up"))
        down_IR = down_IR.t()
        shared = min(len(down_IR), len(up_OR))
        both = down_IR[:shared], up_OR[:shared]
        ratio = float((both[0] * both[1]).sum() / both[0].square().sum().clamp(min=1e-300))
        if ratio <= 0 or float((both[1] - ratio * both[0]).norm()) > CLOSE * float(both[1].norm()):
            raise ModelFileError(
                f"{self.config.init_from}: a layer of {update.shape} has factors that are not of "
                "one matrix, as those of a SingLoRA are",
                hint='name another adapter.init_from, or set adapter.kind = "lora"',
            )
        factor_MR = torch.cat((down_IR, up_OR[shared:] / ratio))
        root = math.sqrt(ratio * update.scale / float(layer.scale))  # type: ignore[arg-type]
        return {"factor": (factor_MR * root).float()}

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return down = A_Iᵀ and up = u · A_O, in float32."""
        found: dict[str, Update] = {}
        for key, factor_MR in state.items():
            name = key.removesuffix(".factor")
            layer = self._layers[name]
            down = factor_MR[: layer.in_features].t().contiguous()
            up = factor_MR[: layer.out_features] * self._ramp.value
            found[name] = LoRAFactors(down, up, self.alpha_of(name))
        return found

    def file_metadata(self) -> dict[str, str]:
        """Return how far the update in the file was faded in."""
        return {SINGLORA_KEY: json.dumps({"share": self._ramp.value})}
