"""How often a timestep sampler draws a sigma or a larger one, where that has a closed form.

The formulas are those of the samplers in `trainer/timesteps`; a test compares them with draws. The
options' defaults come from the plug-ins' own declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.plugin_options import plugin_schemas

Options = Mapping[str, Any]


def high_noise_mass(config: RunConfig, boundary: float) -> float | None:
    """Return the share of a run's draws that are at `boundary` or above, in [0, 1].

    The draws are those of `[objective]` over its own range, as a model with one transformer would
    be trained.

    Args:
        config: checked.
        boundary: sigma at which the experts meet.

    Returns:
        None where the sampler has no closed form here, or practically never falls into the range.
    """
    section = config.objective
    known = _ABOVE.get(section.timestep_sampler)
    if known is None:
        return None
    specs = plugin_schemas()["timestep_sampler"][section.timestep_sampler].get("properties", {})
    options = {name: spec.get("default") for name, spec in specs.items()}
    options |= section.options("timestep_sampler")
    low = 0.0 if section.min_timestep is None else section.min_timestep / 1000
    high = 1.0 if section.max_timestep is None else section.max_timestep / 1000
    if low >= high or boundary >= high:
        return 0.0
    if boundary <= low:
        return 1.0
    if not section.preserve_distribution_shape:
        return known(options, (boundary - low) / (high - low))
    below_low, above_high = known(options, low), known(options, high)
    inside = below_low - above_high
    return (known(options, boundary) - above_high) / inside if inside > 1e-9 else None


def _uniform(_options: Options, sigma: float) -> float:
    return 1 - sigma


def _sigmoid(options: Options, sigma: float) -> float:
    return _normal_above(_logit(sigma) / options["sigmoid_scale"])


def _shift(options: Options, sigma: float) -> float:
    return _sigmoid(options, _unshifted(sigma, options["flow_shift"]))


def _logit_normal(options: Options, sigma: float) -> float:
    logit = _logit(_unshifted(sigma, options["flow_shift"]))
    return _normal_above((logit - options["logit_mean"]) / options["logit_std"])


def _unshifted(sigma: float, shift: float) -> float:
    """Undo σ = s·a / (1 + (s - 1)·a)."""
    return sigma / (shift - (shift - 1) * sigma)


def _logit(share: float) -> float:
    if share <= 0:
        return -math.inf
    return math.inf if share >= 1 else math.log(share / (1 - share))


def _normal_above(value: float) -> float:
    """Return P(z ≥ value) of a standard normal z."""
    if math.isinf(value):
        return 0.0 if value > 0 else 1.0
    return NormalDist().cdf(-value)


_ABOVE: dict[str, Callable[[Options, float], float]] = {
    "uniform": _uniform,
    "sigmoid": _sigmoid,
    "shift": _shift,
    "logit_normal": _logit_normal,
}
