"""The velocity of one video at each step: the passes that guidance asks for, made and combined.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width, T text tokens,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self, overload

import torch
from torch import Tensor, nn

from trainer.contract.errors import ConfigError, Problem
from trainer.contract.variants import Expert, Variant
from trainer.core.flow import to_timestep
from trainer.models.block_stack import BlockStack
from trainer.models.wan.conditioning import LatentEncoder, first_frame_timestep
from trainer.models.wan.transformer import WanTransformer
from trainer.sampling.conditions import Conditions, ImageEncoder
from trainer.sampling.guidance import (
    Pass,
    Passes,
    Step,
    combined_velocity,
    methods_of,
    needs_negative,
    planned_passes,
)
from trainer.sampling.requests import SampleRequest
from trainer.sampling.step_cache.cache import BlockObserver
from trainer.sampling.step_cache.choice import step_cache_of
from trainer.sampling.step_cache.values import StepCacheValues


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
    step_cache: StepCacheValues = field(default_factory=StepCacheValues)
    """What step caches know of the model."""


@dataclass(frozen=True, slots=True)
class Evaluations:
    """How often the latents went through the blocks, and how often a step cache spared it."""

    computed: int
    reused: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Passes that run as one batch."""

    passes: dict[str, Pass]
    skipped_blocks: frozenset[int]
    stands_in: bool


class VelocityPredictor:
    """Predicts the velocities of one video."""

    def __init__(
        self,
        models: SamplingModels,
        request: SampleRequest,
        conditions: Conditions,
        timesteps: list[float],
        observer: BlockObserver | None = None,
    ) -> None:
        """Prepare what is the same in every step.

        Args:
            models: the models; they are left as they were.
            request: what to make.
            conditions: encoded files, on the models' device.
            timesteps: of all steps.
            observer: watches the blocks; None: the request's step cache does, if it has one.

        Raises:
            ConfigError: the step cache knows nothing of this model.
            KeyError: a text of the request was not encoded.
        """
        self._models = models
        self._request = request
        self._conditions = conditions
        self._timesteps = timesteps
        self._methods = methods_of(request.denoising)
        self._batched = request.denoising.cfg_batch
        self._observer = observer or step_cache_of(request, models.variant, models.step_cache)
        self._computed = self._reused = 0
        self._open = ExitStack()
        self._working: nn.Module | None = None
        self._images: dict[int, Tensor | None] = {}
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
        """Return the velocity at step `index`, float32, given latents in float32.

        Raises:
            ConfigError: a block that shall be left out is not there.
        """
        step, request = self._step(index), self._request
        passes = planned_passes(step, request.prompt, request.negative_prompt, self._methods)
        if not passes:
            return torch.zeros_like(latents_BCFHW)
        transformer = self._transformer(step.expert)
        timestep = self._timestep_tensor(latents_BCFHW, step.timestep)
        seen: dict[str, Tensor] = {}
        if self._observer is not None:
            self._observer.begin(step, transformer, self._timesteps_of(step.expert))
        for group in self._groups(step, passes):
            seen |= self._run(transformer, step, group, latents_BCFHW, timestep)
        return combined_velocity(step, seen, self._methods)

    @property
    def evaluations(self) -> Evaluations:
        """How many passes there were so far."""
        return Evaluations(self._computed, self._reused)

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
                alike = not self._batched and any(map(needs_negative, self._request.guidance_scale))
                self._open.enter_context(transformer.remembering(passes_alike=alike))
            self._working = transformer
        return transformer

    def _timesteps_of(self, expert: Expert) -> Tensor:
        variant = self._models.variant
        own = [value for value in self._timesteps if expert_at(value, variant) == expert]
        return torch.tensor(own, dtype=torch.float32, device=self._models.device)

    def _groups(self, step: Step, passes: Passes) -> list[_Group]:
        """Return the passes by what runs as one batch: what goes through the same blocks."""
        groups: dict[object, _Group] = {}
        for name, what in passes.items():
            observer = self._observer
            stands_in = observer is not None and observer.stands_in(step, name, what)
            together = (what.skipped_blocks, stands_in) if self._batched else name
            group = groups.setdefault(together, _Group({}, what.skipped_blocks, stands_in))
            group.passes[name] = what
        return list(groups.values())

    def _run(
        self,
        transformer: nn.Module,
        step: Step,
        group: _Group,
        latents_BCFHW: Tensor,
        timestep: Tensor,
    ) -> dict[str, Tensor]:
        num = len(group.passes)
        if group.stands_in:
            self._reused += num
        else:
            self._computed += num
        if num not in self._images:  # the same object in every step is embedded once
            self._images[num] = _times(self._conditions.image_context_BTD, num)
        positions = self._conditions.frame_positions
        placed = {} if positions is None else {"frame_positions": positions}
        with self._blocks_of(transformer, step, group):
            velocity: Tensor = transformer(
                _times(latents_BCFHW, num),
                _times(timestep, num),
                [self._contexts[what.text] for what in group.passes.values()],
                extra_channels=_times(self._conditions.extra_channels_BCFHW, num),
                image_context=self._images[num],
                **placed,
            )
        return dict(zip(group.passes, velocity.float().chunk(num), strict=True))

    @contextmanager
    def _blocks_of(self, transformer: nn.Module, step: Step, group: _Group) -> Iterator[None]:
        """Make the blocks do what a group asks for."""
        with ExitStack() as stack:
            if group.skipped_blocks or self._observer is not None:
                blocks = block_stack(transformer)
                try:
                    stack.enter_context(blocks.leaving_out(group.skipped_blocks))
                except IndexError as error:
                    raise _no_such_block(len(blocks)) from error
            if self._observer is not None:
                around = self._observer.around(step, group.passes, group.stands_in)
                stack.enter_context(blocks.surrounded(around))
            yield

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


def block_stack(transformer: nn.Module) -> BlockStack:
    """Return the blocks of a transformer."""
    return next(part for part in transformer.modules() if isinstance(part, BlockStack))


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


@overload
def _times(tensor: Tensor, num: int) -> Tensor: ...
@overload
def _times(tensor: Tensor | None, num: int) -> Tensor | None: ...
def _times(tensor: Tensor | None, num: int) -> Tensor | None:
    """Return the batch `num` times over."""
    if tensor is None or num == 1:
        return tensor
    return tensor.repeat(num, *(1 for _ in tensor.shape[1:]))


def _no_such_block(num: int) -> ConfigError:
    problem = Problem(
        f"slg_layers names a block that is not there: the model has {num}",
        key="slg_layers",
        hint=f"blocks are numbered 0 to {num - 1}",
    )
    return ConfigError(problems=[problem])
