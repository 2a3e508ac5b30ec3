"""Optimizers against their papers in float64, and against other implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from torch import Tensor

from tests.engine.optimizer_runs import factory_of
from trainer.optimizers.adamw_bf16 import rounded_at_random

Update = Callable[[Tensor, Tensor, int], Tensor]
"""Weights and gradient in float64, and the step from 0 -> new weights."""


def gradients(steps: int = 12) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(5, 7, generator=random) * 0.1 + 0.05 for _ in range(steps)]


def start() -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(2))


def stepped(optimizer: torch.optim.Optimizer, weight: Any, lr: float, steps: int = 12) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = lr
    for gradient in gradients(steps):
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight.detach()


def trained(kind: str, lr: float, **options: Any) -> Tensor:
    weight = torch.nn.Parameter(start())
    optimizer = factory_of(kind, **options).build([{"params": [weight]}], lr=0.0)
    return stepped(optimizer, weight, lr)


def by_formula(update: Update) -> Tensor:
    weight = start().double()
    for step, gradient in enumerate(gradients()):
        weight = update(weight, gradient.double(), step)
    return weight.float()


def test_lion():
    mean = torch.zeros(5, 7, dtype=torch.float64)

    def update(weight: Tensor, gradient: Tensor, step: int) -> Tensor:
        direction = (0.8 * mean + 0.2 * gradient).sign()
        mean.mul_(0.9).add_(0.1 * gradient)
        return weight - 0.01 * (direction + 0.1 * weight)

    ours = trained("lion", 0.01, betas=(0.8, 0.9), weight_decay=0.1)
    torch.testing.assert_close(ours, by_formula(update))


def test_sophia():
    mean, curvature = torch.zeros(2, 5, 7, dtype=torch.float64)

    def update(weight: Tensor, gradient: Tensor, step: int) -> Tensor:
        mean.mul_(0.9).add_(0.1 * gradient)
        if step % 3 == 0:
            curvature.mul_(0.8).add_(0.2 * gradient**2)
        move = (mean / (0.04 * 100 * curvature).clamp(min=1e-15)).clamp(-1, 1)
        assert 0 < int((move.abs() < 1).sum()) < move.numel()  # some are clipped
        return weight * (1 - 0.01 * 0.1) - 0.01 * move

    ours = trained(
        "sophia", 0.01, betas=(0.9, 0.8), hessian_scale=100.0, update_every_steps=3,
        weight_decay=0.1,
    )  # fmt: skip
    torch.testing.assert_close(ours, by_formula(update))


def test_automagic():
    squares, ratio = torch.zeros(5, 7).double(), torch.ones(5, 7).double()
    last: list[Tensor] = []

    def update(weight: Tensor, gradient: Tensor, step: int) -> Tensor:
        squares.mul_(0.9).add_(0.1 * gradient**2)
        if last:
            agrees = gradient.sign() == last.pop().sign()
            ratio.copy_((ratio + torch.where(agrees, 0.5, -0.5)).clamp(0.25, 2.0))
        last.append(gradient)
        move = gradient / ((squares / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
        return weight * (1 - 0.01 * 0.1) - 0.01 * ratio * move.clamp(-1, 1)

    ours = trained(
        "automagic", 0.01, beta2=0.9, lr_bump=0.5, min_lr_ratio=0.25, max_lr_ratio=2.0,
        weight_decay=0.1,
    )  # fmt: skip
    torch.testing.assert_close(ours, by_formula(update))


def test_prodigy_is_the_authors():
    weight = torch.nn.Parameter(start())
    theirs = stepped(
        prodigyopt.Prodigy(
            [weight], d0=1e-3, d_coef=0.9, growth_rate=1.5, weight_decay=0.1, betas=(0.9, 0.98),
            use_bias_correction=True,
        ),
        weight,
        0.7,
    )  # fmt: skip
    ours = trained(
        "prodigy", 0.7, d0=1e-3, d_coef=0.9, growth_rate=1.5, weight_decay=0.1, betas=(0.9, 0.98),
        bias_correction=True,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs)


def test_schedulefree_is_the_authors():
    options = {"betas": (0.85, 0.99), "weight_decay": 0.1, "r": 1.0, "weight_lr_power": 1.5}
    weight = torch.nn.Parameter(start())
    reference = schedulefree.AdamWScheduleFree([weight], **options)
    reference.train()
    at_gradients = stepped(reference, weight, 0.01).clone()
    reference.eval()
    average = weight.detach().clone()
    mine = torch.nn.Parameter(start())
    optimizer: Any = factory_of("schedulefree", **options).build([{"params": [mine]}], lr=0.0)
    torch.testing.assert_close(stepped(optimizer, mine, 0.01), at_gradients)
    optimizer.eval()
    torch.testing.assert_close(mine.detach(), average)


def test_muon_is_torchs():
    weight = torch.nn.Parameter(start())
    reference = torch.optim.Muon(
        [weight], lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    theirs = stepped(reference, weight, 0.01)
    ours = trained("muon", 0.01, momentum=0.9, weight_decay=0.1)
    torch.testing.assert_close(ours - start(), theirs - start(), atol=2e-3, rtol=0.05)  # in bf16


def test_muon_updates_vectors_by_adamw():
    weight, other = (torch.nn.Parameter(torch.full((4,), 0.3)) for _ in range(2))
    muon = factory_of("muon", adamw_lr_ratio=0.5, weight_decay=0.1)
    optimizer = muon.build([{"params": [weight], "lr_scale": 3.0}], lr=0.0)
    assert optimizer.param_groups[0]["lr_scale"] == 1.5
    reference = torch.optim.AdamW([other], betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for given in (optimizer, reference):
        given.param_groups[0]["lr"] = 0.01
    for step in range(5):
        weight.grad, other.grad = (torch.full((4,), 0.1 + step) for _ in range(2))
        optimizer.step()
        reference.step()
    torch.testing.assert_close(weight, other)


def test_scion_moves_matrices_by_a_fixed_spectral_norm():
    before, after = start(), trained("scion", 0.01, momentum=1.0)
    (last,) = [gradients()[-1]]
    weight = torch.nn.Parameter(before.clone())
    optimizer = factory_of("scion", momentum=1.0).build([{"params": [weight]}], lr=0.0)
    optimizer.param_groups[0]["lr"] = 0.01
    weight.grad = last.clone()
    optimizer.step()
    left, _, right = torch.linalg.svd(last, full_matrices=False)
    exact = -0.01 * (5 / 7) ** 0.5 * left @ right
    moved = weight.detach() - before
    alike = torch.cosine_similarity(moved.flatten(), exact.flatten(), dim=0)
    assert alike > 0.97  # five Newton-Schulz iterations are near to it
    assert torch.linalg.matrix_norm(moved, 2) < 1.3 * torch.linalg.matrix_norm(exact, 2)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", ["adafactor", "came"])
def test_second_moments_are_kept_as_rows_and_columns(kind):
    """The first step of both, by the papers' formula."""
    options = {"beta1": None} if kind == "adafactor" else {"betas": (0.0, 0.999, 0.0)}
    weight = torch.nn.Parameter(start())
    optimizer = factory_of(kind, **options).build([{"params": [weight]}], lr=0.0)
    optimizer.param_groups[0]["lr"] = 0.01
    gradient = gradients(1)[0]
    weight.grad = gradient.clone()
    optimizer.step()
    squares = gradient.double() ** 2
    keep = 0.0 if kind == "adafactor" else 0.999
    rows, columns = ((1 - keep) * squares.mean(dim) for dim in (1, 0))
    moment = rows[:, None] * columns[None] / rows.mean()
    update = gradient / moment.sqrt()
    update = update / max(1.0, float(update.square().mean().sqrt()))
    if kind == "came":  # confidence: the mean is the update, so that deviations are eps alone
        update = update / 1e-16**0.5
    moved = (weight.detach() - start()).double()
    torch.testing.assert_close(moved, -0.01 * update, rtol=1e-2, atol=1e-3 * update.abs().max())


