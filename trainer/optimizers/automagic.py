"""A learning rate for every weight, which grows while its gradient keeps its sign.

After Rprop (Riedmiller and Braun 1993) and the optimizer "Automagic" of ai-toolkit, with Adam's
second moment in place of a factored one, so that each element stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator

from trainer.contract.options import Options
from trainer.core.seams import BuildContext, OptimizerFactory


class Automagic(OptimizerFactory):
    """w ← w·(1 - lr·λ) - lr · r · clip(g / √v, c), with a factor r of the rate for each weight.

    r starts at 1; a step adds b to it where the gradient has the sign of the step before, and takes
    b away where it has not, within `min_lr_ratio` and `max_lr_ratio`. v is the mean of squares.
    """

    elementwise: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "signed_ratio")

    class Config(Options):
        """Options of `optimizer.kind = "automagic"`."""

        beta2: float = Field(0.999, ge=0, lt=1)
        """Decay of the running mean of squares of gradients."""
        eps: float = Field(1e-8, gt=0)
        """Added to the root of the second moment."""
        lr_bump: float = Field(0.1, gt=0)
        """b, by which the factor of a weight's learning rate changes in a step."""
        min_lr_ratio: float = Field(0.1, gt=0)
        """Smallest factor of the learning rate."""
        max_lr_ratio: float = Field(100.0, gt=0)
        """Largest factor of the learning rate."""
        clip: float = Field(1.0, gt=0)
        """c, largest size of a weight's update before its rate."""
        weight_decay: float = Field(0.0, ge=0)
        """λ: share of each weight that is taken away per step, times the learning rate."""

        @model_validator(mode="after")
        def _in_order(self) -> Automagic.Config:
            if not self.min_lr_ratio <= 1 <= self.max_lr_ratio:
                raise ValueError("min_lr_ratio must be 1 at most and max_lr_ratio 1 at least")
            return self

    def __init__(self, config: Automagic.Config, build: BuildContext) -> None:
        self.config = config

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return AutomagicOptimizer([dict(group) for group in parameters], lr, self.config)


class AutomagicOptimizer(torch.optim.Optimizer):
    """The update of `Automagic`, element by element.

    The factor of a weight's rate is positive, so that its sign is free to keep the last gradient's.
    """

    def __init__(
        self, parameters: Iterable[Mapping[str, Any]], lr: float, config: Automagic.Config
    ) -> None:
        super().__init__([dict(group) for group in parameters], {"lr": lr})
        self._config = config

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group["lr"])

    def _update(self, weight: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        config, state = self._config, self.state[weight]
        if not state:
            state["step"] = 0
            state["exp_avg_sq"] = torch.zeros_like(weight)
            state["signed_ratio"] = torch.ones_like(weight)
        state["step"] += 1
        squares, signed = state["exp_avg_sq"], state["signed_ratio"]
        squares.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        ratio = signed.abs()
        if state["step"] > 1:
            bump = torch.sign(gradient).mul_(signed.sign()).mul_(config.lr_bump)
            ratio.add_(bump).clamp_(config.min_lr_ratio, config.max_lr_ratio)
        torch.copysign(ratio, gradient, out=signed)
        correction = 1 - config.beta2 ** state["step"]
        update = gradient / (squares / correction).sqrt_().add_(config.eps)
        weight.mul_(1 - lr * config.weight_decay)
        weight.addcmul_(update.clamp_(-config.clip, config.clip), ratio, value=-lr)
