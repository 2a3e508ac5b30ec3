"""Losses and weightings against their formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.contract.catalog import LOSSES, WEIGHTINGS
from trainer.contract.loss_weights import loss_weight
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext, Loss

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=10
)
SIGMAS = (0.0, 0.001, 0.05, 0.25, 0.5, 0.75, 0.999, 1.0)


def make_loss(name: str, **options: Any) -> Loss:
    implementation: Any = LOSSES.load(name)
    return implementation(implementation.Config(**options), BUILD)


def make_weighting(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    implementation: Any = WEIGHTINGS.load(name)
    return implementation(implementation.Config(**options), BUILD)


@pytest.mark.parametrize("entry", LOSSES, ids=lambda entry: entry.name)
def test_a_loss_is_float32_and_of_every_element(entry) -> None:
    loss = make_loss(entry.name)
    random = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 2, 3, 5, generator=random).bfloat16()
    sigma = torch.tensor([0.0, 0.5, 1.0])
    found = loss(prediction, target, sigma)
    assert found.dtype == torch.float32
    assert found.shape == prediction.shape
    assert torch.equal(found, loss(prediction.float(), target.float(), sigma))
    assert not loss(target, target, sigma).any()


def delta_at(schedule: str, clean: float, noise: float, sigma: float) -> float:
    if schedule == "constant":
        return clean
    if schedule == "linear":
        return (1 - sigma) * clean + sigma * noise
    if schedule == "exponential":
        return math.exp((1 - sigma) * math.log(clean) + sigma * math.log(noise))
    # sd-scripts: (1 - c) / (1 + s)² + c with s = √(1/SNR), here from `clean` instead of 1.
    ratio = math.inf if sigma == 1 else sigma / (1 - sigma)
    return (clean - noise) / (1 + ratio) ** 2 + noise


def huber(d: float, delta: float) -> float:
    return d * d if abs(d) <= delta else 2 * delta * abs(d) - delta**2


def pseudo_huber(d: float, delta: float) -> float:
    return 2 * delta**2 * (math.sqrt(1 + (d / delta) ** 2) - 1)


FORMULAS: dict[str, Callable[[float, float], float]] = {
    "mse": lambda d, _: d * d,
    "l1": lambda d, _: abs(d),
    "huber": huber,
    "pseudo_huber": pseudo_huber,
}


@pytest.mark.parametrize("schedule", ["constant", "linear", "exponential", "snr"])
@pytest.mark.parametrize("name", FORMULAS)
def test_losses_are_their_formulas(name: str, schedule: str) -> None:
    options: dict[str, Any] = {}
    if "huber" in name:
        options = {"huber_delta": 0.8, "huber_delta_noise": 0.05, "huber_schedule": schedule}
    differences = [-3.0, -0.4, -1e-3, 0.0, 0.05, 0.8, 2.5]
    target = torch.linspace(-1, 1, len(differences)).repeat(len(SIGMAS), 1)
    prediction = target.double() + torch.tensor(differences, dtype=torch.float64)
    found = make_loss(name, **options)(prediction.float(), target, torch.tensor(SIGMAS))
    for row, sigma in enumerate(SIGMAS):
        delta = delta_at(schedule, 0.8, 0.05, sigma)
        expected = [FORMULAS[name](d, delta) for d in differences]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert FORMULAS.keys() == set(LOSSES.names)


def test_huber_is_twice_that_of_torch_and_becomes_mse_for_a_large_delta() -> None:
    random = torch.Generator().manual_seed(1)
    prediction, target = 3 * torch.randn(2, 4, 100, generator=random)
    sigma = torch.rand(4, generator=random)
    reference = 2 * torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=0.7)
    assert torch.allclose(make_loss("huber", huber_delta=0.7)(prediction, target, sigma), reference)
    square = (prediction - target).square()
    for name in ("huber", "pseudo_huber"):
        found = make_loss(name, huber_delta=1e4)(prediction, target, sigma)
        assert torch.allclose(found, square, rtol=1e-4)


@pytest.mark.parametrize("name", ["huber", "pseudo_huber"])
def test_gradients_are_bounded_and_finite(name: str) -> None:
    prediction = torch.tensor([[0.0, 1e-20, 0.3, 1e10]], requires_grad=True)
    loss = make_loss(name, huber_delta=0.3)(prediction, torch.zeros(1, 4), torch.zeros(1))
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 0] == 0
    assert gradient[0, -1] == pytest.approx(2 * 0.3)


def flat_mean(weight: Callable[[float], float], cells: int = 20_000) -> float:
    return sum(weight((cell + 0.5) / cells) for cell in range(cells)) / cells


def clean_estimate_weight(sigma: float, gamma: float) -> float:
    """Min-SNR's weight of the clean estimate's error, told for that of the velocity: x σ²."""
    return min(((1 - sigma) / sigma) ** 2, gamma) * sigma**2 if sigma else 0.0


WEIGHTS: list[tuple[str, dict[str, Any], Callable[[float], float]]] = [
    ("none", {}, lambda sigma: 1.0),
    ("sigma_sqrt", {}, lambda sigma: max(sigma, 0.1) ** -2),
    ("sigma_sqrt", {"sigma_floor": 0.4}, lambda sigma: max(sigma, 0.4) ** -2),
    ("cosmap", {}, lambda sigma: 2 / (math.pi - 2 * math.pi * sigma + 2 * math.pi * sigma**2)),
    ("bell", {}, lambda sigma: math.exp(-((sigma - 0.5) ** 2) / (2 * 0.3**2))),
    ("bell", {"weighting_center": 0.8, "weighting_std": 0.1},
     lambda sigma: math.exp(-((sigma - 0.8) ** 2) / (2 * 0.1**2))),
    ("min_snr", {}, lambda sigma: clean_estimate_weight(sigma, 5)),
    ("min_snr", {"min_snr_gamma": 1.0}, lambda sigma: clean_estimate_weight(sigma, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "formula"), WEIGHTS)
def test_weightings_are_their_formulas_with_a_mean_of_one(
    name: str, options: dict[str, Any], formula: Callable[[float], float]
) -> None:
    found = make_weighting(name, **options)(torch.tensor(SIGMAS))
    mean = flat_mean(formula)
    assert found.shape == (len(SIGMAS),)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([formula(s) / mean for s in SIGMAS], rel=1e-4, abs=1e-7)
    # The same without torch.
    implementation: Any = WEIGHTINGS.load(name)
    told = loss_weight(name, implementation.Config(**options).model_dump())
    assert [told(s) for s in SIGMAS] == pytest.approx(found.tolist(), rel=1e-5, abs=1e-7)
    assert flat_mean(told) == pytest.approx(1, rel=1e-4)


def test_cosmap_needs_no_factor() -> None:
    assert flat_mean(WEIGHTS[3][2]) == pytest.approx(1, abs=1e-6)


def test_every_weighting_is_there_with_every_option() -> None:
    varied = {name: set[str]() for name in WEIGHTINGS.names}
    for name, options, _ in WEIGHTS:
        varied[name] |= options.keys()
    for name in WEIGHTINGS.names:
        implementation: Any = WEIGHTINGS.load(name)
        assert varied[name] == implementation.Config.model_fields.keys()
