"""What goes with what where a model has two experts."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.contract.config import RunConfig
from trainer.contract.errors import Problem
from trainer.contract.expert_config import ExpertSection, ExpertsSection
from trainer.contract.expert_turns import EXPERTS, Turns
from trainer.contract.experts import (
    boundary_of,
    expert_timesteps,
    known_turns,
    section_of,
    trained_experts,
    trains_both,
)
from trainer.contract.plugin_options import option_names
from trainer.contract.timestep_mass import high_noise_mass
from trainer.contract.variants import VARIANTS, Expert

_MODELS = 'set model.variant = "wan2.2-t2v-a14b" or "wan2.2-i2v-a14b"'


def experts_rule(config: RunConfig) -> Iterator[Problem]:
    """Yield what cannot be with two experts, or has no meaning without them."""
    name = config.model.variant
    if name != "auto" and name not in VARIANTS:
        return  # told with the variant
    if name == "auto" or not VARIANTS[name].experts:
        yield from _without_experts(config)
        return
    if config.model.expert is None:
        yield Problem(
            f"{name} has two experts, and nothing says which of them is trained",
            "model.expert",
            hint='set expert = "both" (an adapter for each), "high_noise" or "low_noise" (one '
            'alone), or "shared" (one adapter for both)',
        )
        return
    yield from _ranges(config)
    yield from _flow_shifts(config)
    if trains_both(config):
        yield from _both(config)


def starving_expert(config: RunConfig, turns: Turns, steps: int) -> Problem | None:
    """Return what is wrong where one of the experts gets none of a run's steps."""
    for expert in EXPERTS:
        if not turns.steps_of(expert, steps):
            return Problem(
                f"the {expert} expert gets none of the {steps} steps: its share is "
                f"{turns.share_of(expert):.1%}, and a turn has {turns.steps_per_turn} steps",
                "experts.steps_per_turn",
                hint="set fewer steps_per_turn, another experts.high_noise_share, or more "
                "training.max_steps",
            )
    return None


def idle_expert(config: RunConfig, mass: float) -> Problem:
    """Return what is wrong where the sampler draws (next to) nothing on one side."""
    side = "high_noise" if mass <= 0 else "low_noise"
    return Problem(
        f"timestep_sampler {config.objective.timestep_sampler!r} draws nothing for the {side} "
        "expert",
        "experts.high_noise_share",
        hint="set a number, or change the sampler, its flow_shift or the range of timesteps",
    )


def _without_experts(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    given = {
        "model.expert": model.expert is not None,
        "model.expert_boundary": model.expert_boundary is not None,
        "experts": config.experts != ExpertsSection(),
        "high_noise": config.high_noise != ExpertSection(),
        "low_noise": config.low_noise != ExpertSection(),
    }
    for key, is_given in given.items():
        if is_given:
            yield Problem(
                f"only Wan 2.2 A14B has experts, variant is {model.variant!r}",
                key,
                hint=f"leave it out, or {_MODELS}",
            )


def _ranges(config: RunConfig) -> Iterator[Problem]:
    boundary = boundary_of(config)
    for expert in trained_experts(config):
        low, high = expert_timesteps(config, expert, boundary)
        if low < high:
            continue
        side = (1000 * boundary, 1000) if expert == "high_noise" else (0, 1000 * boundary)
        hint = (
            f"min_timestep must be smaller than max_timestep; the {expert} expert works from "
            f"{side[0]:g} to {side[1]:g}"
        )
        if trains_both(config):
            hint += ", or train the other one alone"
        message = f"the range of trained timesteps is empty: {low:g} to {high:g}"
        if trains_both(config):
            message = f"{expert}: {message}"
        yield Problem(message, _range_key(config, expert), hint=hint)


def _range_key(config: RunConfig, expert: Expert) -> str:
    """Return the key that makes an expert's range empty."""
    own = section_of(config, expert)
    for section, values in ((expert, own), ("objective", config.objective)):
        if values.min_timestep is not None:
            return f"{section}.min_timestep"
        if values.max_timestep is not None:
            return f"{section}.max_timestep"
    return "model.expert_boundary"


def _flow_shifts(config: RunConfig) -> Iterator[Problem]:
    sampler = config.objective.timestep_sampler
    if "flow_shift" in option_names("timestep_sampler", sampler):
        return
    for expert in EXPERTS:
        if section_of(config, expert).flow_shift is not None:
            yield Problem(
                f"timestep_sampler {sampler!r} has no flow shift",
                f"{expert}.flow_shift",
                hint='leave it out, or set objective.timestep_sampler = "shift"',
            )


def _both(config: RunConfig) -> Iterator[Problem]:
    expert = config.model.expert
    if config.adapter.kind == "none":
        yield Problem(
            "the idle expert waits in RAM as it was read, so its own weights cannot be trained",
            "model.expert",
            hint='fine-tune one expert after the other: "high_noise", then "low_noise"; or set '
            'adapter.kind = "lora"',
        )
    if config.distributed.zero_stage == 3:
        yield Problem(
            f'ZeRO-3 shards the frozen weights over the GPUs, and with model.expert = "{expert}" '
            "an expert's weights wait in RAM",
            "distributed.zero_stage",
            hint="set zero_stage = 0, 1 or 2 (memory.blocks_to_swap saves memory, too), or train "
            "one expert alone",
        )
    boundary = boundary_of(config)
    if config.experts.high_noise_share == "auto":
        mass = high_noise_mass(config, boundary)
        if mass is not None and not 0 < mass < 1:
            if not list(_ranges(config)):
                yield idle_expert(config, mass)
            return
    turns = known_turns(config, boundary)
    if turns is not None and config.training.epochs is None:
        problem = starving_expert(config, turns, config.training.max_steps)
        if problem is not None:
            yield problem
