"""The sigmas a video is sampled at.

A solver walks from sigmas[0] (noise) to sigmas[-1] = 0 (clean). Where the walk starts and how the
number given to the transformer is rounded differ between the released samplers, and both show in
the result; so each solver names its schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import torch
from torch import Tensor

from trainer.contract.catalog import SCHEDULES, SOLVERS
from trainer.contract.errors import ConfigError
from trainer.contract.walk import BETA_SHAPE, beta_quantile, steps_walked
from trainer.core.flow import apply_flow_shift, to_timestep

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.sampling.requests import SampleRequest

_FIRST_SIGMA_OF_TRAINING_GRID = 0.999
# The repositories store 0.999 as float32, a hair above; so 665.9999… of float64 is 666 there.
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Schedule:
    """`sigmas` (N + 1,) float64, falling, the last is 0; `timesteps` (N,) float64.

    `timesteps[i]` is what the transformer is given at `sigmas[i]`.
    """

    sigmas: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        """Evaluations of the velocity."""
        return len(self.timesteps)


class Solver(Protocol):
    """Integrates dx/dsigma = velocity along a schedule, step by step, in float32."""

    evaluations: ClassVar[int]
    """Of the velocity for each step but the last one, which takes one."""

    def __init__(self, sigmas: Tensor, generator: torch.Generator | None = None) -> None:
        """Prepare for one video.

        Args:
            sigmas: of each evaluation, then 0.
            generator: draws the noise of solvers that add some.
        """
        ...

    @staticmethod
    def schedule(num_steps: int, flow_shift: float) -> Schedule:
        """Return the schedule that belongs to this solver."""
        ...

    def step(self, index: int, noisy_BCFHW: Tensor, velocity_BCFHW: Tensor) -> Tensor:
        """Return the latents at sigmas[index + 1], given latents and velocity at sigmas[index].

        Steps are taken in order, from index 0; an object serves one video.
        """
        ...


def walk_of(request: SampleRequest) -> Schedule:
    """Return where the transformer is evaluated for this request, in order.

    A request that starts from a video walks the last steps only; a solver that evaluates twice a
    step has each sigma but the first and the last one twice.

    Raises:
        ConfigError: unknown solver or schedule, or no step.
    """
    solver: type[Solver] = SOLVERS.load(request.solver)
    make: Callable[[int, float], Schedule] = solver.schedule
    if request.schedule:
        # Registries are typed for classes; these entries are functions.
        make = cast("Callable[[int, float], Schedule]", SCHEDULES.load(request.schedule))
    whole = make(request.num_steps, request.flow_shift)
    strength = 1.0 if request.strength is None else request.strength
    walked = steps_walked(request.num_steps, strength)
    first = whole.num_steps - walked
    sigmas, timesteps = whole.sigmas[first:], whole.timesteps[first:]
    counts = torch.full((walked,), solver.evaluations)
    counts[:1] = 1
    return Schedule(
        sigmas=torch.cat([sigmas[:-1].repeat_interleave(counts), sigmas[-1:]]),
        timesteps=timesteps.repeat_interleave(counts),
    )


def training_grid_schedule(num_steps: int, flow_shift: float) -> Schedule:
    """Return the schedule of the Wan repositories: u_i = 0.999·(1 - i/N), shifted.

    It starts just below sigma 1, as the training grid of 1000 steps did; the transformer is given
    1000·sigma cut to an integer.
    """
    fractions = torch.linspace(
        _FIRST_SIGMA_OF_TRAINING_GRID, 0, _checked(num_steps, flow_shift) + 1, dtype=torch.float64
    )
    sigmas = apply_flow_shift(fractions, flow_shift)
    return Schedule(sigmas=sigmas, timesteps=(to_timestep(sigmas[:-1]) + _ROUNDING).floor())


def full_range_schedule(num_steps: int, flow_shift: float) -> Schedule:
    """Return N + 1 evenly spaced fractions from 1 to 0, shifted once; timesteps are not rounded."""
    fractions = torch.linspace(1, 0, _checked(num_steps, flow_shift) + 1, dtype=torch.float64)
    sigmas = apply_flow_shift(fractions, flow_shift)
    return Schedule(sigmas=sigmas, timesteps=to_timestep(sigmas[:-1]))


def full_range_cut_schedule(num_steps: int, flow_shift: float) -> Schedule:
    """Return the full range with timesteps cut to integers: the Wan repositories' for DPM++."""
    whole = full_range_schedule(num_steps, flow_shift)
    return Schedule(sigmas=whole.sigmas, timesteps=(whole.timesteps + _ROUNDING).floor())


def beta_schedule(num_steps: int, flow_shift: float) -> Schedule:
    """Return quantiles of Beta(0.6, 0.6), shifted: dense near noise and near the clean end.

    "Beta Sampling is All You Need" (arXiv:2407.12173). The distribution is that of the fraction
    before the shift, as in ComfyUI, so that the shift keeps its meaning.
    """
    num_steps = _checked(num_steps, flow_shift)
    fractions = torch.tensor(
        [beta_quantile(1 - step / num_steps, BETA_SHAPE) for step in range(num_steps + 1)],
        dtype=torch.float64,
    )
    sigmas = apply_flow_shift(fractions, flow_shift)
    return Schedule(sigmas=sigmas, timesteps=to_timestep(sigmas[:-1]))


def _checked(num_steps: int, flow_shift: float) -> int:
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}", hint="sampling needs at least one step")
    if not flow_shift > 0:
        raise ConfigError(
            f"flow_shift is {flow_shift}", hint="it must be above 0; 1 does not shift"
        )
    return num_steps
