"""What share of the steps each expert of a run gets, settled before it starts."""

from __future__ import annotations

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.expert_rules import idle_expert, starving_expert
from trainer.contract.expert_turns import Turns
from trainer.contract.experts import known_turns
from trainer.contract.timestep_mass import high_noise_mass
from trainer.core.seams import BuildContext


def settle_turns(config: RunConfig, build: BuildContext) -> Turns:
    """Return the turns of a run that trains both experts; the same for the same config.

    Args:
        config: of the run.
        build: its variant has the boundary. Total steps of 0: not known yet.

    Raises:
        ConfigError: an expert would get no steps, or the dataset cannot be read.
    """
    boundary = build.variant.expert_boundary
    turns = known_turns(config, boundary, build.variant)
    if turns is None:
        mass = high_noise_mass(config, boundary, build.variant)
        raise ConfigError(problems=[idle_expert(config, 0.0 if mass is None else mass)])
    problem = starving_expert(config, turns, build.total_steps) if build.total_steps else None
    if problem is not None:
        raise ConfigError(problems=[problem])
    return turns
