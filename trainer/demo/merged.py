"""Whether two models compute the same."""

from __future__ import annotations

import torch

from trainer.core.flow import to_timestep
from trainer.models.wan.transformer import WanTransformer

_SIGMAS = (0.1, 0.5, 0.9)
_LATENT_SIZE = (5, 8, 8)
_TEXT_TOKENS = 16


def largest_difference(first: WanTransformer, second: WanTransformer) -> float:
    """Return the largest difference of two models' velocities, relative to the largest velocity."""
    random = torch.Generator().manual_seed(7)
    config = first.config
    latents_BCFHW = torch.randn(1, config.in_channels, *_LATENT_SIZE, generator=random)
    context_TD = torch.randn(_TEXT_TOKENS, config.text_dim, generator=random)
    largest, scale = 0.0, 0.0
    for sigma in _SIGMAS:
        given = (latents_BCFHW, to_timestep(torch.tensor([sigma])), [context_TD])
        with torch.no_grad():
            one, two = first(*given), second(*given)
        largest = max(largest, float((one - two).abs().max()))
        scale = max(scale, float(one.abs().max()))
    return largest / scale
