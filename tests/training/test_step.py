"""The step against a hand-written loop, and the rules every technique relies on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.contract.catalog import TECHNIQUES
from trainer.contract.variants import VARIANTS
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, Technique
from trainer.core.types import Batch, NoisyInput
from trainer.losses.mse import MSE
from trainer.timesteps.shift import Shift
from trainer.timesteps.uniform import Uniform
from trainer.training.step import Objective, SigmaRange, TrainStep
from trainer.weightings.none import Unweighted

BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"],
    seed=11,
    device=torch.device("cpu"),
    total_steps=10,
    encoded=lambda text: torch.full((2, 8), float(len(text))),
)
NEEDED: dict[str, dict[str, Any]] = {
    "output_preservation": {"trigger": "sks", "class_word": "dog", "class_share": 0.99},
    "blank_prompt_preservation": {"blank_share": 0.99},
    "concept_slider": {"positive": "old", "negative": "y"},
}
"""Options that a technique has no default for, or that let it act on few items."""


class ToyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.suspended = False
        self.calls: list[bool] = []

    def forward(self, latents: Tensor, timestep: Tensor, context: Any, **extra: Tensor) -> Tensor:
        self.calls.append(self.suspended)
        text = torch.stack([item.mean() for item in context]).view(-1, 1, 1, 1, 1)
        mixed = self.mix(self.dropout(latents).movedim(1, -1)).movedim(-1, 1)
        return mixed + text + timestep.view(-1, 1, 1, 1, 1) / 1000

    @contextmanager
    def suspend(self) -> Iterator[None]:
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False


def make_batch(seeds: tuple[int, ...] = (5, 6)) -> Batch:
    random = torch.Generator().manual_seed(1)
    return Batch(
        latents_BCFHW=torch.randn(len(seeds), 4, 2, 3, 3, generator=random),
        context=tuple(torch.randn(3, 8, generator=random) for _ in seeds),
        names=tuple(f"clip{seed}" for seed in seeds),
        item_seeds=seeds,
        captions=("a sks running",) * len(seeds),
    )


def objective(sigmas: SigmaRange | None = None, sampler: Any = None) -> Objective:
    return Objective(
        sampler=sampler or Shift(Shift.Config(), BUILD),
        loss=MSE(MSE.Config(), BUILD),
        weighting=Unweighted(Unweighted.Config(), BUILD),
        sigmas=sigmas or SigmaRange(),
    )


def make_step(
    techniques: list[Technique], seed: int = 11, suspended_adapter: Any = None
) -> TrainStep:
    transformer = ToyTransformer()
    return TrainStep(
        transformer,
        objective(),
        techniques,
        seed,
        transformer.suspend,
        suspended_adapter=suspended_adapter,
    )


def by_hand(model: ToyTransformer, batch: Batch, seed: int) -> Tensor:
    from trainer.core.rng import derive_seed

    torch.manual_seed(derive_seed(seed, "dropout", *batch.item_seeds))
    noises, sigmas = [], []
    for item in batch.item_seeds:
        normal = torch.randn(1, generator=generator(seed, "sigma", item))
        a = torch.sigmoid(normal)
        sigmas.append((3 * a / (1 + 2 * a))[0])
        noises.append(torch.randn(4, 2, 3, 3, generator=generator(seed, "noise", item)))
    noise, sigma = torch.stack(noises), torch.stack(sigmas).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * batch.latents_BCFHW + sigma * noise
    prediction = model(noisy, 1000 * sigma.flatten(), batch.context)
    return (prediction - (noise - batch.latents_BCFHW)).square().flatten(1).mean(1).mean()


def test_without_techniques_it_is_the_hand_written_step_bit_for_bit() -> None:
    step = make_step([])
    batch = make_batch()
    terms = step(batch)
    assert list(terms) == ["loss"]
    assert torch.equal(terms["loss"], by_hand(ToyTransformer(), batch, 11))
    terms["loss"].backward()
    reference = ToyTransformer()
    by_hand(reference, batch, 11).backward()
    assert torch.equal(step.transformer.mix.weight.grad, reference.mix.weight.grad)


def test_noise_belongs_to_the_item_not_to_its_place() -> None:
    step = make_step([])
    both, alone = step.make_noisy(make_batch((5, 6))), step.make_noisy(make_batch((6,)))
    assert torch.equal(both.noise_BCFHW[1], alone.noise_BCFHW[0])
    assert torch.equal(both.sigma_B[1], alone.sigma_B[0])
    other_seed = make_step([], seed=12).make_noisy(make_batch((6,)))
    assert not torch.equal(other_seed.noise_BCFHW, alone.noise_BCFHW)


@pytest.mark.parametrize("entry", TECHNIQUES, ids=lambda entry: entry.name)
def test_a_technique_leaves_the_base_term_alone_unless_it_edits_it(entry: Any) -> None:
    implementation: Any = TECHNIQUES.load(entry.name)
    technique = implementation(implementation.Config(**NEEDED.get(entry.name, {})), BUILD)
    terms = make_step([technique], suspended_adapter=nullcontext)(make_batch())
    assert all(torch.isfinite(value).all() and value.shape == () for value in terms.values())
    edits = any(
        getattr(implementation, hook) is not getattr(Technique, hook)
        for hook in ("edit_batch", "edit_noisy", "edit_target", "loss_map")
    )
    assert edits or torch.equal(terms["loss"], make_step([])(make_batch())["loss"])
    single = make_step([technique], suspended_adapter=nullcontext)(make_batch((5,)))
    assert single.keys() == terms.keys()  # every rank must report the same terms


def test_extra_forwards_run_with_hooks_suspended() -> None:
    class Twice(Technique):
        def loss_terms(self, batch: Any, noisy: Any, prediction: Any, predict: Any) -> list[Any]:
            predict(noisy, batch)
            return []

    step = make_step([Twice()])
    step(make_batch())
    assert step.transformer.calls == [False, True]
    assert not step.transformer.suspended


def test_the_untrained_model_is_asked_before_the_prediction_and_without_gradients() -> None:
    seen: list[tuple[Tensor, bool]] = []

    class Asks(Technique):
        def edit_target(self, target: Tensor, batch: Any, noisy: Any, predict_base: Any) -> Tensor:
            velocity = predict_base(noisy, batch)
            seen.append((velocity, step.transformer.mix.weight.requires_grad))
            return target

    @contextmanager
    def off() -> Iterator[None]:
        weight = step.transformer.mix.weight.data
        step.transformer.mix.weight.data = torch.zeros_like(weight)
        try:
            yield
        finally:
            step.transformer.mix.weight.data = weight

    step = make_step([Asks()])
    with pytest.raises(RuntimeError, match="cannot take the adapter off"):
        step(make_batch())
    step.suspended_adapter = off
    terms = step(make_batch())
    assert step.transformer.calls[-2:] == [True, False], "hooks are off, and it goes first"
    ((velocity, _),) = seen
    assert not velocity.requires_grad
    batch = make_batch()
    text = torch.stack([item.mean() for item in batch.context]).view(-1, 1, 1, 1, 1)
    noisy = step.make_noisy(batch)
    bias = step.transformer.mix.bias.view(1, -1, 1, 1, 1)
    expected = bias + text + noisy.sigma_B.view(-1, 1, 1, 1, 1)
    assert torch.allclose(velocity, expected.expand_as(velocity), atol=1e-6)
    terms["loss"].backward()
    assert step.transformer.mix.weight.grad is not None


def test_the_weight_of_an_item_multiplies_its_loss() -> None:
    both = replace(make_batch(), loss_weight_B=torch.tensor([0.25, 3.0]))
    step = make_step([])
    step.transformer.dropout.p = 0.0
    first, second = (
        step(
            replace(
                make_batch((seed,)),
                latents_BCFHW=both.latents_BCFHW[place : place + 1],
                context=both.context[place : place + 1],
            )
        )["loss"].item()
        for place, seed in enumerate((5, 6))
    )
    expected = (0.25 * first + 3 * second) / 2
    assert step(both)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_every_hook_enters_the_loss() -> None:
    class Edits(Technique):
        def edit_batch(self, batch: Batch, random: torch.Generator) -> Batch:
            return replace(batch, latents_BCFHW=batch.latents_BCFHW + 1)

        def edit_target(self, target: Tensor, batch: Any, noisy: Any, predict_base: Any) -> Tensor:
            return target * 2

        def loss_map(self, batch: Any, noisy: Any) -> Tensor:
            return torch.full((1, 1, 2, 1, 1), 3.0)

    step = make_step([Edits()])
    batch = make_batch()
    shifted = Batch(
        latents_BCFHW=batch.latents_BCFHW + 1,
        context=batch.context,
        names=batch.names,
        item_seeds=batch.item_seeds,
    )
    plain = make_step([])
    noisy = plain.make_noisy(shifted)
    from trainer.core.rng import derive_seed

    torch.manual_seed(derive_seed(11, "dropout", 5, 6))
    prediction = plain.predict(noisy, shifted)
    target = 2 * (noisy.noise_BCFHW - shifted.latents_BCFHW)
    expected = 3 * (prediction - target).square().mean()
    assert step(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_weighting_counts_sample_by_sample() -> None:
    plain = make_step([])
    weighted = make_step([])
    weighted.objective = replace(plain.objective, weighting=lambda sigma: sigma * 10)
    batches = [make_batch((5,)), make_batch((6,))]
    sigmas = [plain.make_noisy(batch).sigma_B.item() for batch in batches]
    assert sigmas[0] != sigmas[1]
    for batch, sigma in zip(batches, sigmas, strict=True):
        expected = 10 * sigma * plain(batch)["loss"].item()
        assert weighted(batch)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_what_the_transformer_sees_can_be_edited_and_not_the_target() -> None:
    class Silence(Technique):
        def edit_noisy(self, noisy: NoisyInput, batch: Any, random: Any) -> NoisyInput:
            return replace(noisy, noisy_latents_BCFHW=torch.zeros_like(noisy.noisy_latents_BCFHW))

    seen: list[Tensor] = []
    step = make_step([Silence()])
    step.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = make_batch()
    loss = step(batch)["loss"]
    assert not seen[0].any()
    noisy = make_step([]).make_noisy(batch)
    text = torch.stack([item.mean() for item in batch.context]).view(-1, 1, 1, 1, 1)
    bias = step.transformer.mix.bias.view(1, 4, 1, 1, 1)
    prediction = bias + text + noisy.sigma_B.view(-1, 1, 1, 1, 1)
    expected = (prediction - (noisy.noise_BCFHW - batch.latents_BCFHW)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sigma_range_squeezes_or_redraws() -> None:
    sampler = Uniform(Uniform.Config(), BUILD)
    random = torch.Generator().manual_seed(0)
    squeezed = torch.stack(
        [SigmaRange(low=0.8, high=0.9).draw(sampler, random, 1) for _ in range(200)]
    )
    assert squeezed.min() >= 0.8
    assert squeezed.max() <= 0.9
    shape = SigmaRange(low=0.875, high=1.0, preserve_shape=True)
    shift = Shift(Shift.Config(flow_shift=7.0), BUILD)
    drawn = torch.stack([shape.draw(shift, random, 1) for _ in range(300)])
    assert drawn.min() >= 0.875
    # The median of the upper half of the shifted distribution: P(σ ≥ .875) is one half at s = 7.
    assert drawn.median().item() == pytest.approx(0.932, abs=0.01)


def test_a_quantile_of_a_batch_decides_its_sigma() -> None:
    step = make_step([])
    drawn = step.make_noisy(make_batch()).sigma_B
    batch = replace(make_batch(), quantiles=(0.5, None))
    found = step.make_noisy(batch).sigma_B
    # The median of the shifted distribution, 3·½ / (1 + 2·½); the other is drawn as before.
    assert found.tolist() == pytest.approx([0.75, drawn[1].item()])
    half = replace(step.objective, sigmas=SigmaRange(low=0.5, high=1.0))
    step.objective = half
    assert step.make_noisy(batch).sigma_B[0].item() == pytest.approx(0.875)
    step.objective = replace(half, sigmas=SigmaRange(low=0.75, high=1.0, preserve_shape=True))
    # The third quartile of the whole: logit ln 3 + 0.6745.
    odds = 3 * math.exp(0.6744897502)
    assert step.make_noisy(batch).sigma_B[0].item() == pytest.approx(odds / (1 + odds))


def test_samplers_are_told_the_tokens_of_a_frame() -> None:
    class Told(Uniform):
        def sample(self, num: int, generator: torch.Generator, frame_tokens: int) -> Tensor:
            return torch.full((num,), frame_tokens / 100)

    step = make_step([])
    sampler = Told(Told.Config(), BUILD)
    step.objective = replace(step.objective, sampler=sampler)
    batch = replace(make_batch(), latents_BCFHW=torch.zeros(2, 4, 3, 8, 10))
    assert step.make_noisy(batch).sigma_B.tolist() == pytest.approx([0.2, 0.2])
    step.objective = replace(step.objective, patch_size=(1, 1, 1))
    assert step.make_noisy(batch).sigma_B.tolist() == pytest.approx([0.8, 0.8])


def test_the_loss_is_told_sigma() -> None:
    step = make_step([])
    told: list[Tensor] = []

    def loss(prediction: Tensor, target: Tensor, sigma_B: Tensor) -> Tensor:
        told.append(sigma_B)
        return (prediction - target).abs()

    step.objective = replace(step.objective, loss=loss)
    step(make_batch())
    assert torch.equal(told[0], step.make_noisy(make_batch()).sigma_B)
