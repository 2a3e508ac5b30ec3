from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.core.types import Batch, NoisyInput
from trainer.techniques.contrastive_flow import ContrastiveFlow

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=1
)


def no_forward(noisy: NoisyInput, batch: Batch) -> Any:
    raise AssertionError("this technique needs no forward of its own")


def value(latents: torch.Tensor, noise: torch.Tensor, prediction: torch.Tensor) -> float:
    batch = Batch(latents_BCFHW=latents, context=(), item_seeds=tuple(range(len(latents))))
    noisy = NoisyInput(
        noisy_latents_BCFHW=latents, sigma_B=torch.zeros(len(latents)), noise_BCFHW=noise
    )
    technique = ContrastiveFlow(ContrastiveFlow.Config(weight=0.5), BUILD)
    (term,) = technique.loss_terms(batch, noisy, prediction, no_forward)
    assert term.name == "contrastive_flow"
    return term.value.item()


def test_the_term_is_the_distance_to_the_other_samples_velocity() -> None:
    # Velocities are 3 - 1 = 2 and 10 - 4 = 6; the predictions 2 and 7 lie 4 and 5 from the other's.
    latents = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1, 1)
    noise = torch.tensor([3.0, 10.0]).view(2, 1, 1, 1, 1)
    prediction = torch.tensor([2.0, 7.0]).view(2, 1, 1, 1, 1)
    assert value(latents, noise, prediction) == pytest.approx(-0.5 * (4**2 + 5**2) / 2)


def test_equation_4_of_the_paper_in_float64() -> None:
    random = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(3, 2, 2, 4, 4, generator=random) for _ in range(3))
    velocity = (noise - latents).double()
    others = velocity[[2, 0, 1]]
    expected = -0.5 * ((prediction.double() - others) ** 2).mean()
    assert value(latents, noise, prediction) == pytest.approx(expected.item(), rel=1e-6)


def test_alone_in_a_batch_there_is_nothing_to_contrast_with() -> None:
    one = torch.ones(1, 1, 1, 1, 1)
    assert value(one, 3 * one, 5 * one) == 0
