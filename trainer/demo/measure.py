"""What the demo claims, measured: losses at fixed noise, likeness, equality of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.contract.variants import get_variant
from trainer.core.flow import add_noise, to_timestep, velocity_target
from trainer.demo.clips import FPS, NUM_FRAMES, SIZE
from trainer.demo.configs import FLOW_SHIFT
from trainer.demo.models import VARIANT
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.pipeline import SamplingModels, generate
from trainer.sampling.requests import SampleRequest

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NOISES_PER_SIGMA = 4
_NUM_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A clip as the trainer sees it."""

    caption: str
    latents_BCFHW: Tensor
    context_TD: Tensor


def fixed_loss(transformer: WanTransformer, example: Example) -> float:
    """Return the mean squared error of the velocity at fixed sigmas and fixed noise."""
    errors = []
    for index, sigma in enumerate(SIGMAS):
        sigma_B = torch.full((_NOISES_PER_SIGMA,), sigma)
        latents = example.latents_BCFHW.expand(_NOISES_PER_SIGMA, -1, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1000 + index))
        with torch.no_grad():
            velocity = transformer(
                add_noise(latents, noise, sigma_B),
                to_timestep(sigma_B),
                [example.context_TD] * _NOISES_PER_SIGMA,
            )
        errors.append((velocity - velocity_target(latents, noise)).square().mean())
    return float(torch.stack(errors).mean())


def sample_latents(transformer: WanTransformer, example: Example, seed: int) -> Tensor:
    """Sample from the example's caption, from noise alone and without guidance."""
    request = SampleRequest(
        prompt=example.caption,
        negative_prompt="",
        width=SIZE,
        height=SIZE,
        num_frames=NUM_FRAMES,
        num_steps=_NUM_STEPS,
        guidance_scale=(1.0, 1.0),
        flow_shift=FLOW_SHIFT,
        seed=seed,
        solver="unipc",
        fps=FPS,
    )
    models = SamplingModels(
        variant=get_variant(VARIANT),
        transformer=lambda expert: transformer,
        contexts={example.caption: example.context_TD},
    )
    return generate(models, request)


def likeness(latents: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two sets of latents, all elements as one vector."""
    return float(torch.cosine_similarity(latents.flatten(), other.flatten(), dim=0))


def largest_difference(
    first: WanTransformer, second: WanTransformer, examples: Sequence[Example]
) -> float:
    """Return the largest difference of two models' velocities, relative to the largest velocity."""
    largest, scale = 0.0, 0.0
    for example in examples:
        noise = torch.randn(example.latents_BCFHW.shape, generator=torch.Generator().manual_seed(7))
        for sigma in SIGMAS:
            sigma_B = torch.tensor([sigma])
            noisy = add_noise(example.latents_BCFHW, noise, sigma_B)
            given = (noisy, to_timestep(sigma_B), [example.context_TD])
            with torch.no_grad():
                one, two = first(*given), second(*given)
            largest = max(largest, float((one - two).abs().max()))
            scale = max(scale, float(one.abs().max()))
    return largest / scale
