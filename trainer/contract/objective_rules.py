"""What goes with what in `[objective]`."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.catalog import TIMESTEP_SAMPLERS
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, Problem
from trainer.contract.experts import boundary_of, expert_timesteps, for_expert, trained_experts
from trainer.contract.plugin_options import all_options
from trainer.contract.sigma_distributions import TruncatedSigma
from trainer.contract.timestep_mass import (
    LEAST_MASS,
    base_distribution,
    depends_on_size,
    sampler_options,
    source_frame_tokens,
)
from trainer.contract.variants import VARIANTS

_CHOOSES, _SHAPE_NOISE = "immiscible_noise", frozenset({"noise_offset", "pyramid_noise"})


def noise_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield where noises are chosen and there is no choice, or one that another has changed."""
    names = [section.name for section in config.techniques]
    if _CHOOSES not in names:
        return
    place = names.index(_CHOOSES)
    options = config.techniques[place].options("name")
    nearest = options.get("assignment", "nearest") == "nearest"
    if nearest and options.get("num_candidates") == 1:
        yield Problem(
            "one noise leaves each sample nothing to choose from",
            f"techniques[{place}].num_candidates",
            hint='make it 2 or more, or set assignment = "batch"',
        )
    for before in names[:place]:
        if before in _SHAPE_NOISE:
            yield Problem(
                f"{_CHOOSES} chooses among plain noises, and {before} before it has changed one",
                f"techniques[{place}]",
                hint=f"put {_CHOOSES} in front of {before}",
            )


def objective_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what cannot be drawn, and options that would change nothing."""
    if config.objective.timestep_sampler not in TIMESTEP_SAMPLERS:
        return  # told with its name
    options = sampler_options(config)
    mixed = options.get("noisy_share", 0.0) + options.get("clean_share", 0.0)
    if mixed > 1:
        yield Problem(
            f"noisy_share and clean_share add up to {mixed:g}, more than all draws",
            "objective.noisy_share",
            hint="lower one of them: what they leave is drawn by the frame's size",
        )
        return
    loss = config.objective.options("loss")
    # In a config that was read, options that are left out have their defaults.
    usual = all_options("loss", config.objective.loss, {}).get("huber_delta_noise")
    constant = loss.get("huber_schedule", "constant") == "constant"
    if constant and loss.get("huber_delta_noise", usual) != usual:
        yield Problem(
            "the delta is the same at every sigma, so nothing goes by this one",
            "objective.huber_delta_noise",
            hint='leave it out, or set huber_schedule = "linear", "exponential" or "snr"',
        )
    if config.objective.preserve_distribution_shape:
        yield from _never_met(config)


def _never_met(config: RunConfig) -> Iterator[Problem]:
    """Yield ranges that the sampler's own draws practically never fall into."""
    variant = VARIANTS.get(config.model.variant)
    try:
        sizes = source_frame_tokens(config, variant) if depends_on_size(config) else (0,)
    except ConfigError:
        return  # told with the dataset, or once the weights tell the variant
    for who, own, low, high in _ranges(config):
        if low >= high:
            continue  # told by the rules of ranges
        least = min(
            TruncatedSigma(base_distribution(own, size), low / 1000, high / 1000).inside
            for size in sizes
        )
        if least < LEAST_MASS:
            yield Problem(
                f"{who}timestep_sampler {own.objective.timestep_sampler!r} practically never draws "
                f"from {low:g} to {high:g}",
                "objective.preserve_distribution_shape",
                hint="widen the range, change the sampler or its shift, or set "
                "preserve_distribution_shape = false",
            )


def _ranges(config: RunConfig) -> Iterator[tuple[str, RunConfig, float, float]]:
    """Yield each trained range of timesteps: whose, its config, its ends."""
    experts = trained_experts(config)
    if not experts:
        low, high = config.objective.min_timestep, config.objective.max_timestep
        yield "", config, 0.0 if low is None else low, 1000.0 if high is None else high
        return
    boundary = boundary_of(config)
    for expert in experts:
        low, high = expert_timesteps(config, expert, boundary)
        yield f"{expert}: ", for_expert(config, expert, boundary), low, high
