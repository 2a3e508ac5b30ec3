"""What share of the steps each expert of a run gets, settled before it starts."""

from __future__ import annotations

import torch

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.expert_rules import idle_expert, starving_expert
from trainer.contract.expert_turns import Turns
from trainer.contract.experts import known_turns
from trainer.core.flow import NUM_TRAIN_TIMESTEPS
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, TimestepSampler
from trainer.jobs.build import build_plugin

_DRAWS = 1 << 20
"""The error of a share of one half is 0.05 % then (one standard deviation)."""


def settle_turns(config: RunConfig, build: BuildContext) -> Turns:
    """Return the turns of a run that trains both experts; the same for the same config.

    A share that is `auto` comes from the formula of the timestep sampler, and from many draws of
    it, always the same ones, where it has none.

    Args:
        config: of the run.
        build: for the sampler; its variant has the boundary. Total steps of 0: not known yet.

    Raises:
        ConfigError: an expert would get no steps.
    """
    boundary = build.variant.expert_boundary
    turns = known_turns(config, boundary)
    if turns is None:
        sampler = build_plugin(config.objective, "timestep_sampler", build, where="objective")
        share = drawn_share(config, sampler, boundary)
        if not 0 < share < 1:
            raise ConfigError(problems=[idle_expert(config, share)])
        turns = Turns(steps_per_turn=config.experts.steps_per_turn, high_noise_share=share)
    problem = starving_expert(config, turns, build.total_steps) if build.total_steps else None
    if problem is not None:
        raise ConfigError(problems=[problem])
    return turns


def drawn_share(config: RunConfig, sampler: TimestepSampler, boundary: float) -> float:
    """Return the share of a sampler's draws that are at `boundary` or above, in [0, 1].

    They are brought into `[objective]`'s range as in training (`training.step.SigmaRange`).
    """
    objective = config.objective
    low = (objective.min_timestep or 0.0) / NUM_TRAIN_TIMESTEPS
    high = objective.max_timestep
    high = 1.0 if high is None else high / NUM_TRAIN_TIMESTEPS
    draws = sampler.sample(_DRAWS, generator(0, "experts", "share")).double()
    if objective.preserve_distribution_shape:
        draws = draws[(draws >= low) & (draws <= high)]
    else:
        draws = low + (high - low) * draws
    return float(torch.mean((draws >= boundary).double())) if draws.numel() else 0.0
