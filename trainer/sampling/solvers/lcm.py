"""Sampling of few-step models: jump to the clean estimate, then add new noise.

Luo et al., "Latent Consistency Models", arXiv:2310.04378 (its multistep sampling is Song et al.,
"Consistency Models", arXiv:2303.01469, algorithm 1), with the noise of a flow:
(1 - sigma)·clean + sigma·noise. For models and LoRAs distilled to a few steps; others blur.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.sampling.schedule import full_range_schedule


class LCM:
    """Clean estimate, then noise anew up to the next sigma; the last step ends clean."""

    evaluations = 1
    schedule = staticmethod(full_range_schedule)

    def __init__(self, sigmas: Tensor, generator: torch.Generator | None = None) -> None:
        if generator is None:
            raise ValueError("LCM draws noise at every step: it needs a generator")
        self._sigmas: list[float] = sigmas.double().tolist()
        self._generator = generator

    def step(self, index: int, noisy_BCFHW: Tensor, velocity_BCFHW: Tensor) -> Tensor:
        """Return the latents at the next sigma; see `Solver.step`."""
        velocity = velocity_BCFHW.to(noisy_BCFHW.dtype)
        clean = noisy_BCFHW - self._sigmas[index] * velocity
        following = self._sigmas[index + 1]
        if following == 0:
            return clean
        # On the CPU and in float32 whatever the device, so that a seed is one video everywhere.
        noise = torch.randn(noisy_BCFHW.shape, generator=self._generator).to(noisy_BCFHW)
        return (1 - following) * clean + following * noise
