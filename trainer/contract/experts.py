"""Runs of models with two experts, told as runs of one: whose config is what.

A run that trains both is two runs of one expert each that take turns. So everything that is built
for an expert is built from a config that `for_expert` returns, and only who brings the two together
knows of both.
"""

from __future__ import annotations

from trainer.contract.config import RunConfig
from trainer.contract.expert_config import ExpertSection, ExpertsSection
from trainer.contract.expert_turns import EXPERTS, Turns
from trainer.contract.timestep_mass import high_noise_mass
from trainer.contract.variants import VARIANTS, Expert, Variant

SHARED = "shared"
"""In metadata: the file is for both experts."""


def trains_both(config: RunConfig) -> bool:
    """Tell whether both experts work in this run, with an adapter each or a shared one."""
    return config.model.expert in {"both", SHARED}


def trained_experts(config: RunConfig) -> tuple[Expert, ...]:
    """Return the experts that work in a run; () for a model without experts."""
    expert = config.model.expert
    if expert is None:
        return ()
    return EXPERTS if expert in {"both", SHARED} else (expert,)  # type: ignore[return-value]  # one of the two


def single_expert(config: RunConfig) -> Expert | None:
    """Return the one expert that a run trains; None: both, or the model has none."""
    found = trained_experts(config)
    return found[0] if len(found) == 1 else None


def output_names(config: RunConfig) -> dict[Expert | None, str]:
    """Return the name of the final output file, without suffix, by the transformer it is for.

    The key is None for a model with one transformer.
    """
    each = config.model.expert == "both"
    return {
        expert: f"{config.name}_{expert}" if each else config.name
        for expert in trained_experts(config) or (None,)
    }


def boundary_of(config: RunConfig, variant: Variant | None = None) -> float:
    """Return the sigma at which the experts meet; 0 for a model without experts.

    Args:
        config: its own value counts first.
        variant: the model; None: the one that the config names, if it names one.
    """
    known = variant or VARIANTS.get(config.model.variant)
    if known is None or not known.experts:
        return 0.0
    own = config.model.expert_boundary
    return known.expert_boundary if own is None else own


def expert_timesteps(config: RunConfig, expert: Expert, boundary: float) -> tuple[float, float]:
    """Return the range of timesteps, in [0, 1000], that a run trains `expert` at.

    Its own section counts first. Else, where both are trained, it is the part of `[objective]`'s
    range on its side of the boundary; where one is trained alone, `[objective]`'s range, and its
    side of the boundary where that says nothing.
    """
    own, objective = section_of(config, expert), config.objective
    side = (1000 * boundary, 1000.0) if expert == "high_noise" else (0.0, 1000 * boundary)
    low, high = objective.min_timestep, objective.max_timestep
    if trains_both(config):
        low = side[0] if low is None else max(low, side[0])
        high = side[1] if high is None else min(high, side[1])
    low = side[0] if low is None else low
    high = side[1] if high is None else high
    return (
        low if own.min_timestep is None else own.min_timestep,
        high if own.max_timestep is None else own.max_timestep,
    )


def section_of(config: RunConfig, expert: Expert) -> ExpertSection:
    """Return what the config says of one expert."""
    return config.high_noise if expert == "high_noise" else config.low_noise


def for_expert(config: RunConfig, expert: Expert, boundary: float) -> RunConfig:
    """Return the config of a run that trains `expert` alone as this one trains it.

    Its range, flow shift and learning rate stand in `[objective]` and `[optimizer]`.
    """
    own = section_of(config, expert)
    low, high = expert_timesteps(config, expert, boundary)
    objective = {"min_timestep": low, "max_timestep": high}
    if own.flow_shift is not None:
        objective["flow_shift"] = own.flow_shift
    rate = {} if own.learning_rate is None else {"learning_rate": own.learning_rate}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"expert": expert}),
            "objective": config.objective.model_copy(update=objective),
            "optimizer": config.optimizer.model_copy(update=rate),
            "experts": ExpertsSection(),
            "high_noise": ExpertSection(),
            "low_noise": ExpertSection(),
        }
    )


def known_turns(config: RunConfig, boundary: float, variant: Variant | None = None) -> Turns | None:
    """Return the turns of a run with both experts as far as the config tells them.

    None where the share is `auto` and the sampler gives one expert nothing, or goes by frames of
    unknown size. `variant` is as in `boundary_of`.
    """
    share = config.experts.high_noise_share
    mass = high_noise_mass(config, boundary, variant) if share == "auto" else share
    if mass is None or not 0 < mass < 1:
        return None
    return Turns(steps_per_turn=config.experts.steps_per_turn, high_noise_share=mass)
