"""Solvers against diffusers' schedulers on a shared trajectory, and against an exact solution."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import mpmath
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from torch import Tensor

from app.cli.sample_start_options import Schedule as WhichSchedule
from app.cli.sample_start_options import Solver
from trainer.contract.catalog import SCHEDULES, SOLVERS
from trainer.contract.config import Prompt, SamplingSection
from trainer.contract.errors import ConfigError
from trainer.contract.variants import get_variant
from trainer.contract.walk import beta_quantile, own_schedule
from trainer.core.flow import apply_flow_shift
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import (
    Schedule,
    beta_schedule,
    full_range_cut_schedule,
    full_range_schedule,
    training_grid_schedule,
    walk_of,
)
from trainer.sampling.solvers.dpmpp import DPMpp2M
from trainer.sampling.solvers.euler import Euler
from trainer.sampling.solvers.heun import Heun
from trainer.sampling.solvers.lcm import LCM
from trainer.sampling.solvers.unipc import UniPC

FIRST = float(np.float32(0.999))  # what the Wan repositories start from
GRID = [(steps, shift) for steps in (1, 2, 3, 4, 10, 20, 40) for shift in (1.0, 5.0, 12.0)]


def bent_velocity(noisy: Tensor, sigma: float) -> Tensor:
    """A field that no polynomial of low degree follows."""
    return torch.sin(3 * noisy) + math.cos(4 * sigma) * noisy + 0.3 * noisy.roll(1, dims=-1)


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(3)).to(dtype)


def walk(solver_class: type, schedule, noisy: Tensor) -> Tensor:
    solver = solver_class(schedule.sigmas)
    for index in range(schedule.num_steps):
        noisy = solver.step(index, noisy, bent_velocity(noisy, float(schedule.sigmas[index])))
    return noisy


def diffusers_unipc(num_steps: int, flow_shift: float) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(FIRST, 0, num_steps + 1)[:-1])
    scheduler.set_begin_index(0)
    return scheduler


def diffusers_euler(num_steps: int, flow_shift: float) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    scheduler.set_begin_index(0)
    return scheduler


def walk_diffusers(scheduler, sigmas: Tensor, noisy: Tensor) -> Tensor:
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = bent_velocity(noisy, float(sigmas[index]))
        noisy = scheduler.step(velocity, timestep, noisy, return_dict=False)[0]
    return noisy


@pytest.mark.parametrize(("num_steps", "flow_shift"), GRID)
def test_unipc_equals_diffusers(num_steps: int, flow_shift: float) -> None:
    schedule = training_grid_schedule(num_steps, flow_shift)
    scheduler = diffusers_unipc(num_steps, flow_shift)
    torch.testing.assert_close(scheduler.sigmas.double(), schedule.sigmas, atol=1e-7, rtol=0)
    assert (scheduler.timesteps.double() == schedule.timesteps).all()
    # diffusers' coefficients are float32; given float64 sigmas the two must agree to rounding.
    scheduler.sigmas = schedule.sigmas
    ours = walk(UniPC, schedule, start(torch.float64))
    theirs = walk_diffusers(scheduler, schedule.sigmas, start(torch.float64))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("num_steps", "flow_shift"), GRID)
def test_euler_equals_diffusers(num_steps: int, flow_shift: float) -> None:
    schedule = full_range_schedule(num_steps, flow_shift)
    scheduler = diffusers_euler(num_steps, flow_shift)
    torch.testing.assert_close(scheduler.sigmas.double(), schedule.sigmas, atol=1e-6, rtol=0)
    torch.testing.assert_close(scheduler.timesteps.double(), schedule.timesteps, atol=1e-3, rtol=0)
    solver, noisy = Euler(schedule.sigmas), start(torch.float32)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = bent_velocity(noisy, float(schedule.sigmas[index]))
        theirs = scheduler.step(velocity, timestep, noisy, return_dict=False)[0]
        noisy = solver.step(index, noisy, velocity)
        torch.testing.assert_close(noisy, theirs, atol=1e-6, rtol=1e-6)


def walk_for(num_steps: int, flow_shift: float, **fields) -> Schedule:
    request = SampleRequest.of("a", get_variant("wan2.1-t2v-1.3b"))
    return walk_of(replace(request, num_steps=num_steps, flow_shift=flow_shift, **fields))


@pytest.mark.parametrize("schedule", ["training_grid", "full_range_cut", "beta"])
@pytest.mark.parametrize(("num_steps", "flow_shift"), GRID)
def test_dpmpp_equals_diffusers(num_steps: int, flow_shift: float, schedule: str) -> None:
    ours = walk_for(num_steps, flow_shift, solver="dpm++", schedule=schedule)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    if schedule == "training_grid":  # diffusers' own, but that it is float32 near both ends
        torch.testing.assert_close(scheduler.sigmas.double(), ours.sigmas, atol=1e-6, rtol=0)
        assert (scheduler.timesteps.double() - ours.timesteps).abs().max() <= 1
    scheduler.sigmas = ours.sigmas
    ended = walk(DPMpp2M, ours, start(torch.float64))
    theirs = walk_diffusers(scheduler, ours.sigmas, start(torch.float64))
    # diffusers' samples are float32 between the steps.
    torch.testing.assert_close(ended, theirs, atol=2e-5, rtol=2e-5)


def test_dpmpp_in_float64_follows_the_formula_of_the_paper() -> None:
    schedule = training_grid_schedule(12, 5.0)
    sigmas = schedule.sigmas
    lambdas = torch.log((1 - sigmas) / sigmas)
    solver, noisy, clean = DPMpp2M(sigmas), start(torch.float64), []
    for index in range(11):
        velocity = bent_velocity(noisy, float(sigmas[index]))
        clean.append(noisy - sigmas[index] * velocity)
        h = lambdas[index + 1] - lambdas[index]
        data = clean[-1]
        if index:
            r = (lambdas[index] - lambdas[index - 1]) / h
            data = (1 + 1 / (2 * r)) * clean[-1] - 1 / (2 * r) * clean[-2]
        following = sigmas[index + 1]
        expected = following / sigmas[index] * noisy - (1 - following) * torch.expm1(-h) * data
        noisy = solver.step(index, noisy, velocity)
        torch.testing.assert_close(noisy, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["full_range", "training_grid"])
@pytest.mark.parametrize(("num_steps", "flow_shift"), GRID)
def test_heun_equals_diffusers(num_steps: int, flow_shift: float, schedule: str) -> None:
    ours = walk_for(num_steps, flow_shift, solver="heun", schedule=schedule)
    assert ours.num_steps == 2 * num_steps - 1
    scheduler = FlowMatchHeunDiscreteScheduler(shift=flow_shift)
    scheduler.set_timesteps(num_steps)
    assert len(scheduler.timesteps) == ours.num_steps
    # diffusers takes no sigmas from the caller, and shifts its own twice at the low end.
    scheduler.sigmas = ours.sigmas.float()
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    scheduler.set_begin_index(0)
    solver, noisy = Heun(ours.sigmas), start(torch.float32)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = bent_velocity(noisy, float(ours.sigmas[index]))
        theirs = scheduler.step(velocity, timestep, noisy, return_dict=False)[0]
        noisy = solver.step(index, noisy, velocity)
        torch.testing.assert_close(noisy, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_steps", "flow_shift"), GRID)
def test_lcm_equals_diffusers_with_the_same_generator(num_steps: int, flow_shift: float) -> None:
    ours = walk_for(num_steps, flow_shift, solver="lcm")
    scheduler = FlowMatchLCMScheduler(shift=flow_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    scheduler.set_begin_index(0)
    torch.testing.assert_close(scheduler.sigmas.double(), ours.sigmas, atol=1e-6, rtol=0)
    mine, generator = (torch.Generator().manual_seed(7) for _ in range(2))
    solver, noisy = LCM(ours.sigmas, mine), start(torch.float32)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = bent_velocity(noisy, float(ours.sigmas[index]))
        theirs = scheduler.step(velocity, timestep, noisy, generator=generator)[0]
        noisy = solver.step(index, noisy, velocity)
        torch.testing.assert_close(noisy, theirs, atol=1e-6, rtol=1e-6)


def test_lcm_without_a_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="generator"):
        LCM(full_range_schedule(4, 5.0).sigmas)


@pytest.mark.parametrize("num_steps", [4, 10, 20])
def test_unipc_in_float32_equals_diffusers_in_float32(num_steps: int) -> None:
    schedule = training_grid_schedule(num_steps, 5.0)
    ours = walk(UniPC, schedule, start(torch.float32))
    theirs = walk_diffusers(diffusers_unipc(num_steps, 5.0), schedule.sigmas, start(torch.float32))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


class _Analytic:
    """Gaussian data with deviation s: the flow is linear in x and its solution known."""

    deviation = 0.4

    def velocity(self, noisy: Tensor, sigma: float) -> Tensor:
        variance = self.variance(sigma)
        slope = (sigma - (1 - sigma) * self.deviation**2) / variance
        return slope * noisy

    def variance(self, sigma: float) -> float:
        return (1 - sigma) ** 2 * self.deviation**2 + sigma**2

    def end(self, noisy: Tensor, sigma: float) -> Tensor:
        return noisy * self.deviation / math.sqrt(self.variance(sigma))


def end_error(solver_class: type, num_steps: int) -> float:
    """Error at sigma 0 of a walk whose first and last sigma do not depend on num_steps."""
    problem = _Analytic()
    inner = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64)
    solver = solver_class(torch.cat([inner, torch.zeros(1, dtype=torch.float64)]))
    noisy = first = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    sigmas = inner[:-1]
    if solver_class is Heun:  # every sigma but the first twice; the last step is corrected, too
        sigmas = torch.cat([inner[:1], inner[1:].repeat_interleave(2)])
        solver = Heun(torch.cat([sigmas, torch.zeros(1)]))
        sigmas = sigmas[:-1]
    for index, sigma in enumerate(sigmas.tolist()):
        noisy = solver.step(index, noisy, problem.velocity(noisy, sigma))
    ratio = math.sqrt(problem.variance(0.05) / problem.variance(0.95))
    return abs(float(noisy - first * ratio))


@pytest.mark.parametrize(
    ("solver_class", "order"), [(Euler, 1), (DPMpp2M, 2), (Heun, 2), (UniPC, 3)]
)
def test_convergence_order(solver_class: type, order: int) -> None:
    """UniP-2 with its corrector is third order (UniPC paper, theorem 3.1: one above p)."""
    errors = [end_error(solver_class, num_steps) for num_steps in (20, 40, 80, 160)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert measured[-1] == pytest.approx(order, abs=0.25), (errors, measured)


def test_a_constant_clean_estimate_is_reached_exactly() -> None:
    clean = torch.full((1, 1, 1, 2, 2), 0.7, dtype=torch.float64)
    for solver_class, schedule in (
        (Euler, full_range_schedule(5, 3.0)),
        (UniPC, training_grid_schedule(5, 3.0)),
        (DPMpp2M, full_range_cut_schedule(5, 3.0)),
        (Heun, walk_for(3, 3.0, solver="heun")),
        (LCM, beta_schedule(5, 3.0)),
    ):
        solver = solver_class(schedule.sigmas, torch.Generator())
        noisy = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double()
        for index in range(5):
            velocity = (noisy - clean) / schedule.sigmas[index]
            noisy = solver.step(index, noisy, velocity)
        torch.testing.assert_close(noisy, clean, atol=1e-12, rtol=0)


def test_bfloat16_velocities_do_not_lower_the_precision_of_the_latents() -> None:
    for solver_class, schedule in (
        (Euler, full_range_schedule(3, 3.0)),
        (UniPC, training_grid_schedule(3, 3.0)),
        (DPMpp2M, full_range_cut_schedule(3, 3.0)),
        (Heun, walk_for(2, 3.0, solver="heun")),
        (LCM, full_range_schedule(3, 3.0)),
    ):
        solver = solver_class(schedule.sigmas, torch.Generator())
        noisy = start(torch.float32)
        for index in range(3):
            noisy = solver.step(index, noisy, noisy.bfloat16())
            assert noisy.dtype == torch.float32


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0, 8.0, 12.0, 16.0])
def test_timesteps_are_cut_as_in_the_repositories(flow_shift: float) -> None:
    for num_steps in range(1, 101):
        fractions = np.linspace(FIRST, 0, num_steps + 1)[:-1]
        sigmas = flow_shift * fractions / (1 + (flow_shift - 1) * fractions)
        expected = (sigmas * 1000).astype(np.int64).tolist()
        assert training_grid_schedule(num_steps, flow_shift).timesteps.tolist() == expected


def test_published_schedule_of_the_two_experts() -> None:
    # features.md / models.md: 40 steps, shift 12, boundary 875: 26 high and 14 low (877 | 865).
    timesteps = training_grid_schedule(40, 12.0).timesteps
    assert int((timesteps >= 875).sum()) == 26
    assert timesteps[25:27].tolist() == [877, 865]
    timesteps = training_grid_schedule(40, 5.0).timesteps
    assert int((timesteps >= 900).sum()) == 15
    assert timesteps[14:16].tolist() == [902, 892]


def test_the_shift_is_applied_once() -> None:
    sigmas = full_range_schedule(4, 5.0).sigmas
    assert float(sigmas[-2]) == pytest.approx(0.625)
    assert float(sigmas[0]) == 1
    assert float(sigmas[-1]) == 0


def test_unipc_refuses_a_schedule_that_starts_at_pure_noise() -> None:
    with pytest.raises(ValueError, match="below 1"):
        UniPC(full_range_schedule(4, 5.0).sigmas)


@pytest.mark.parametrize(
    "make", [full_range_schedule, full_range_cut_schedule, training_grid_schedule, beta_schedule]
)
def test_schedules_refuse_nonsense(make) -> None:
    with pytest.raises(ConfigError, match="num_steps"):
        make(0, 5.0)
    with pytest.raises(ConfigError, match="flow_shift"):
        make(4, 0.0)


def test_the_catalog_names_the_solvers() -> None:
    known = {"unipc": UniPC, "euler": Euler, "dpm++": DPMpp2M, "heun": Heun, "lcm": LCM}
    assert {name: SOLVERS.load(name) for name in SOLVERS.names} == known
    for name, solver in known.items():
        assert SCHEDULES.load(own_schedule(name)) is solver.schedule


@pytest.mark.parametrize(
    ("registry", "option", "key"),
    [(SOLVERS, Solver, "solver"), (SCHEDULES, WhichSchedule, "schedule")],
)
def test_help_names_all_there_are(registry, option, key: str) -> None:
    texts = [get_args(option)[1].help]
    for model in (Prompt, SamplingSection):
        texts.append(model.model_fields[key].description)
    texts.append((Path(__file__).parents[2] / "docs/sampling.md").read_text(encoding="utf-8"))
    assert [name for name in registry.names for text in texts if name not in str(text)] == []


# Schedules


@pytest.mark.parametrize("flow_shift", [1.0, 5.0, 12.0])
def test_dpmpp_timesteps_are_cut_as_in_the_repositories(flow_shift: float) -> None:
    for num_steps in range(1, 101):
        fractions = np.linspace(1, 0, num_steps + 1)[:-1]
        sigmas = flow_shift * fractions / (1 + (flow_shift - 1) * fractions)
        expected = (sigmas * 1000 + 1e-9).astype(np.int64).tolist()
        assert full_range_cut_schedule(num_steps, flow_shift).timesteps.tolist() == expected


def test_beta_quantiles_are_those_of_the_distribution() -> None:
    for share in np.linspace(0, 1, 41)[1:-1].tolist():
        for shape in (0.6, 1.0, 1.7):
            below = mpmath.betainc(shape, shape, 0, beta_quantile(share, shape), regularized=True)
            assert float(below) == pytest.approx(share, abs=1e-12)
    assert (beta_quantile(0.0, 0.6), beta_quantile(1.0, 0.6)) == (0.0, 1.0)


def test_the_beta_schedule_is_dense_at_both_ends_and_keeps_the_shift() -> None:
    for num_steps in (1, 2, 5, 20, 50):
        even, beta = (make(num_steps, 1.0).sigmas for make in (full_range_schedule, beta_schedule))
        assert (float(beta[0]), float(beta[-1])) == (1, 0)
        assert (beta.diff() < 0).all()
        if num_steps >= 20:
            gaps = -beta.diff() / -even.diff()
            assert float(gaps[0]) < 0.6
            assert float(gaps[-1]) < 0.6
            assert float(gaps[num_steps // 2]) > 1.1
        shifted = beta_schedule(num_steps, 5.0)
        torch.testing.assert_close(shifted.sigmas, apply_flow_shift(beta, 5.0))
        torch.testing.assert_close(shifted.timesteps, 1000 * shifted.sigmas[:-1])


@pytest.mark.parametrize("name", SCHEDULES.names)
def test_a_solver_walks_the_schedule_that_is_asked_for(name: str) -> None:
    expected = SCHEDULES.load(name)(8, 3.0)
    walked = walk_for(8, 3.0, solver="euler", schedule=name)
    assert torch.equal(walked.sigmas, expected.sigmas)
    assert torch.equal(walked.timesteps, expected.timesteps)


@pytest.mark.parametrize("solver", SOLVERS.names)
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.58, 0.8, 0.999, 1.0])
def test_strength_walks_the_steps_that_diffusers_walks(solver: str, strength: float) -> None:
    pipeline = SimpleNamespace(scheduler=SimpleNamespace(order=SOLVERS.load(solver).evaluations))
    for num_steps in (20, 40, 50):
        whole = walk_for(num_steps, 5.0, solver=solver)
        video = {"video": Path("v.mp4"), "strength": strength}
        walked = walk_for(num_steps, 5.0, solver=solver, **video)
        theirs, _ = WanVideoToVideoPipeline.get_timesteps(
            pipeline, num_steps, whole.timesteps, strength, "cpu"
        )
        assert torch.equal(walked.timesteps, theirs)
        assert torch.equal(walked.sigmas[-1:], whole.sigmas[-1:])
        assert torch.equal(walked.sigmas[:-1], whole.sigmas[:-1][-walked.num_steps :])
