"""The values that travel through one training step.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width, L tokens,
T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainer.core.flow import add_noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One microbatch as it comes from the caches; all items share one bucket."""

    latents_BCFHW: Tensor
    """Clean normalised latents, float32."""
    context: tuple[Tensor, ...]
    """One text embedding per item, (T_i, 4096), unpadded."""
    extra_channels_BCFHW: Tensor | None = None
    """Conditioning that is concatenated to the noisy latents (I2V: mask + image latents)."""
    image_context_BTD: Tensor | None = None
    """CLIP features, (B, 257, 1280); FLF2V (B, 514, 1280)."""
    names: tuple[str, ...] = ()
    """The clips the items come from, for messages."""
    sources: tuple[int, ...] = ()
    """Number of each item's source in the dataset, from 0."""
    item_seeds: tuple[int, ...] = ()
    """One number per item; it fixes its noise and sigma, whatever rank or batch it is in."""
    captions: tuple[str, ...] = ()
    """The texts that `context` was made from."""
    quantiles: tuple[float | None, ...] = ()
    """Where in the distribution each item's sigma is, in [0, 1); None or missing: drawn by its
    seed alone."""
    mask_B1FHW: Tensor | None = None
    """What of each item shall be learned, in [0, 1] on the latents' grid; None: no masks."""
    loss_weight_B: Tensor | None = None
    """`loss_weight` of each item's source, float32; None: all are 1."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with every tensor on `device`."""
        return replace(
            self,
            latents_BCFHW=self.latents_BCFHW.to(device, non_blocking=True),
            context=tuple(item.to(device, non_blocking=True) for item in self.context),
            extra_channels_BCFHW=_to(self.extra_channels_BCFHW, device),
            image_context_BTD=_to(self.image_context_BTD, device),
            mask_B1FHW=_to(self.mask_B1FHW, device),
            loss_weight_B=_to(self.loss_weight_B, device),
        )

    @property
    def conditioning(self) -> dict[str, Tensor]:
        """Keyword arguments of the transformer beyond latents, timestep and context."""
        extra = {
            "extra_channels": self.extra_channels_BCFHW,
            "image_context": self.image_context_BTD,
        }
        return {name: value for name, value in extra.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyInput:
    """What the transformer sees. `sigma_B` is 0 for clean data and 1 for pure noise."""

    noisy_latents_BCFHW: Tensor
    sigma_B: Tensor
    noise_BCFHW: Tensor

    @classmethod
    def mix(cls, latents_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor) -> NoisyInput:
        """Return clean latents with noise added, in float32."""
        return cls(
            noisy_latents_BCFHW=add_noise(latents_BCFHW.float(), noise_BCFHW, sigma_B),
            sigma_B=sigma_B,
            noise_BCFHW=noise_BCFHW,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm:
    """A named scalar of the total loss, already weighted."""

    name: str
    value: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one update of the weights reports; plain numbers, equal on every rank."""

    terms: Mapping[str, float]
    grad_norm: float
    lr: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Sum of all terms."""
        return sum(self.terms.values())


def _to(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device, non_blocking=True)
