"""The masked loss against its formula, term by term in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.contract.config import RunConfig
from trainer.contract.memory_model import estimate
from trainer.contract.variants import VARIANTS
from trainer.core.flow import velocity_target
from trainer.core.seams import BuildContext, Need
from trainer.core.types import Batch, NoisyInput
from trainer.jobs.build import mask_problems, needs_of, technique_problems
from trainer.losses.mse import MSE
from trainer.techniques.masked_loss import MaskedLoss
from trainer.training.loss_reduction import reduce_loss

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=1
)
SHAPE = (2, 3, 2, 4, 4)


def make_inputs(mask: Tensor) -> tuple[Batch, NoisyInput, Tensor, Tensor]:
    """Return batch, noisy input, prediction and the untrained model's velocity."""
    random = torch.Generator().manual_seed(0)
    latents, noise, prediction, base = (torch.randn(SHAPE, generator=random) for _ in range(4))
    batch = Batch(latents_BCFHW=latents, context=(), item_seeds=(0, 1), mask_B1FHW=mask)
    noisy = NoisyInput(
        noisy_latents_BCFHW=latents, sigma_B=torch.tensor([0.3, 0.6]), noise_BCFHW=noise
    )
    return batch, noisy, prediction, base


def masked_loss(mask: Tensor, **options: Any) -> tuple[float, Tensor]:
    """Return the loss and its gradient with respect to the prediction."""
    batch, noisy, prediction, base = make_inputs(mask)
    prediction.requires_grad_()
    technique = MaskedLoss(MaskedLoss.Config(**options), BUILD)
    target = velocity_target(batch.latents_BCFHW, noisy.noise_BCFHW)
    target = technique.edit_target(target, batch, noisy, lambda *_: base)
    loss = reduce_loss(
        MSE(MSE.Config(), BUILD)(prediction, target, noisy.sigma_B),
        maps=[technique.loss_map(batch, noisy)],
        sigma_weight_B=torch.ones(2),
    )
    loss.backward()
    assert prediction.grad is not None
    return loss.item(), prediction.grad


def by_the_formula(mask: Tensor, outside: float, prior: float, normalize: bool) -> tuple:
    batch, noisy, prediction, base = (
        value.double() if isinstance(value, Tensor) else value for value in make_inputs(mask)
    )
    prediction.requires_grad_()
    m = mask.double().expand(SHAPE)
    a, b = outside + (1 - outside) * m, 1 - m
    if normalize:
        a = a / a.flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        b = b / b.flatten(1).mean(1).view(-1, 1, 1, 1, 1)
    target = noisy.noise_BCFHW.double() - batch.latents_BCFHW.double()
    pointwise = a * (prediction - target) ** 2 + prior * b * (prediction - base) ** 2
    loss = pointwise.flatten(1).mean(1).mean()
    loss.backward()
    return loss.item(), prediction.grad


def soft_mask() -> Tensor:
    return torch.rand(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("outside", [0.0, 0.2])
@pytest.mark.parametrize("prior", [0.0, 0.7])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_formula(hard: bool, outside: float, prior: float, normalize: bool) -> None:
    mask = soft_mask().round() if hard else soft_mask()
    options = {"outside_weight": outside, "prior_weight": prior, "normalize": normalize}
    loss, gradient = masked_loss(mask, **options)
    wanted, wanted_gradient = by_the_formula(mask, outside, prior, normalize)
    # Where both targets count a number is left out that the prediction has no part in.
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-7)
    if not prior or (hard and not outside):
        assert loss == pytest.approx(wanted, rel=1e-5)


def test_what_is_outside_of_the_mask_does_not_count() -> None:
    mask = soft_mask().round()
    _, gradient = masked_loss(mask)
    assert not gradient[(mask == 0).expand(SHAPE)].any()
    assert gradient[(mask == 1).expand(SHAPE)].all()


def test_a_small_mask_counts_as_much_as_a_whole_clip() -> None:
    mask = torch.ones(2, 1, 2, 4, 4)
    mask[0, :, :, 1:] = 0
    technique = MaskedLoss(MaskedLoss.Config(), BUILD)
    batch, noisy, *_ = make_inputs(mask)
    weights = technique.loss_map(batch, noisy)
    assert weights is not None
    assert weights.flatten(1).mean(1).tolist() == [1.0, 1.0]


def test_a_black_mask_learns_nothing_and_keeps_everything() -> None:
    mask = torch.zeros(2, 1, 2, 4, 4)
    assert masked_loss(mask)[0] == 0
    _, _, prediction, base = make_inputs(mask)
    loss, _ = masked_loss(mask, prior_weight=0.5)
    assert loss == pytest.approx(0.5 * (prediction - base).square().mean().item(), rel=1e-5)


def test_items_without_masks_are_trained_as_ever() -> None:
    batch, noisy, *_ = make_inputs(soft_mask())
    batch = replace(batch, mask_B1FHW=None)
    technique = MaskedLoss(MaskedLoss.Config(prior_weight=1), BUILD)
    target = torch.zeros(SHAPE)

    def no_forward(*_: Any) -> Any:
        raise AssertionError("there is nothing to compare with")

    assert technique.edit_target(target, batch, noisy, no_forward) is target
    assert technique.loss_map(batch, noisy) is None


def config(*techniques: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"techniques": list(techniques), **sections})


def test_masks_and_their_technique_need_each_other() -> None:
    plain, masked = config(), config({"name": "masked_loss"})
    assert mask_problems(plain, masks=False) == mask_problems(masked, masks=True) == []
    (unused,) = mask_problems(plain, masks=True)
    assert 'name = "masked_loss"' in unused.hint
    (idle,) = mask_problems(masked, masks=False)
    assert idle.key == "techniques[0]"
    assert "mask_directory" in idle.hint


def test_only_the_prior_needs_the_untrained_model() -> None:
    full = {"adapter": {"kind": "none"}}
    assert technique_problems(config({"name": "masked_loss"}, **full), 1) == []
    prior = {"name": "masked_loss", "prior_weight": 1.0}
    (problem,) = technique_problems(config(prior, **full), 1)
    assert "full fine-tune" in problem.message
    assert technique_problems(config(prior), 1) == []
    assert Need.BASE_MODEL in needs_of(config(prior).techniques[0])


def test_the_estimate_knows_the_forward_of_the_untrained_model() -> None:
    model = {"variant": "wan2.1-t2v-1.3b"}
    plain = estimate(config(model=model), "RTX 4090")
    masked = estimate(config({"name": "masked_loss"}, model=model), "RTX 4090")
    prior = {"name": "masked_loss", "prior_weight": 1.0}
    held = estimate(config(prior, model=model), "RTX 4090")
    assert plain.step_seconds is not None
    assert held.step_seconds is not None
    assert masked.step_parts == plain.step_parts
    more = held.step_seconds - plain.step_seconds
    assert more == held.step_parts["untrained model"]
    # A forward beside a forward, a recomputed one and a backward.
    assert 0.2 < more / plain.step_seconds < 0.4
    assert (
        masked.disk_parts["latents of an item"] * 16 == plain.disk_parts["latents of an item"] * 17
    )
