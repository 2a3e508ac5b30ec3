"""Techniques that change the noise: what they keep of it, and what they change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.contract.catalog import TECHNIQUES
from trainer.contract.config import RunConfig, load_config
from trainer.contract.errors import ConfigError
from trainer.contract.objective_rules import noise_rule
from trainer.contract.variants import VARIANTS
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, Technique
from trainer.core.types import Batch, NoisyInput
from trainer.jobs.build import technique_problems

NAMES = ("immiscible_noise", "noise_offset", "pyramid_noise")


def make(name: str, seed: int = 7, **options: Any) -> Technique:
    build = BuildContext(
        variant=VARIANTS["wan2.1-t2v-1.3b"],
        seed=seed,
        device=torch.device("cpu"),
        total_steps=1,
    )
    implementation: Any = TECHNIQUES.load(name)
    return implementation(implementation.Config(**options), build)


def batch_of(*seeds: int, size: tuple[int, ...] = (4, 3, 8, 10)) -> tuple[Batch, NoisyInput]:
    latents = torch.stack([torch.randn(size, generator=generator(0, "clip", s)) for s in seeds])
    noise = torch.stack([torch.randn(size, generator=generator(0, "own", s)) for s in seeds])
    sigma = torch.linspace(0.2, 0.8, len(seeds))
    return Batch(latents_BCFHW=latents, context=(), item_seeds=seeds), NoisyInput.mix(
        latents, noise, sigma
    )


def edited(technique: Technique, batch: Batch, noisy: NoisyInput) -> NoisyInput:
    return technique.edit_noisy(noisy, batch, generator(0, "any"))


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_mixed_with_the_new_noise_whatever_the_batch(name: str) -> None:
    technique = make(name)
    batch, noisy = batch_of(5, 6, 7)
    found = edited(technique, batch, noisy)
    assert torch.equal(found.sigma_B, noisy.sigma_B)
    assert not torch.equal(found.noise_BCFHW, noisy.noise_BCFHW)
    sigma = noisy.sigma_B.view(-1, 1, 1, 1, 1)
    mixed = (1 - sigma) * batch.latents_BCFHW + sigma * found.noise_BCFHW
    assert torch.equal(found.noisy_latents_BCFHW, mixed)
    alone = edited(technique, *batch_of(6))
    assert torch.equal(found.noise_BCFHW[1], alone.noise_BCFHW[0])
    assert torch.equal(found.noise_BCFHW, edited(make(name), batch, noisy).noise_BCFHW)
    assert not torch.equal(found.noise_BCFHW, edited(make(name, 8), batch, noisy).noise_BCFHW)


def noises(name: str, size: tuple[int, ...], num: int, **options: Any) -> Tensor:
    """Return the noises of many items."""
    return edited(make(name, **options), *batch_of(*range(num), size=size)).noise_BCFHW.double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("noise_offset", {"strength": 1.0}),
        ("noise_offset", {"strength": 0.5, "per_frame": True}),
        ("pyramid_noise", {"discount": 0.9}),
        ("pyramid_noise", {"discount": 0.7, "num_levels": 2}),
    ],
)
def test_every_number_stays_standard_normal(name: str, options: dict[str, Any]) -> None:
    found = noises(name, (2, 2, 5, 7), 3000, **options)
    # Place by place, over items: mean 0, variance 1, fourth moment 3, to five standard errors.
    assert found.mean(0).abs().max() < 5 / math.sqrt(3000)
    assert (found.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 3000)
    assert (found**4).mean().item() == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_an_offset_is_shared_by_a_channel(strength: float, per_frame: bool) -> None:
    found = noises("noise_offset", (2, 2, 4, 4), 2000, strength=strength, per_frame=per_frame)
    shared = strength**2 / (1 + strength**2)
    limit = 0.04
    one, other = found[:, 0, 0, 0, 0], found[:, 0, 0, 3, 2]
    assert (one * other).mean().item() == pytest.approx(shared, abs=limit + 0.03)
    next_frame = found[:, 0, 1].mean((1, 2)) * found[:, 0, 0].mean((1, 2))
    assert next_frame.mean().item() == pytest.approx(0 if per_frame else shared, abs=limit)
    next_channel = found[:, 0].mean((1, 2, 3)) * found[:, 1].mean((1, 2, 3))
    assert next_channel.mean().item() == pytest.approx(0, abs=limit)


@pytest.mark.parametrize(("levels", "sizes"), [(1, [(3, 4)]), (6, [(3, 4), (1, 2), (1, 1)])])
def test_pyramid_noise_has_the_covariance_of_its_levels(
    levels: int, sizes: list[tuple[int, int]]
) -> None:
    num, discount = 1200, 0.8
    found = noises("pyramid_noise", (1, 2, 6, 8), num, discount=discount, num_levels=levels)
    flat, next_frame = found[:, 0].flatten(2).unbind(1)
    covariance, variance = torch.eye(48, dtype=torch.float64), 1.0
    for level, (rows, columns) in enumerate(sizes, start=1):
        # Each point of the coarse grid on its own, enlarged: what every place has of it.
        points = torch.eye(rows * columns, dtype=torch.float64).view(-1, 1, rows, columns)
        parts = torch.nn.functional.interpolate(points, size=(6, 8), mode="bilinear")
        parts = parts.flatten(1) / parts.flatten(1).norm(dim=0)
        covariance += discount ** (2 * level) * parts.T @ parts
        variance += discount ** (2 * level)
    limit = 5.5 / math.sqrt(num)
    assert torch.allclose(flat.T @ flat / num, covariance / variance, atol=limit)
    assert (flat.T @ next_frame / num).abs().max() < limit


def test_the_nearest_of_the_noises_is_taken() -> None:
    batch, noisy = batch_of(5, 6)
    found = edited(make("immiscible_noise", num_candidates=8), batch, noisy)
    for row, seed in enumerate(batch.item_seeds):
        random = generator(7, "immiscible noise", seed)
        latents = batch.latents_BCFHW[row].double()
        candidates = [noisy.noise_BCFHW[row]]
        candidates += [torch.randn(latents.shape, generator=random) for _ in range(7)]
        products = [(latents * noise.double()).sum() for noise in candidates]
        best = max(range(8), key=lambda number: products[number].item())
        assert torch.equal(found.noise_BCFHW[row], candidates[best])


def test_more_candidates_lie_nearer_and_keep_their_length() -> None:
    size = (4, 2, 6, 6)
    means = {}
    for num in (2, 4, 16):
        batch, noisy = batch_of(*range(600), size=size)
        noise = edited(make("immiscible_noise", num_candidates=num), batch, noisy).noise_BCFHW
        assert noise.var().item() == pytest.approx(1, abs=0.02)
        lengths = batch.latents_BCFHW.flatten(1).norm(dim=1)
        along = (batch.latents_BCFHW * noise).flatten(1).sum(1) / lengths
        means[num] = along.mean().item()
    # The largest of k standard normals, on average.
    assert means == pytest.approx({2: 0.5642, 4: 1.0294, 16: 1.7660}, abs=0.12)


def noises_of(batch: Batch, noisy: NoisyInput, num: int) -> list[Tensor]:
    """Return the noises that a batch chooses from."""
    found = list(noisy.noise_BCFHW)
    for seed in batch.item_seeds:
        random = generator(7, "immiscible noise", seed)
        shape = noisy.noise_BCFHW.shape[1:]
        found += [torch.randn(shape, generator=random) for _ in range(num - 1)]
    return found


@pytest.mark.parametrize("num", [1, 2])
def test_the_noises_of_a_batch_are_dealt_out_at_the_least_distance(num: int) -> None:
    batch, noisy = batch_of(5, 6, 8, 9)
    technique = make("immiscible_noise", assignment="batch", num_candidates=num)
    found = edited(technique, batch, noisy)
    candidates = noises_of(batch, noisy, num)

    def total(chosen: Sequence[int]) -> float:
        pairs = zip(batch.latents_BCFHW, chosen, strict=True)
        return sum((latents.double() * candidates[c]).sum().item() for latents, c in pairs)

    best = max(itertools.permutations(range(len(candidates)), 4), key=total)
    for row, place in enumerate(best):
        assert torch.equal(found.noise_BCFHW[row], candidates[place])
    assert torch.equal(
        found.noisy_latents_BCFHW,
        NoisyInput.mix(batch.latents_BCFHW, found.noise_BCFHW, noisy.sigma_B).noisy_latents_BCFHW,
    )
    if num == 1:  # the paper's distance says the same

        def distance(chosen: Sequence[int]) -> float:
            pairs = zip(batch.latents_BCFHW, chosen, strict=True)
            return sum((x.double() - candidates[c]).square().sum().item() for x, c in pairs)

        assert min(itertools.permutations(range(4)), key=distance) == best
        assert not torch.equal(found.noise_BCFHW, noisy.noise_BCFHW)


def test_one_noise_each_needs_a_batch() -> None:
    section = {"name": "immiscible_noise", "num_candidates": 1}
    alone = RunConfig.model_validate({"techniques": [section]})
    (problem,) = noise_rule(alone)
    assert problem.key == "techniques[0].num_candidates"
    assert "nothing to choose from" in problem.message
    config = RunConfig.model_validate({"techniques": [{**section, "assignment": "batch"}]})
    (problem,) = technique_problems(config, 1)
    assert "every batch has one" in problem.message
    assert not technique_problems(config, 2)
    assert not list(noise_rule(config))


def test_bf16_latents_and_small_frames_are_fine() -> None:
    for name in NAMES:
        batch, noisy = batch_of(1, size=(2, 1, 1, 1))
        found = edited(
            make(name), replace(batch, latents_BCFHW=batch.latents_BCFHW.bfloat16()), noisy
        )
        assert found.noisy_latents_BCFHW.dtype == torch.float32
        assert torch.isfinite(found.noisy_latents_BCFHW).all()


@pytest.mark.parametrize("before", ["noise_offset", "pyramid_noise"])
def test_candidates_are_plain_noises(tmp_path: Path, before: str) -> None:
    path = tmp_path / "c.toml"
    parts = [f'[[techniques]]\nname = "{name}"\n' for name in (before, "immiscible_noise")]
    path.write_text("".join(parts))
    with pytest.raises(ConfigError) as found:
        load_config(path)
    (problem,) = found.value.problems
    assert (problem.key, problem.hint) == (
        "techniques[1]", f"put immiscible_noise in front of {before}"
    )  # fmt: skip
    path.write_text("".join(reversed(parts)))
    assert [one.name for one in load_config(path).techniques] == ["immiscible_noise", before]
