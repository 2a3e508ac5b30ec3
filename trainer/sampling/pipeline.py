"""From a request to latents, and from latents to frames.

The models stay as they were found: no gradient, no change of mode, no hook, no use of the global
random state. A sample during training therefore leaves the training bit for bit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from trainer.contract.catalog import SOLVERS
from trainer.contract.errors import NonFiniteError
from trainer.contract.variants import Expert, Variant
from trainer.core.flow import add_noise, clean_estimate
from trainer.models.wan.conditioning import keep_first_frame
from trainer.sampling.conditions import Conditions, encode_files
from trainer.sampling.denoise import (
    Evaluations,
    SamplingModels,
    VelocityPredictor,
    evaluating,
    expert_at,
)
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import Solver, walk_of
from trainer.sampling.step_cache.cache import BlockObserver
from trainer.sampling.video_io import AnyFrame, Frame

__all__ = [
    "Evaluations",
    "Expert",
    "OnEstimate",
    "OnStep",
    "SamplingModels",
    "VideoDecoder",
    "decode_frames",
    "evaluating",
    "expert_at",
    "generate",
    "initial_noise",
]

OnStep = Callable[[int, int], None]
OnEstimate = Callable[[int, Tensor], None]


class VideoDecoder(Protocol):
    """The part of a Wan VAE that makes pixels."""

    def decode_chunks(self, latents: Tensor, /) -> Iterator[Tensor]:
        """Yield video_B3FHW in [-1, 1], a few frames at a time, in order."""
        ...

    def decode(self, latents: Tensor, /, *, tile: tuple[int, int] | None = None) -> Tensor:
        """Return video_B3FHW in [-1, 1], decoded in overlapping tiles of (height, width) pixels."""
        ...


def generate(
    models: SamplingModels,
    request: SampleRequest,
    *,
    conditions: Conditions | None = None,
    noise_BCFHW: Tensor | None = None,
    on_step: OnStep | None = None,
    on_estimate: OnEstimate | None = None,
    observer: BlockObserver | None = None,
    on_end: Callable[[Evaluations], None] | None = None,
) -> Tensor:
    """Sample one video.

    The same request gives the same latents, bit for bit, on the same machine.

    Args:
        models: the models; they are left as they were.
        request: what to make; checked against the variant.
        conditions: encoded files, when they were encoded before.
        noise_BCFHW: where to start instead of the seed's noise, float32.
        on_step: called with (evaluations done, evaluations in all) after each one; may raise to
            stop.
        on_estimate: called before `on_step` with (evaluations done, clean_estimate_BCFHW): the
            latents that this velocity points at, a tensor of its own.
        observer: watches the blocks in the place of the request's step cache.
        on_end: told of how many passes there were.

    Returns:
        latents_BCFHW, normalised, float32, B = 1, on the models' device.

    Raises:
        ConfigError: the request does not fit the model, or its step cache does not know it.
        NonFiniteError: the latents became NaN or infinite.
        KeyError: a text of the request was not encoded.
    """
    request.check(models.variant)
    if conditions is None:
        conditions = encode_files(
            request, models.variant, models.vae, models.image_encoder, models.device
        )
    conditions = conditions.to(models.device)
    solver_class: type[Solver] = SOLVERS.load(request.solver)
    schedule = walk_of(request)
    generator = torch.Generator().manual_seed(request.seed)
    drawn = initial_noise(request, models.variant, generator)
    solver = solver_class(schedule.sigmas, generator)
    noise = (drawn if noise_BCFHW is None else noise_BCFHW).to(models.device, torch.float32)
    if conditions.start_latents_BCFHW is not None:
        sigma = schedule.sigmas[:1].to(models.device)
        noise = add_noise(conditions.start_latents_BCFHW.float(), noise, sigma)
    latents = _hold(noise, conditions)
    timesteps = schedule.timesteps.tolist()
    working = VelocityPredictor(models, request, conditions, timesteps, observer)
    with torch.no_grad(), working as predictor:
        for index in range(schedule.num_steps):
            velocity = predictor.velocity(index, latents)
            if on_estimate is not None:
                sigma_B = schedule.sigmas[index].to(latents).expand(len(latents))
                estimate = _hold(clean_estimate(latents, velocity, sigma_B), conditions)
                on_estimate(index + 1, _shown(estimate, request))
            latents = _hold(solver.step(index, latents, velocity), conditions)
            if on_step is not None:
                on_step(index + 1, schedule.num_steps)
    if not torch.isfinite(latents).all():
        raise NonFiniteError(
            f"the sample of {request.prompt[:60]!r} became NaN or infinite",
            hint="lower guidance_scale or the LoRA's strength, or sample in fp32",
        )
    if on_end is not None:
        on_end(predictor.evaluations)
    return _shown(latents, request)


def initial_noise(
    request: SampleRequest, variant: Variant, generator: torch.Generator | None = None
) -> Tensor:
    """Return the seed's standard normal noise, (1, C, F, H, W), float32 on the CPU.

    It is what diffusers draws with `torch.Generator("cpu").manual_seed(seed)`, so that the two can
    be compared; a stream of `trainer.core.rng` would not be.

    Args:
        request: gives size and seed.
        variant: gives the VAE's stride.
        generator: the seed's, for who draws more from it afterwards; None: a new one.
    """
    frames, height, width = variant.vae_stride
    size = (
        (request.num_walked_frames - 1) // frames + 1,
        request.height // height,
        request.width // width,
    )
    if generator is None:
        generator = torch.Generator().manual_seed(request.seed)
    return torch.randn(1, variant.latent_channels, *size, generator=generator)


@overload
def decode_frames(
    vae: VideoDecoder, latents_BCFHW: Tensor, *, tile: tuple[int, int] | None = None
) -> Iterator[Frame]: ...
@overload
def decode_frames(
    vae: VideoDecoder,
    latents_BCFHW: Tensor,
    *,
    tile: tuple[int, int] | None = None,
    bits: Literal[8, 16],
) -> Iterator[AnyFrame]: ...
def decode_frames(
    vae: VideoDecoder,
    latents_BCFHW: Tensor,
    *,
    tile: tuple[int, int] | None = None,
    bits: Literal[8, 16] = 8,
) -> Iterator[AnyFrame]:
    """Yield the frames of the first video in the batch, (H, W, 3) on the CPU.

    Args:
        vae: decodes.
        latents_BCFHW: what `generate` returned.
        tile: (height, width) in pixels: decode overlapping tiles and hold the whole video. None:
            decode whole frames and hold no more than the VAE's chunk.
        bits: of a colour: uint8, or uint16 for formats that hold more than 8.
    """
    latents = latents_BCFHW[:1]
    half = (2**bits - 1) / 2
    dtype = np.uint8 if bits == 8 else np.uint16
    chunks = iter(vae.decode_chunks(latents)) if tile is None else _tiled(vae, latents, tile)
    while True:
        with torch.no_grad():  # not around the yield: it would hold in the caller's code, too
            chunk_B3FHW = next(chunks, None)
            if chunk_B3FHW is None:
                return
            pixels = ((chunk_B3FHW[0].float() + 1) * half).round().clamp(0, 2 * half)
            whole = pixels.to(torch.uint8 if bits == 8 else torch.int32)
            # PyTorch has no arithmetic on uint16, NumPy has.
            frames_FHW3 = whole.permute(1, 2, 3, 0).cpu().contiguous().numpy().astype(dtype)
        yield from frames_FHW3


def _tiled(vae: VideoDecoder, latents_BCFHW: Tensor, tile: tuple[int, int]) -> Iterator[Tensor]:
    yield vae.decode(latents_BCFHW, tile=tile)


def _shown(latents_BCFHW: Tensor, request: SampleRequest) -> Tensor:
    """Return what is kept: in one-frame mode the frame that was asked for, else everything."""
    moments = request.moments
    if moments is None:
        return latents_BCFHW
    return latents_BCFHW[:, :, moments.target : moments.target + 1]


def _hold(latents_BCFHW: Tensor, conditions: Conditions) -> Tensor:
    if conditions.first_latents_BC1HW is None:
        return latents_BCFHW
    return keep_first_frame(latents_BCFHW, conditions.first_latents_BC1HW)
