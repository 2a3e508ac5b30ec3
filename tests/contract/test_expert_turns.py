"""Whose turn a step is: against counting, and the shares against draws of the samplers."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.catalog import TIMESTEP_SAMPLERS
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.expert_turns import Turns
from trainer.contract.timestep_mass import high_noise_mass
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.jobs.build import build_plugin
from trainer.jobs.expert_share import settle_turns

T2V = VARIANTS["wan2.2-t2v-a14b"]
BUILD = BuildContext(variant=T2V, seed=1, device=torch.device("cpu"), total_steps=1000)


def in_order(turns: Turns, steps: int) -> str:
    return "".join(turns.expert_at(step)[0] for step in range(1, steps + 1))


def test_half_and_half() -> None:
    assert in_order(Turns(steps_per_turn=3, high_noise_share=0.5), 14) == "hhhlllhhhlllhh"


def test_the_larger_share_has_several_turns_in_a_row() -> None:
    order = in_order(Turns(steps_per_turn=2, high_noise_share=0.25), 24)
    assert order == "llhhllll" * 3


@given(
    share=st.floats(0.001, 0.999),
    group=st.integers(1, 50),
    steps=st.integers(1, 2000),
)
def test_counts_and_shares(share: float, group: int, steps: int) -> None:
    turns = Turns(steps_per_turn=group, high_noise_share=share)
    order = in_order(turns, steps)
    high = order.count("h")
    assert turns.steps_of("high_noise", steps) == high
    assert turns.steps_of("low_noise", steps) == steps - high
    # Met to half a turn at the end of each, and to a whole one within.
    assert abs(high - share * steps) <= group
    whole = steps // group * group
    assert abs(order[:whole].count("h") - share * whole) <= group / 2 + 1e-6 * group
    runs = [(name, len(list(members))) for name, members in groupby(order)]
    assert turns.changes(steps) == len(runs) - 1
    assert all(length % group == 0 for _, length in runs[:-1]), "no turn is cut short"
    smaller = "h" if share < 0.5 else "l"
    assert all(length == group for name, length in runs[:-1] if name == smaller)


@pytest.mark.parametrize(
    ("shift", "boundary", "percent"),
    [(3, 0.875, 19.8), (5, 0.875, 36.8), (7, 0.875, 50.0), (12, 0.875, 70.5),
     (3, 0.9, 13.6), (5, 0.9, 27.8), (7, 0.9, 40.1), (12, 0.9, 61.3)],
)  # fmt: skip
def test_known_shares_of_the_shift_sampler(shift: float, boundary: float, percent: float) -> None:
    config = RunConfig.model_validate({"objective": {"flow_shift": shift}})
    assert high_noise_mass(config, boundary) == pytest.approx(percent / 100, abs=0.0006)


OBJECTIVES: tuple[dict[str, Any], ...] = (
    {},
    {"timestep_sampler": "shift", "flow_shift": 5.0, "sigmoid_scale": 0.7},
    {"timestep_sampler": "uniform"},
    {"timestep_sampler": "sigmoid", "sigmoid_scale": 2.0},
    {"timestep_sampler": "logit_normal", "logit_mean": 0.8, "logit_std": 1.3, "flow_shift": 2.0},
    {"timestep_sampler": "flux_shift"},
    {"timestep_sampler": "qinglong_qwen", "noisy_share": 0.2},
    {"timestep_sampler": "mode"},
    {"timestep_sampler": "half_bell"},
    {"timestep_sampler": "content"},
)
RANGES: tuple[dict[str, Any], ...] = (
    {},
    {"min_timestep": 300, "max_timestep": 950},
    {"min_timestep": 300, "max_timestep": 950, "preserve_distribution_shape": True},
    {"max_timestep": 980, "preserve_distribution_shape": True},
)


@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_formulas_give_what_the_samplers_draw(
    objective: dict[str, Any], bounds: dict[str, Any]
) -> None:
    config = RunConfig.model_validate({"objective": objective | bounds})
    sampler = build_plugin(config.objective, "timestep_sampler", BUILD, where="objective")
    frame_tokens = (T2V.width // 16) * (T2V.height // 16)
    draws = sampler.sample(10_000, torch.Generator().manual_seed(0), frame_tokens).double()
    low, high = (bounds.get("min_timestep", 0) / 1000, bounds.get("max_timestep", 1000) / 1000)
    if "preserve_distribution_shape" in bounds:
        draws = draws[(draws >= low) & (draws <= high)]
    else:
        draws = low + (high - low) * draws
    mass = high_noise_mass(config, 0.875, T2V)
    # Four standard deviations of a count.
    assert mass == pytest.approx((draws >= 0.875).double().mean().item(), abs=0.02)


def test_a_sampler_by_size_counts_the_sources_alike(tmp_path: Path) -> None:
    def mass(*sizes: tuple[int, int]) -> float:
        sources = [{"image_directory": str(tmp_path), "resolution": size} for size in sizes]
        values = {"dataset": {"sources": sources}, "objective": {"timestep_sampler": "flux_shift"}}
        found = high_noise_mass(RunConfig.model_validate(values), 0.875, T2V)
        assert found is not None
        return found

    # Tokens 60·45 = 2700: μ = 0.5 + 0.65·2444 / 3840 = 0.91370. P = Φ(μ - ln 7) by tables.
    assert mass((960, 720)) == pytest.approx(0.15092, abs=2e-4)
    small, large = mass((256, 256)), mass((960, 720))
    assert small < large
    assert mass((256, 256), (960, 720)) == pytest.approx((small + large) / 2)


def test_a_sampler_by_size_is_unknown_without_sizes() -> None:
    config = RunConfig.model_validate({"objective": {"timestep_sampler": "flux_shift"}})
    assert high_noise_mass(config, 0.875) is None
    missing = RunConfig.model_validate(
        {"dataset": {"file": "nowhere.toml"}, "objective": {"timestep_sampler": "flux_shift"}}
    )
    assert high_noise_mass(missing, 0.875, T2V) is None


def test_nothing_beyond_the_boundary() -> None:
    above = RunConfig.model_validate({"objective": {"min_timestep": 900}})
    below = RunConfig.model_validate({"objective": {"max_timestep": 800}})
    assert (high_noise_mass(above, 0.875), high_noise_mass(below, 0.875)) == (1.0, 0.0)


def test_every_sampler_is_told_by_a_formula() -> None:
    for name in TIMESTEP_SAMPLERS.names:
        config = RunConfig.model_validate({"objective": {"timestep_sampler": name}})
        assert 0 < settle_turns(config, BUILD).high_noise_share < 1


def test_few_steps_starve_an_expert() -> None:
    config = RunConfig.model_validate({"experts": {"steps_per_turn": 100, "high_noise_share": 0.1}})
    with pytest.raises(ConfigError, match="high_noise expert gets none of the 400 steps") as found:
        settle_turns(
            config, BuildContext(variant=T2V, seed=1, device=torch.device("cpu"), total_steps=400)
        )
    (problem,) = found.value.problems
    assert problem.key == "experts.steps_per_turn"
