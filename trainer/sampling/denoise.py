"""The velocity of one video at each step: the passes that guidance asks for, made and combined.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width, T text tokens,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from trainer.contract.variants import Expert, Variant
from trainer.core.flow import to_timestep
from trainer.models.block_stack import BlockStack
from trainer.models.wan.conditioning import LatentEncoder, first_frame_timestep
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.conditions import Conditions, ImageEncoder
from trainer.sampling.guidance import Pass, Step, combined_velocity, planned_passes
from trainer.sampling.requests import SampleRequest


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


class Denoiser:
    """Predicts the velocities of one video."""

    def __init__(
        self,
        models: SamplingModels,
        request: SampleRequest,
        conditions: Conditions,
        timesteps: list[float],
    ) -> None:
        """Prepare what is the same in every step.

        Args:
            models: the models; they are left as they were.
            request: what to make.
            conditions: encoded files, on the models' device.
            timesteps: of all steps.

        Raises:
            KeyError: a text of the request was not encoded.
        """
        self._models = models
        self._request = request
        self._conditions = conditions
        self._timesteps = timesteps
        self._open = ExitStack()
        self._working: nn.Module | None = None
        self._contexts = {
            text: models.contexts[text].to(models.device) for text in dict.fromkeys(request.texts)
        }

    def __enter__(self) -> Self:
        """Begin; the models are put back to how they were at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the models as they were."""
        self._working = None
        self._open.close()

    def velocity(self, index: int, latents_BCFHW: Tensor) -> Tensor:
        """Return the velocity at step `index`, float32, given latents in float32."""
        step = self._step(index)
        passes = planned_passes(step, self._request.prompt, self._request.negative_prompt)
        transformer = self._transformer(step.expert)
        timestep = self._timestep_tensor(latents_BCFHW, step.timestep)
        seen = {
            name: self._run(transformer, what, latents_BCFHW, timestep)
            for name, what in passes.items()
        }
        return combined_velocity(step, seen)

    def _step(self, index: int) -> Step:
        timestep = self._timesteps[index]
        expert = expert_at(timestep, self._models.variant)
        return Step(
            index=index,
            num_steps=len(self._timesteps),
            timestep=timestep,
            expert=expert,
            guidance_scale=self._request.guidance_scale[expert == "high_noise"],
        )

    def _transformer(self, expert: Expert) -> nn.Module:
        """Return an expert as it samples; it stays so until the other one's turn or the end."""
        transformer = self._models.transformer(expert)
        if transformer is not self._working:
            self._open.close()
            self._open.enter_context(evaluating(transformer))
            if isinstance(transformer, WanTransformer):
                self._open.enter_context(transformer.remembering())
            self._working = transformer
        return transformer

    def _run(
        self, transformer: nn.Module, what: Pass, latents_BCFHW: Tensor, timestep: Tensor
    ) -> Tensor:
        velocity: Tensor = transformer(
            latents_BCFHW,
            timestep,
            [self._contexts[what.text]],
            extra_channels=self._conditions.extra_channels_BCFHW,
            image_context=self._conditions.image_context_BTD,
        )
        return velocity.float()

    def _timestep_tensor(self, latents_BCFHW: Tensor, timestep: float) -> Tensor:
        timestep_B = torch.full(
            (latents_BCFHW.shape[0],), timestep, dtype=torch.float32, device=latents_BCFHW.device
        )
        if self._conditions.first_latents_BC1HW is None:
            return timestep_B
        _, _, *size = latents_BCFHW.shape
        patch_size = self._models.variant.transformer.patch_size
        return first_frame_timestep(timestep_B, (size[0], size[1], size[2]), patch_size)


def expert_at(timestep: float, variant: Variant) -> Expert:
    """Return the expert that works at `timestep`: high noise at the boundary and above."""
    if variant.experts and timestep >= to_timestep(variant.expert_boundary):
        return "high_noise"
    return "low_noise"


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
