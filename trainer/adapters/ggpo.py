"""LoRA-GGPO: LoRA trained under noise on its weights, to end where the loss is flat.

"LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation
Optimization", arXiv:2502.14538. Each row of the weight is disturbed in proportion to its norm and
to that of its gradient. The gradient of the whole weight is not known where only factors are
trained; in its place stands s · (B ∂A + ∂B A), what the factors' gradients would change of it.

Shape letters: R rank, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.adapters.low_rank_adapter import LowRankAdapter, LowRankOptions
from trainer.adapters.perturbed_linear import NoiseState, PerturbedLinear, product_row_norms
from trainer.core.seams import BuildContext, Technique, TrainingState
from trainer.core.types import Batch


class GGPO(LowRankAdapter):
    """Trains a LoRA under noise; the file is an ordinary LoRA."""

    kind = "ggpo"

    class Config(LowRankOptions):
        """Options of `[adapter] kind = "ggpo"`."""

        sigma: float = Field(0.03, ge=0, le=1)
        """Noise in proportion to the norm of a weight's row."""
        beta: float = Field(0.01, ge=0)
        """Noise in proportion to the norm of its gradient."""
        norms_every_steps: int = Field(10, ge=1)
        """Both norms are measured anew every so many steps."""

    config: GGPO.Config

    def __init__(self, config: GGPO.Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self._noise = NoiseState(config.sigma, config.beta)

    def make_layer(self, name: str, base: nn.Module, seed: int) -> PerturbedLinear:
        """Return a branch that adds nothing yet but noise; initial factors are those of LoRA."""
        factors, dropout = self.first_factors(name, base, seed), self.config.dropout
        scale = self.scale_of(name)
        return PerturbedLinear(base, *factors, scale, dropout, name=name, noise=self._noise)

    def perturbed_layers(self) -> dict[str, PerturbedLinear]:
        """Return the layers by canonical module name."""
        return dict(self._layers)  # type: ignore[arg-type]

    def techniques(self) -> Sequence[Technique]:
        """Return what draws the noise and measures the norms."""
        return (Perturbation(self.perturbed_layers(), self._noise, self.config.norms_every_steps),)


class Perturbation(Technique):
    """Gives each microbatch its noise, and measures the norms.

    In the first step and every so many steps after it, the norms of the weights are taken before
    the step and those of the gradients after it, from the mean over its microbatches and all
    processes, before clipping. Until then there is no gradient, and its share of the noise is 0.
    """

    def __init__(
        self, layers: Mapping[str, PerturbedLinear], noise: NoiseState, every_steps: int
    ) -> None:
        self._layers = dict(layers)
        self._noise = noise
        self._every = every_steps
        self._state: TrainingState | None = None
        self._seen: dict[str, _Seen] = {}

    def connect(self, state: TrainingState) -> None:
        """Take what means over processes go through, and watch the gradients."""
        self._state = state
        for name, layer in self._layers.items():
            for which, parameter in (("down", layer.down), ("up", layer.up)):
                hook = partial(self._saw, name, which, parameter)
                parameter.register_hook(hook)  # type: ignore[no-untyped-call]

    def edit_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Draw the seed of the microbatch's noise; the batch stays as it is."""
        self._noise.seed = int(torch.randint(2**62, (1,), generator=generator))
        self._noise.measures = self._noise.step % self._every == 0
        return batch

    def after_step(self, step: int) -> None:
        """Take the gradients' norms where they are due."""
        if self._noise.measures:
            self._measure()
        self._noise.step, self._noise.seed, self._noise.measures = step, None, False

    def state_dict(self) -> dict[str, Tensor]:
        """Return the step and the norms."""
        norms = {
            f"{name}.{which}": getattr(layer, which)
            for name, layer in self._layers.items()
            for which in ("weight_norms_O", "gradient_norms_O")
        }
        return {"step": torch.tensor(self._noise.step), **norms}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._noise.step = int(state["step"])
        for name, layer in self._layers.items():
            layer.weight_norms_O.copy_(state[f"{name}.weight_norms_O"])
            layer.gradient_norms_O.copy_(state[f"{name}.gradient_norms_O"])

    def _saw(self, name: str, which: str, parameter: Tensor, gradient: Tensor) -> None:
        if self._noise.measures:
            seen = self._seen.setdefault(name, _Seen())
            if which not in seen.factors:  # as it was before the update
                seen.factors[which] = parameter.detach().clone()
                seen.gradients[which] = torch.zeros_like(parameter, requires_grad=False)
            seen.gradients[which] += gradient.detach()

    @torch.no_grad()
    def _measure(self) -> None:
        if self._state is None:
            raise RuntimeError("call connect() first")
        for name, layer in self._layers.items():
            seen = self._seen.pop(name, _Seen())
            means = {}
            for which, parameter in (("down", layer.down), ("up", layer.up)):
                gradient = seen.gradients.get(which, torch.zeros_like(parameter))
                means[which] = self._state.mean_over_ranks(gradient)
            factors = {"down": layer.down, "up": layer.up} | seen.factors
            layer.gradient_norms_O.copy_(
                product_row_norms(
                    factors["up"], factors["down"], means["up"], means["down"], layer.scale
                )
            )


class _Seen:
    """What one layer's factors were in a step, and the sum of their gradients."""

    def __init__(self) -> None:
        self.factors: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
