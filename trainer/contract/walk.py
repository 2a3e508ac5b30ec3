"""The walk from noise to a clean video, as far as it can be told without torch.

`trainer.sampling.schedule` makes the schedules that solvers work with; here is what the estimate
and the checks need to know of them, and a test keeps the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.contract.catalog import SCHEDULES, SOLVERS
from trainer.contract.errors import Problem
from trainer.contract.registry import nearest

BETA_SHAPE = 0.6
"""Both parameters of the `beta` schedule's distribution ("Beta Sampling is All You Need",
arXiv:2407.12173)."""

DEFAULT_STRENGTH = 0.8
"""Of a prompt that starts from a video and does not say; diffusers' own."""

_OWN_SCHEDULE = {"unipc": "training_grid", "dpm++": "full_range_cut"}
"""Of a solver whose schedule is not `full_range`."""
_FIRST_FRACTION = {"training_grid": 0.999}
_CUT_TO_INTEGERS = {"training_grid", "full_range_cut"}
_FINITE_SNR = {"unipc"}
"""Solvers whose first step needs a log-SNR that is finite: a sigma below 1."""
_TWO_EVALUATIONS = {"heun"}


def own_schedule(solver: str) -> str:
    """Return the schedule that a solver takes where none is asked for."""
    return _OWN_SCHEDULE.get(solver, "full_range")


def steps_walked(num_steps: int, strength: float) -> int:
    """Return how many of a schedule's steps are walked: its last ones, by `strength`.

    It is what diffusers' video-to-video pipelines walk: strength·N, cut to an integer.
    """
    return min(int(num_steps * strength), num_steps)


def planned_timesteps(
    num_steps: int, flow_shift: float, solver: str, *, schedule: str = "", strength: float = 1.0
) -> list[float]:
    """Return the timestep of every evaluation of the transformer, in order.

    Args:
        num_steps: steps of the whole schedule.
        flow_shift: moves the schedule towards noise.
        solver: its name; an unknown one counts as `euler`.
        schedule: its name; empty: the solver's own.
        strength: share of the steps that is walked.
    """
    name = schedule or own_schedule(solver)
    timesteps = []
    for step in range(num_steps - steps_walked(num_steps, strength), num_steps):
        part = _fraction(step / num_steps, name)
        timestep = 1000 * flow_shift * part / (1 + (flow_shift - 1) * part)
        timesteps.append(math.floor(timestep + 1e-5) if name in _CUT_TO_INTEGERS else timestep)
    if solver in _TWO_EVALUATIONS:
        return timesteps[:1] + [timestep for timestep in timesteps[1:] for _ in range(2)]
    return timesteps


def walk_problems(
    solver: str, schedule: str, *, num_steps: int | None = None, strength: float = 1.0
) -> Iterator[Problem]:
    """Yield what is wrong with a solver and a schedule, alone and together.

    Args:
        solver: its name.
        schedule: its name; empty: the solver's own.
        num_steps: of the whole schedule, where it is known.
        strength: share of the steps that is walked.
    """
    for kind, name, known in (
        ("solver", solver, SOLVERS.names),
        ("schedule", schedule, ("", *SCHEDULES.names)),
    ):
        if name not in known:
            hint = nearest(name, filter(None, known))
            yield Problem(f"unknown {kind} {name!r}", kind, hint=hint)
            return
    whole = strength == 1 or (num_steps and steps_walked(num_steps, strength) == num_steps)
    from_noise = (schedule or own_schedule(solver)) not in _FIRST_FRACTION
    if solver in _FINITE_SNR and from_noise and whole:
        yield Problem(
            f"{solver} cannot start at sigma 1, where the schedule {schedule} does: the logarithm "
            "of signal to noise is infinite there",
            "schedule",
            hint="training_grid, or the solver dpm++ or euler",
        )


def beta_quantile(share: float, shape: float) -> float:
    """Return x where the symmetric Beta(shape, shape) distribution has `share` below it.

    Args:
        share: in [0, 1].
        shape: both of the distribution's parameters.
    """
    if share > 0.5:
        return 1 - beta_quantile(1 - share, shape)
    low, high = 0.0, 0.5
    for _ in range(100):  # halving to a float's last bit
        middle = (low + high) / 2
        if _beta_share(middle, shape) < share:
            low = middle
        else:
            high = middle
    return high if share > 0 else 0.0


def _fraction(share: float, schedule: str) -> float:
    """Return the sigma before the shift, after this share of the steps."""
    if schedule == "beta":
        return beta_quantile(1 - share, BETA_SHAPE)
    return _FIRST_FRACTION.get(schedule, 1.0) * (1 - share)


def _beta_share(x: float, shape: float) -> float:
    """Return the regularised incomplete beta function of two equal parameters, for x <= 1/2.

    Its power series about 0 (DLMF 8.17.7): terms fall at least by half, so 60 are enough.
    """
    if x <= 0:
        return 0.0
    total, term = 0.0, 1.0
    for index in range(60):
        total += term / (shape + index)
        term *= (index + 1 - shape) / (index + 1) * x
    whole = math.exp(2 * math.lgamma(shape) - math.lgamma(2 * shape))
    return math.pow(x, shape) * total / whole