@pytest.mark.parametrize(
    ("step_size", "step"),
    [
        ("relative", lambda t: min(1e-2, t**-0.5)),
        ("relative_warmup", lambda t: min(1e-6 * t, t**-0.5)),
    ],
)
def test_the_relative_step_is_the_papers_times_the_rate(step_size, step):
    """Of arXiv:1804.04235, section 8, as a plain rate; and as transformers has it at rate 1."""
    from transformers.optimization import Adafactor

    weights = [torch.nn.Parameter(start()) for _ in range(4)]
    full, half, plain, theirs = weights
    makers = [factory_of("adafactor", step_size=step_size, beta1=None) for _ in range(2)]
    makers.append(factory_of("adafactor", beta1=None))
    optimizers = [
        make.build([{"params": [weight]}], lr=0.0)
        for make, weight in zip(makers, weights[:3], strict=True)
    ]
    warmup = step_size == "relative_warmup"
    reference = Adafactor([theirs], scale_parameter=False, warmup_init=warmup)
    for number, gradient in enumerate(gradients(), start=1):
        for optimizer, rate in zip(optimizers, (1.0, 0.5, step(number)), strict=True):
            optimizer.param_groups[0]["lr"] = rate
        for weight, optimizer in zip(weights, (*optimizers, reference), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert not torch.equal(full, start())
    assert torch.equal(full, theirs)
    torch.testing.assert_close(full, plain, rtol=1e-6, atol=1e-9)
    moved, other = full.detach() - start(), half.detach() - start()
    torch.testing.assert_close(other, moved / 2, rtol=1e-2, atol=1e-6)


def test_soap_without_rotation_is_adam_from_the_second_step():
    weight, other = (torch.nn.Parameter(start()) for _ in range(2))
    options = {"betas": (0.9, 0.95), "max_precondition_dim": 1, "weight_decay": 0.1}
    soap = factory_of("soap", **options).build([{"params": [weight]}], lr=0.0)
    reference = torch.optim.Adam([other], betas=(0.9, 0.95))
    for given in (soap, reference):
        given.param_groups[0]["lr"] = 0.01
    for step, gradient in enumerate(gradients()):
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        soap.step()
        if step:
            reference.step()
            other.data.mul_(1 - 0.01 * 0.1)
    torch.testing.assert_close(weight, other)


def test_soap_rotates_short_sides():
    assert not torch.equal(trained("soap", 0.01), trained("soap", 0.01, max_precondition_dim=1))


def test_kahan_keeps_what_bf16_cannot_hold():
    """Thousands of updates far below the spacing of bf16, as float64 adds them up."""
    weight = torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    factory = factory_of("adamw_bf16", betas=(0.0, 0.0), weight_decay=0.0)
    optimizer = factory.build([{"params": [weight]}], lr=0.0)
    optimizer.param_groups[0]["lr"] = 1e-4
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.bfloat16 == weight.dtype
    torch.testing.assert_close(weight.float(), torch.full((4,), 0.9), atol=0.003, rtol=0)
    plain = torch.full((4,), 1.0, dtype=torch.bfloat16)
    for _ in range(1000):
        plain -= 1e-4
    assert torch.equal(plain, torch.ones_like(plain)), "bf16 alone loses them all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_bf16_is_adamw(dtype):
    ours = torch.nn.Parameter(start().to(dtype))
    exact = torch.nn.Parameter(start().to(dtype).float())
    factory = factory_of("adamw_bf16", weight_decay=0.1)
    one = stepped(factory.build([{"params": [ours]}], lr=0.0), ours, 0.01)
    other = stepped(torch.optim.AdamW([exact], weight_decay=0.1), exact, 0.01)
    close = {"atol": 0.0, "rtol": 2**-8} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(one.float(), other, **(close or {"atol": 1e-6, "rtol": 1e-5}))


def test_stochastic_rounding_is_right_on_average_and_repeatable():
    values = torch.tensor([1.0, 1.001, -1.001, 3.14159, -1e-3, 0.0])
    drawn = torch.stack([rounded_at_random(values, seed) for seed in range(4000)]).float()
    torch.testing.assert_close(drawn.mean(0), values, atol=2e-4, rtol=1e-3)
    for column, value in zip(drawn.T, values, strict=True):
        assert len(column.unique()) == (1 if value.bfloat16() == value else 2)
        assert (column - value).abs().max() <= 2**-7 * value.abs()
    assert torch.equal(rounded_at_random(values, 5), rounded_at_random(values, 5))
