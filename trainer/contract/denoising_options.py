"""Options of guidance and of step caches; each prompt may differ from `[sampling]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.contract.options import Options

CFGSkipMode = Literal["none", "early", "late", "middle", "early_late", "alternate"]
SLGMode = Literal["none", "original", "uncond"]
Layers = tuple[Annotated[int, Field(ge=0)], ...]


class DenoisingOptions(Options):
    """How the velocity of a step is found; complete."""

    cfg_skip_mode: CFGSkipMode = "none"
    """Steps without guidance, for speed: at the start, the end, in the middle, or by turns."""
    cfg_apply_ratio: float = Field(0.7, ge=0, le=1)
    """With `cfg_skip_mode`: share of the steps that have guidance."""
    cfg_zero_star: bool = False
    """CFG-Zero*: guidance from the negative prediction in its best scale."""
    cfg_zero_init_steps: int = Field(1, ge=0)
    """With `cfg_zero_star`: first steps at which nothing moves."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """How far guidance's gain in contrast is taken back; 0: not, 1: all of it."""
    slg_mode: SLGMode = "none"
    """Skip-layer guidance: by a pass of its own (`original`), or in the negative one (`uncond`)."""
    slg_layers: Layers = ()
    """With `slg_mode`: blocks to leave out, counted from 0."""
    slg_scale: float = 3.0
    """With `slg_mode = "original"`: its strength."""
    slg_start: float = Field(0.0, ge=0, le=1)
    """With `slg_mode`: share of the steps before it begins."""
    slg_end: float = Field(0.3, ge=0, le=1)
    """With `slg_mode`: share of the steps after which it ends."""
    cfg_batch: bool = False
    """Compute prompt and negative prompt as one batch: twice the activations."""
    step_cache: str = "none"
    """Reuse what the blocks did at the last step where little changes: `teacache`, `magcache`."""
    step_cache_threshold: float | None = Field(None, ge=0)
    """Estimated error at which a step is computed anew; empty: the method's own."""
    step_cache_start: float | None = Field(None, ge=0, le=1)
    """Share of each expert's first steps that are always computed; empty: the method's own."""
    step_cache_max_skips: int | None = Field(None, ge=1)
    """Steps in a row that may be reused; empty: the method's own."""
    step_cache_retention: bool = False
    """TeaCache: compare what the blocks are given of the timestep; closer, and slower."""


class SectionDenoising(DenoisingOptions):
    """What `[sampling]` has of it."""

    step_cache_file: Path | None = None
    """What `menma sample --calibrate` measured of this model; empty: where it is found itself."""


class PromptDenoising(Options):
    """The same for one prompt; empty fields take `[sampling]`'s values."""

    cfg_skip_mode: CFGSkipMode | None = None
    """Steps without guidance."""
    cfg_apply_ratio: float | None = Field(None, ge=0, le=1)
    """Share of the steps that have guidance."""
    cfg_zero_star: bool | None = None
    """CFG-Zero*."""
    cfg_zero_init_steps: int | None = Field(None, ge=0)
    """First steps at which nothing moves."""
    guidance_rescale: float | None = Field(None, ge=0, le=1)
    """How far guidance's gain in contrast is taken back."""
    slg_mode: SLGMode | None = None
    """Skip-layer guidance."""
    slg_layers: Layers | None = None
    """Blocks to leave out."""
    slg_scale: float | None = None
    """Strength of skip-layer guidance."""
    slg_start: float | None = Field(None, ge=0, le=1)
    """Share of the steps before it begins."""
    slg_end: float | None = Field(None, ge=0, le=1)
    """Share of the steps after which it ends."""
    cfg_batch: bool | None = None
    """Compute prompt and negative prompt as one batch."""
    step_cache: str | None = None
    """Step cache."""
    step_cache_threshold: float | None = Field(None, ge=0)
    """Estimated error at which a step is computed anew."""
    step_cache_start: float | None = Field(None, ge=0, le=1)
    """Share of each expert's first steps that are always computed."""
    step_cache_max_skips: int | None = Field(None, ge=1)
    """Steps in a row that may be reused."""
    step_cache_retention: bool | None = None
    """TeaCache: compare what the blocks are given of the timestep."""


def denoising_of(defaults: DenoisingOptions, prompt: PromptDenoising) -> DenoisingOptions:
    """Return the options of a prompt, complete: its own, else the defaults."""
    names = DenoisingOptions.model_fields
    found = {name: getattr(defaults, name) for name in names}
    own = {name: value for name in names if (value := getattr(prompt, name)) is not None}
    return DenoisingOptions.model_validate(found | own)
