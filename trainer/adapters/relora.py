"""ReLoRA: many low-rank updates one after the other, whose sum has a high rank.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv:2307.05695. At the end
of a cycle the update learned so far is frozen, the factors start anew, most of the optimizer's
state is forgotten, and the learning rate rises from 0 again. The paper adds the frozen update to
the weights; here its factors are kept side by side, ΔW = s · Σ_k B_k A_k, so that the weights may
be fp8 or streamed, nothing is rounded into them, and the output stays a LoRA (of rank cycles · R).

Shape letters: R rank, K rank of the frozen part, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.adapter_linear import AdapterLinear
from trainer.adapters.base import LoRAFactors, Update
from trainer.adapters.lora_linear import LoRALinear
from trainer.adapters.low_rank_adapter import LowRankAdapter, LowRankOptions, random_down
from trainer.adapters.start import tensors_at
from trainer.adapters.wrapping import unwrap
from trainer.contract.errors import ConfigError
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, Technique, TrainingState


class FrozenPart(LoRALinear):
    """The updates of the cycles that are over: down (K, I) and up (O, K), not trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if not self.down.shape[0]:
            result: Tensor = self.base(x)
            return result
        return super().forward(x)

    def take(self, down_RI: Tensor, up_OR: Tensor, max_rank: int | None) -> None:
        """Add a product to the sum; keep its best approximation of `max_rank` (None: all)."""
        down, up = torch.cat((self.down, down_RI)), torch.cat((self.up, up_OR), dim=1)
        if max_rank is not None and down.shape[0] > max_rank:
            down, up = truncated(down, up, max_rank)
        self.down, self.up = down, up


