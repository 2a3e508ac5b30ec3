"""What options of guidance and of step caches cannot be together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trainer.contract.catalog import STEP_CACHES
from trainer.contract.config import RunConfig
from trainer.contract.denoising_options import DenoisingOptions, denoising_of
from trainer.contract.errors import Problem
from trainer.contract.registry import nearest
from trainer.contract.variants import VARIANTS


def denoising_rule(config: RunConfig) -> Iterator[Problem]:
    """Judge `[sampling]`, and its prompts by what is wrong with them alone."""
    sampling, known = config.sampling, VARIANTS.get(config.model.variant)
    num_layers = None if known is None else known.transformer.num_layers
    found = list(denoising_problems(sampling, num_layers))
    yield from (replace(problem, key=f"sampling.{problem.key}") for problem in found)
    for index, prompt in enumerate(sampling.prompts):
        for problem in denoising_problems(denoising_of(sampling, prompt), num_layers):
            if problem not in found:
                yield replace(problem, key=f"sampling.prompts[{index}].{problem.key}")


def denoising_problems(
    options: DenoisingOptions, num_layers: int | None = None, *, guided: bool = True
) -> Iterator[Problem]:
    """Yield what is wrong.

    Args:
        options: complete.
        num_layers: blocks of the model; None: not known.
        guided: a guidance scale differs from 1.
    """
    if options.slg_mode != "none":
        yield from _skip_layer_problems(options, num_layers, guided=guided)
    elif options.slg_layers:
        yield Problem(
            "slg_layers is set, but skip-layer guidance is off",
            key="slg_layers",
            hint='set slg_mode to "original" or "uncond"',
        )
    yield from _step_cache_problems(options)


def _skip_layer_problems(
    options: DenoisingOptions, num_layers: int | None, *, guided: bool
) -> Iterator[Problem]:
    if not options.slg_layers:
        yield Problem(
            "skip-layer guidance has no layers to skip",
            key="slg_layers",
            hint="name blocks of the middle, e.g. [9]",
        )
    for layer in options.slg_layers:
        if num_layers is not None and layer >= num_layers:
            yield Problem(
                f"there is no block {layer}: the model has {num_layers}",
                key="slg_layers",
                hint=f"blocks are numbered 0 to {num_layers - 1}",
            )
    if options.slg_start >= options.slg_end:
        yield Problem(
            f"skip-layer guidance ends at {options.slg_end:g} of the steps, before it begins",
            key="slg_end",
            hint=f"set it above slg_start, {options.slg_start:g}",
        )
    if options.slg_mode == "uncond" and not guided:
        yield Problem(
            "slg_mode uncond works in the negative pass, and guidance_scale 1 makes none",
            key="slg_mode",
            hint='raise guidance_scale, or use "original"',
        )


def _step_cache_problems(options: DenoisingOptions) -> Iterator[Problem]:
    name = options.step_cache
    if name != "none" and name not in STEP_CACHES:
        hint = nearest(name, ["none", *STEP_CACHES.names])
        yield Problem(f"unknown step cache {name!r}", key="step_cache", hint=hint)
    if options.step_cache_retention and name != "teacache":
        yield Problem(
            "step_cache_retention is a form of teacache",
            key="step_cache_retention",
            hint="leave it out; step_cache_start says which first steps are always computed",
        )
