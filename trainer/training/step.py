"""One microbatch: draw sigma and noise, mix, predict, compare. The module an engine wraps.

Everything random is a function of the run's seed and of the item, so that a sample meets the same
noise on any rank, in any batch and after any restart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from trainer.contract.timestep_mass import within
from trainer.core.flow import to_timestep, velocity_target
from trainer.core.rng import derive_seed, generator
from trainer.core.seams import Loss, LossObserver, Technique, TimestepSampler, Weighting
from trainer.core.types import Batch, LossTerm, NoisyInput
from trainer.training.loss_reduction import reduce_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaRange:
    """Part of [0, 1] that is trained, and how draws are brought into it."""

    low: float = 0.0
    high: float = 1.0
    preserve_shape: bool = False

    def draw(self, sampler: TimestepSampler, random: torch.Generator, frame_tokens: int) -> Tensor:
        """Return one sigma, float32, shape ()."""
        if self.preserve_shape:
            share = torch.rand((), generator=random, dtype=torch.float64).item()
            return self.at_quantile(sampler, share, frame_tokens)
        return self.low + (self.high - self.low) * sampler.sample(1, random, frame_tokens)[0]

    def at_quantile(self, sampler: TimestepSampler, share: float, frame_tokens: int) -> Tensor:
        """Return the sigma that a share of all draws is below, float32, shape ()."""
        base = sampler.distribution(frame_tokens)
        part = within(base, self.low, self.high, preserve_shape=self.preserve_shape)
        return torch.tensor(part.quantile(share), dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Everything that turns a prediction into the base loss."""

    sampler: TimestepSampler
    loss: Loss
    weighting: Weighting
    sigmas: SigmaRange
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, height and width of a token."""


class TrainStep(nn.Module):
    """Maps a `Batch` to named loss terms; their sum is the loss.

    Args:
        transformer: the model with its adapter.
        objective: sampler, loss and weighting.
        techniques: optional behaviour, in config order.
        seed: the run's seed.
        suspended_hooks: switches the transformer's block hooks off for an extra forward.
        suspended_adapter: takes what is trained out of the transformer for an extra forward; None:
            nobody asks for that.
        observe: told of the loss of each item.
        any_rank: tells whether a flag is set on some process, where all must run as many forwards
            since they share the weights (ZeRO-3); None: each runs what it needs.
        part: which part of each clip's tokens this process has, from 0. Dropout masks of different
            parts are drawn independently, like those of different tokens.
    """

    def __init__(  # noqa: PLR0913 - what surrounds the transformer, by name
        self,
        transformer: nn.Module,
        objective: Objective,
        techniques: Sequence[Technique],
        seed: int,
        suspended_hooks: Callable[[], AbstractContextManager[None]],
        *,
        suspended_adapter: Callable[[], AbstractContextManager[None]] | None = None,
        observe: LossObserver | None = None,
        any_rank: Callable[[bool], bool] | None = None,
        part: int = 0,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.extra = nn.ModuleDict(
            {
                f"{index}_{name}": module
                for index, technique in enumerate(techniques)
                for name, module in technique.modules().items()
            }
        )
        self.objective = objective
        self.techniques = tuple(techniques)
        self.seed = seed
        self.suspended_hooks = suspended_hooks
        self.suspended_adapter = suspended_adapter
        self.observe = observe
        self.any_rank = any_rank
        self._dropout = ("dropout", part) if part else ("dropout",)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return each loss term, float32, shape ()."""
        torch.manual_seed(derive_seed(self.seed, *self._dropout, *batch.item_seeds))
        for index, technique in enumerate(self.techniques):
            batch = technique.edit_batch(batch, self._technique_random(index, "batch", batch))
        noisy = self.make_noisy(batch)
        for index, technique in enumerate(self.techniques):
            random = self._technique_random(index, "noisy", batch)
            noisy = technique.edit_noisy(noisy, batch, random)
        # Before the prediction, so that no activations wait while another forward runs.
        target = self.target(noisy, batch)
        prediction = self.predict(noisy, batch)
        terms = [self.base_term(prediction, target, noisy, batch)]
        for technique in self.techniques:
            terms += technique.loss_terms(batch, noisy, prediction, self.predict_again)
        return {term.name: term.value for term in terms}

    def make_noisy(self, batch: Batch) -> NoisyInput:
        """Draw sigma and noise of every item and mix them with its latents."""
        latents = batch.latents_BCFHW
        noises = [
            torch.randn(latents.shape[1:], generator=generator(self.seed, "noise", item_seed))
            for item_seed in batch.item_seeds
        ]
        sigma = self._draw_sigmas(batch).to(latents.device)
        noise = torch.stack(noises).to(latents.device)
        return NoisyInput.mix(latents, noise, sigma)

    def _draw_sigmas(self, batch: Batch) -> Tensor:
        """Return one sigma per item, (B,) on the CPU."""
        objective = self.objective
        _, height, width = objective.patch_size
        rows, columns = batch.latents_BCFHW.shape[-2:]
        frame_tokens = (rows // height) * (columns // width)
        quantiles = batch.quantiles or (None,) * len(batch.item_seeds)
        sigmas = []
        for item_seed, share in zip(batch.item_seeds, quantiles, strict=True):
            if share is None:
                random = generator(self.seed, "sigma", item_seed)
                sigma = objective.sigmas.draw(objective.sampler, random, frame_tokens)
            else:
                sigma = objective.sigmas.at_quantile(objective.sampler, share, frame_tokens)
            sigmas.append(sigma)
        return torch.stack(sigmas)

    def predict(self, noisy: NoisyInput, batch: Batch) -> Tensor:
        """Return the velocity the transformer predicts, (B, C, F, H, W)."""
        return predict_velocity(self.transformer, noisy, batch)

    def predict_again(self, noisy: NoisyInput, batch: Batch) -> Tensor:
        """Run one more forward that no block hook sees or changes."""
        with self.suspended_hooks():
            return self.predict(noisy, batch)

    @torch.no_grad()
    def predict_base(self, noisy: NoisyInput, batch: Batch) -> Tensor:
        """Run one more forward, of the model without what is trained.

        Raises:
            RuntimeError: the step was made without `suspended_adapter`.
        """
        if self.suspended_adapter is None:
            raise RuntimeError("this step cannot take the adapter off")
        with self.suspended_hooks(), self.suspended_adapter():
            return self.predict(noisy, batch)

    def target(self, noisy: NoisyInput, batch: Batch) -> Tensor:
        """Return what the prediction is compared with, float32, (B, C, F, H, W)."""
        target = velocity_target(batch.latents_BCFHW.float(), noisy.noise_BCFHW)
        for technique in self.techniques:
            if self._others_ask(technique, batch):
                self.predict_base(noisy, batch)
            target = technique.edit_target(target, batch, noisy, self.predict_base)
        return target

    def _others_ask(self, technique: Technique, batch: Batch) -> bool:
        """Tell whether another process runs a forward of the base here that this one does not."""
        if self.any_rank is None:
            return False
        asks = technique.asks_base(batch)
        return asks is not None and self.any_rank(asks) and not asks

    def base_term(
        self, prediction: Tensor, target: Tensor, noisy: NoisyInput, batch: Batch
    ) -> LossTerm:
        """Return the weighted mean of the pointwise loss."""
        value = reduce_loss(
            self.objective.loss(prediction, target, noisy.sigma_B),
            maps=(technique.loss_map(batch, noisy) for technique in self.techniques),
            sigma_weight_B=self.objective.weighting(noisy.sigma_B),
            item_weight_B=batch.loss_weight_B,
            observe=None if self.observe is None else partial(self.observe, batch, noisy.sigma_B),
        )
        return LossTerm(name="loss", value=value)

    def _technique_random(self, index: int, what: str, batch: Batch) -> torch.Generator:
        # A stream of its own: switching one technique on must not shift another's draws.
        return generator(self.seed, "technique", index, what, *batch.item_seeds)


class TurningStep(nn.Module):
    """Several steps with the same trained parameters, of which one works at a time.

    Args:
        steps: by name; their extra modules are the same.
    """

    def __init__(self, steps: Mapping[str, TrainStep]) -> None:
        super().__init__()
        self.steps = nn.ModuleDict(dict(steps))
        self.working = next(iter(steps))

    @property
    def extra(self) -> nn.ModuleDict:
        """What techniques add to be trained."""
        extra: nn.ModuleDict = self.steps[self.working].extra  # type: ignore[assignment]
        return extra

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss terms of the step whose name is in `working`."""
        terms: dict[str, Tensor] = self.steps[self.working](batch)
        return terms


def predict_velocity(transformer: nn.Module, noisy: NoisyInput, batch: Batch) -> Tensor:
    """Return what `transformer` predicts for a batch of the caches, (B, C, F, H, W)."""
    velocity: Tensor = transformer(
        noisy.noisy_latents_BCFHW, to_timestep(noisy.sigma_B), batch.context, **batch.conditioning
    )
    return velocity
