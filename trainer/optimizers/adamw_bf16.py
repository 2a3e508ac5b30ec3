"""AdamW for weights that stay in bf16, without float32 copies of them.

bf16 has 8 significant bits, so that an update below 1/512 of a weight would be lost. Either what is
lost is carried on to the next step (Kahan's compensated sum, arXiv:2010.06192), or the sum is
rounded up with the probability that makes it right on average (stochastic rounding, same paper).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trainer.core.rng import derive_seed
from trainer.core.seams import BuildContext, OptimizerFactory
from trainer.optimizers.adamw import AdamWOptions


class AdamWBf16(OptimizerFactory):
    """For full fine-tunes in bf16: 2 or 0 bytes a weight where float32 copies take 4.

    Moments are float32, since bf16 could not follow a mean with decay 0.999.
    """

    elementwise: ClassVar[bool] = False
    state_names: ClassVar[tuple[str, ...]] = ()
    keeps_low_precision: ClassVar[bool] = True

    class Config(AdamWOptions):
        """Options of `optimizer.kind = "adamw_bf16"`."""

        rounding: Literal["kahan", "stochastic"] = "kahan"
        """What becomes of the part of an update that bf16 cannot hold: carried on, for 2 bytes a
        weight, or rounded at random, for nothing."""

    def __init__(self, config: AdamWBf16.Config, build: BuildContext) -> None:
        self.config = config
        self.seed = build.seed

    def build(self, parameters: Iterable[Mapping[str, Any]], lr: float) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return AdamWBf16Optimizer(parameters, lr, self.config, self.seed)


class AdamWBf16Optimizer(torch.optim.Optimizer):
    """AdamW whose sums are rounded as `rounding` says; float32 weights need none of it."""

    def __init__(
        self,
        parameters: Iterable[Mapping[str, Any]],
        lr: float,
        config: AdamWBf16.Config,
        seed: int,
    ) -> None:
        super().__init__([dict(group) for group in parameters], {"lr": lr})
        self._config = config
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        index = 0
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad.float(), group["lr"], index)
                index += 1

    def _update(self, weight: Tensor, gradient: Tensor, lr: float, index: int) -> None:
        config, state = self._config, self.state[weight]
        kahan = config.rounding == "kahan" and weight.dtype != torch.float32
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = torch.zeros_like(gradient)
            if kahan:
                state["lost"] = torch.zeros_like(weight)
        state["step"] += 1
        (first, second), step = config.betas, state["step"]
        mean, squares = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - first)
        squares.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = squares.sqrt().div_(math.sqrt(1 - second**step)).add_(config.eps)
        exact = weight.float()
        change = (mean / root).mul_(-lr / (1 - first**step))
        change.sub_(exact, alpha=lr * config.weight_decay)
        if weight.dtype == torch.float32:
            weight.add_(change)
        elif kahan:
            change.add_(state["lost"])
            weight.copy_(exact + change)
            state["lost"].copy_(change.sub_(weight.float() - exact))
        else:
            seed = derive_seed(self._seed, "adamw_bf16", step, index)
            weight.copy_(rounded_at_random(exact.add_(change), seed))


def rounded_at_random(values: Tensor, seed: int) -> Tensor:
    """Return float32 values as one of the two bf16 values next to each, in bf16.

    The nearer one is the likelier one, so that the mean over many seeds is the value itself.
    """
    random = torch.Generator(device=values.device).manual_seed(seed)
    noise = torch.randint(
        0, 1 << 16, values.shape, generator=random, device=values.device, dtype=torch.int32
    )
    bits = values.contiguous().view(torch.int32) + noise  # carries into the 16 bits that bf16 has
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()