class ReLoRA(LowRankAdapter):
    """Trains a LoRA in cycles; the file is an ordinary LoRA that holds all of them."""

    kind = "relora"

    class Config(LowRankOptions):
        """Options of `[adapter] kind = "relora"`."""

        rank: int = Field(16, ge=1, le=4096)
        """Rank of what is trained in one cycle."""
        alpha: float | None = Field(None, gt=0)
        """The update is scaled by alpha / rank; empty: the rank, so that the scale is 1."""
        init_from: Path | None = None
        """LoRA (safetensors, any known layout, any rank) that training starts from: it is frozen,
        as if a cycle had ended with it."""
        restart_every_steps: int = Field(500, ge=1)
        """Steps of a cycle."""
        restart_warmup_steps: int = Field(50, ge=0)
        """Steps over which the learning rate rises again after a restart."""
        optimizer_reset_ratio: float = Field(0.999, ge=0, le=1)
        """Share of the optimizer's state, picked at random, that a restart sets to 0."""
        frozen_max_rank: int | None = Field(None, ge=1, le=4096)
        """The frozen part is cut to this rank by SVD; empty: it grows by `rank` with each cycle."""

    config: ReLoRA.Config

    def __init__(self, config: ReLoRA.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self._seed = 0

    def inject(self, transformer: nn.Module, seed: int) -> None:
        """Freeze the transformer and put the layers on.

        Raises:
            ConfigError: the patterns are wrong or select nothing.
        """
        self._seed = seed
        super().inject(transformer, seed)

    def make_layer(self, name: str, base: nn.Module, seed: int) -> LoRALinear:
        """Return the branch that is trained, around one for what is frozen later."""
        device = self.build.device
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        none_yet = torch.zeros(0, inputs, device=device), torch.zeros(outputs, 0, device=device)
        frozen = FrozenPart(base, *none_yet, self.scale_of(name))
        factors = self.first_factors(name, base, seed)
        return LoRALinear(frozen, *factors, self.scale_of(name), self.config.dropout)

    def begin(self, layer: AdapterLinear, update: Update) -> None:
        """Freeze what the file holds: its whole product, of whatever rank it is."""
        part = layer.base
        assert isinstance(part, FrozenPart), "make_layer puts one under each layer"
        tensors = tensors_at(update, part.scale)
        part.down, part.up = (tensors[name].to(part.down.device) for name in ("down", "up"))

    def set_strength(self, strength: float) -> None:
        """Multiply the update by `strength`; 0 gives the base model, exactly."""
        super().set_strength(strength)
        for frozen in self.frozen_parts().values():
            frozen.strength = strength

    def remove(self) -> None:
        """Take the adapter off the transformer again; the base stays frozen."""
        frozen, transformer = self.frozen_parts(), self._transformer
        super().remove()
        if transformer is not None:
            for name, part in frozen.items():
                unwrap(transformer, name, part)

    def frozen_parts(self) -> dict[str, FrozenPart]:
        """Return what is frozen, by canonical module name."""
        return {name: layer.base for name, layer in self._layers.items()}  # type: ignore[misc]

    def trained_layers(self) -> dict[str, LoRALinear]:
        """Return what is trained, by canonical module name."""
        return dict(self._layers)  # type: ignore[arg-type]

    def techniques(self) -> Sequence[Technique]:
        """Return what restarts the training."""
        return (Restarts(self, self._seed),)

    def updates(self, state: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return both parts as one LoRA a layer, s · [B_1 … B_n] [A_1; …; A_n].

        What was trained for no step yet, just after a restart, is left out.
        """
        found: dict[str, Update] = {}
        for name, part in self.frozen_parts().items():
            down, up = state[f"{name}.down"], state[f"{name}.up"]
            if part.down.shape[0]:
                began = bool(up.any())
                down = torch.cat((part.down.to(down.device), *([down] if began else [])))
                up = torch.cat((part.up.to(up.device), *([up] if began else [])), dim=1)
            found[name] = LoRAFactors(down, up, self.scale_of(name) * down.shape[0])
        return found


class Restarts(Technique):
    """Ends a cycle: freezes what was learned and starts the factors anew.

    A restart is a function of the step and of the weights, so that all processes do the same, and
    a run that is resumed does what one that never stopped does.
    """

    def __init__(self, adapter: ReLoRA, seed: int) -> None:
        self._adapter = adapter
        self._options = adapter.config
        self._seed = seed
        self._state: TrainingState | None = None

    def connect(self, state: TrainingState) -> None:
        """Take the weights and the optimizer's state.

        Raises:
            ConfigError: the optimizer keeps its state in a form of its own.
        """
        if self._options.optimizer_reset_ratio and not state.has_elementwise_state:
            raise ConfigError(
                "ReLoRA forgets a part of the optimizer's state, and that of this optimizer cannot "
                "be taken apart",
                hint='set optimizer.kind = "adamw", or adapter.optimizer_reset_ratio = 0',
            )
        self._state = state

    def lr_factor(self, step: int) -> float:
        """Return 1 in the first cycle; after a restart the rate rises to 1 in a straight line."""
        every, warmup = self._options.restart_every_steps, self._options.restart_warmup_steps
        since = (step - 1) % every + 1
        return 1.0 if step <= every or since >= warmup else since / warmup

    def after_step(self, step: int) -> None:
        """Restart where a cycle ends."""
        if step % self._options.restart_every_steps == 0:
            self._restart(step // self._options.restart_every_steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the frozen factors, float32."""
        return {
            f"{name}.{which}": getattr(part, which)
            for name, part in self._adapter.frozen_parts().items()
            if part.down.shape[0]
            for which in ("down", "up")
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for name, part in self._adapter.frozen_parts().items():
            if f"{name}.down" in state:
                part.down = state[f"{name}.down"].to(part.down.device)
                part.up = state[f"{name}.up"].to(part.up.device)

    @torch.no_grad()
    def _restart(self, cycle: int) -> None:
        if self._state is None:
            raise RuntimeError("call connect() first")
        fresh: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        frozen, ratio = self._adapter.frozen_parts(), self._options.optimizer_reset_ratio
        for name, layer in self._adapter.trained_layers().items():
            down, up = layer.down.detach(), layer.up.detach()
            frozen[name].take(down, up, self._options.frozen_max_rank)
            random = generator(self._seed, "relora", cycle, name)
            fresh[f"{name}.down"] = random_down(down.shape[0], down.shape[1], random)
            fresh[f"{name}.up"] = torch.zeros(up.shape)
            for key in (f"{name}.down", f"{name}.up"):
                drawn = torch.rand(fresh[key].shape, generator=random)
                kept[key] = (drawn >= ratio).float()
        self._state.overwrite(fresh)
        if ratio:
            self._state.scale_state(kept)


def truncated(down_KI: Tensor, up_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (rank, I), (O, rank) of the best approximation of up @ down of this rank.

    Eckart-Young; the product, which may be large, is never formed: QR of both factors leaves the
    SVD of a (K, K) matrix. In float64 on the CPU, so that all processes get the same.
    """
    down, up = down_KI.detach().cpu().double(), up_OK.detach().cpu().double()
    up_basis, up_rest = torch.linalg.qr(up)
    down_basis, down_rest = torch.linalg.qr(down.T)
    left, sizes, right = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    root = sizes[:rank].sqrt()
    new_up = up_basis @ (left[:, :rank] * root)
    new_down = (root[:, None] * right[:rank]) @ down_basis.T
    return new_down.to(down_KI), new_up.to(up_OK)
