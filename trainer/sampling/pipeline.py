"""From a request to latents, and from latents to frames.

The models stay as they were found: no gradient, no change of mode, no hook, no use of the global
random state. A sample during training therefore leaves the training bit for bit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer.contract.catalog import SOLVERS
from trainer.contract.errors import NonFiniteError
from trainer.contract.variants import Expert, Variant
from trainer.core.flow import add_noise, to_timestep
from trainer.models.block_stack import BlockStack
from trainer.models.wan.conditioning import LatentEncoder, first_frame_timestep, keep_first_frame
from trainer.sampling.conditions import Conditions, ImageEncoder, encode_files
from trainer.sampling.guidance import guided_velocity, needs_negative
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import Solver, walk_of
from trainer.sampling.video_io import Frame

OnStep = Callable[[int, int], None]


class VideoDecoder(Protocol):
    """The part of a Wan VAE that makes pixels."""

    def decode_chunks(self, latents: Tensor, /) -> Iterator[Tensor]:
        """Yield video_B3FHW in [-1, 1], a few frames at a time, in order."""
        ...

    def decode(self, latents: Tensor, /, *, tile: tuple[int, int] | None = None) -> Tensor:
        """Return video_B3FHW in [-1, 1], decoded in overlapping tiles of (height, width) pixels."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingModels:
    """What `generate` works with."""

    variant: Variant
    transformer: Callable[[Expert], nn.Module]
    """Returns the expert, on `device` and ready; called before every step, so that it may load one
    expert and park the other. Models with one transformer are asked for `low_noise`."""
    contexts: Mapping[str, Tensor]
    """Embedding (T, D) of every text that the requests use; see `encode_texts`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    vae: LatentEncoder | None = None
    """Encodes the files of a request; not needed when `conditions` are given."""
    image_encoder: ImageEncoder | None = None
    """Encodes images for variants with an image branch; see `vae`."""


def generate(
    models: SamplingModels,
    request: SampleRequest,
    *,
    conditions: Conditions | None = None,
    noise_BCFHW: Tensor | None = None,
    on_step: OnStep | None = None,
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

    Returns:
        latents_BCFHW, normalised, float32, B = 1, on the models' device.

    Raises:
        ConfigError: the request does not fit the model.
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
    with torch.no_grad():
        for index, timestep in enumerate(schedule.timesteps.tolist()):
            velocity = _velocity(models, request, conditions, latents, timestep)
            latents = _hold(solver.step(index, latents, velocity), conditions)
            if on_step is not None:
                on_step(index + 1, schedule.num_steps)
    if not torch.isfinite(latents).all():
        raise NonFiniteError(
            f"the sample of {request.prompt[:60]!r} became NaN or infinite",
            hint="lower guidance_scale or the LoRA's strength, or sample in fp32",
        )
    return latents


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
        (request.num_frames - 1) // frames + 1,
        request.height // height,
        request.width // width,
    )
    if generator is None:
        generator = torch.Generator().manual_seed(request.seed)
    return torch.randn(1, variant.latent_channels, *size, generator=generator)


def expert_at(timestep: float, variant: Variant) -> Expert:
    """Return the expert that works at `timestep`: high noise at the boundary and above."""
    if variant.experts and timestep >= to_timestep(variant.expert_boundary):
        return "high_noise"
    return "low_noise"


def decode_frames(
    vae: VideoDecoder, latents_BCFHW: Tensor, *, tile: tuple[int, int] | None = None
) -> Iterator[Frame]:
    """Yield the frames of the first video in the batch, uint8 (H, W, 3) on the CPU.

    Args:
        vae: decodes.
        latents_BCFHW: what `generate` returned.
        tile: (height, width) in pixels: decode overlapping tiles and hold the whole video. None:
            decode whole frames and hold no more than the VAE's chunk.
    """
    latents = latents_BCFHW[:1]
    chunks = iter(vae.decode_chunks(latents)) if tile is None else _tiled(vae, latents, tile)
    while True:
        with torch.no_grad():  # not around the yield: it would hold in the caller's code, too
            chunk_B3FHW = next(chunks, None)
            if chunk_B3FHW is None:
                return
            pixels = ((chunk_B3FHW[0].float() + 1) * 127.5).round().clamp(0, 255)
            frames_FHW3 = pixels.to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous().numpy()
        yield from frames_FHW3


def _tiled(vae: VideoDecoder, latents_BCFHW: Tensor, tile: tuple[int, int]) -> Iterator[Tensor]:
    yield vae.decode(latents_BCFHW, tile=tile)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Use `module` as people who take the result away will: no dropout, no technique's hooks.

    Every submodule is put back into its own mode afterwards, and the hooks work again.
    """
    modes = [(part, part.training) for part in module.modules()]
    with ExitStack() as stack:
        for part, _ in modes:
            if isinstance(part, BlockStack):
                stack.enter_context(part.suspended())
        module.eval()
        try:
            yield
        finally:
            for part, training in modes:
                part.training = training


def _velocity(
    models: SamplingModels,
    request: SampleRequest,
    conditions: Conditions,
    latents_BCFHW: Tensor,
    timestep: float,
) -> Tensor:
    expert = expert_at(timestep, models.variant)
    guidance_scale = request.guidance_scale[expert == "high_noise"]
    transformer = models.transformer(expert)
    timestep_tensor = _timestep_tensor(models.variant, conditions, latents_BCFHW, timestep)

    def velocity(context_TD: Tensor) -> Tensor:
        result: Tensor = transformer(
            latents_BCFHW,
            timestep_tensor,
            [context_TD.to(models.device)],
            extra_channels=conditions.extra_channels_BCFHW,
            image_context=conditions.image_context_BTD,
        )
        return result

    negative = models.contexts[request.negative_prompt] if needs_negative(guidance_scale) else None
    with evaluating(transformer):
        return guided_velocity(velocity, models.contexts[request.prompt], negative, guidance_scale)


def _timestep_tensor(
    variant: Variant, conditions: Conditions, latents_BCFHW: Tensor, timestep: float
) -> Tensor:
    timestep_B = torch.full(
        (latents_BCFHW.shape[0],), timestep, dtype=torch.float32, device=latents_BCFHW.device
    )
    if conditions.first_latents_BC1HW is None:
        return timestep_B
    _, _, frames, height, width = latents_BCFHW.shape
    return first_frame_timestep(timestep_B, (frames, height, width), variant.transformer.patch_size)


def _hold(latents_BCFHW: Tensor, conditions: Conditions) -> Tensor:
    if conditions.first_latents_BC1HW is None:
        return latents_BCFHW
    return keep_first_frame(latents_BCFHW, conditions.first_latents_BC1HW)
