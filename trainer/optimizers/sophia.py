"""Sophia: steps clipped where curvature is small (Liu et al., arXiv:2305.14342).

The curvature is estimated by the squares of the step's own gradients (the empirical Fisher). The
paper's estimators need a second backward pass, which neither fused attention nor recomputed blocks
allow; it measured this one as somewhat weaker ("E-F + clip", figure 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import Decay


class Sophia(OptimizerFactory):
    """w ← w·(1 - lr·λ) - lr · clip(m / max(ρ·B·h, ε), 1); h ← β₂·h + (1 - β₂)·g² every k steps."""

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "hessian")

    class Config(Options):
        """Options of `optimizer.kind = "sophia"`."""

        betas: tuple[Decay, Decay] = (0.965, 0.99)
        """Decay of the running mean of gradients and of the curvature, each in [0, 1)."""
        rho: float = Field(0.04, gt=0)
        """ρ: the larger, the fewer weights move by the full learning rate."""
        hessian_scale: float = Field(5120.0, gt=0)
        """B, which squares of gradients are multiplied with: the paper's tokens in a batch."""
        update_every_steps: int = Field(10, ge=1)
        """k, steps between two estimates of the curvature."""
        weight_decay: float = Field(0.0, ge=0)
        """λ: share of each weight that is taken away per step, times the learning rate."""

    def __init__(self, config: Sophia.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return SophiaOptimizer([dict(group) for group in parameters], lr, self.config)


class SophiaOptimizer(torch.optim.Optimizer):
    """The update of `Sophia`, element by element."""

    def __init__(
        self, parameters: Iterable[Mapping[str, Any]], lr: float, config: Sophia.Config
    ) -> None:
        super().__init__([dict(group) for group in parameters], {"lr": lr})
        self._config = config

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        config = self._config
        first, second = config.betas
        scale = config.rho * config.hessian_scale
        for group in self.param_groups:
            lr = group["lr"]
            for weight in group["params"]:
                gradient = weight.grad
                if gradient is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["hessian"] = torch.zeros_like(weight)
                mean, curvature = state["exp_avg"], state["hessian"]
                mean.lerp_(gradient, 1 - first)
                if state["step"] % config.update_every_steps == 0:
                    curvature.mul_(second).addcmul_(gradient, gradient, value=1 - second)
                state["step"] += 1
                update = mean / (curvature * scale).clamp_(min=1e-15)
                weight.mul_(1 - lr * config.weight_decay)
                weight.add_(update.clamp_(-1, 1), alpha=-lr)
