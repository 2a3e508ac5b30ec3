"""Losses: every element, in float32 whatever comes in."""

from __future__ import annotations

import pytest
import torch

from trainer.contract.catalog import LOSSES, WEIGHTINGS
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=10
)


@pytest.mark.parametrize("entry", LOSSES, ids=lambda entry: entry.name)
def test_a_loss_is_float32_and_of_every_element(entry) -> None:
    implementation = LOSSES.load(entry.name)
    loss = implementation(implementation.Config(), BUILD)
    random = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 5, generator=random).bfloat16()
    found = loss(prediction, target)
    assert found.dtype == torch.float32
    assert found.shape == prediction.shape
    assert torch.equal(found, loss(prediction.float(), target.float()))


def test_mse_is_the_square_of_the_difference() -> None:
    implementation = LOSSES.load("mse")
    loss = implementation(implementation.Config(), BUILD)
    assert loss(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])).tolist() == [4.0, 9.0]


@pytest.mark.parametrize("entry", WEIGHTINGS, ids=lambda entry: entry.name)
def test_a_weighting_is_one_finite_weight_a_sample(entry) -> None:
    implementation = WEIGHTINGS.load(entry.name)
    weights = implementation(implementation.Config(), BUILD)(torch.linspace(0, 1, 11))
    assert weights.shape == (11,)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
