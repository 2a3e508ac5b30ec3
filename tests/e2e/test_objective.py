"""Options of `[objective]` in whole runs: what is drawn, and what the loss is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.variant_project import (
    HEADS,
    VariantProject,
    base_config,
    write_clips,
    write_models,
)
from trainer.models import load_transformer

pytestmark = pytest.mark.slow


def make_project(folder: Path, variant: str, **model: Any) -> VariantProject:
    section = write_models(folder, variant, "comfy") | model
    write_clips(folder / "clips", 3, 5, 64, 32)
    sources = [{"video_directory": "clips", "target_frames": [5], "num_repeats": 2}]
    config = base_config(section, {"general": {"resolution": [64, 32]}, "sources": sources})
    config["distributed"] = {"engine": "local", "device": "cpu"}
    if "expert" in model:
        config["experts"] = {"steps_per_turn": 3, "high_noise_share": 0.5}
    project = VariantProject(folder, config)
    project.cache()
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> VariantProject:
    return make_project(tmp_path_factory.mktemp("objective"), "wan2.1-t2v-1.3b")


def sigmas(done: Any) -> list[float]:
    return [value for noisy, _ in done.steps for value in noisy.sigma_B.double().tolist()]


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_the_loss_is_the_formula_of_all_that_is_chosen(project: VariantProject) -> None:
    objective = {
        "timestep_sampler": "flux_shift", "sigmoid_scale": 1.5, "num_timestep_buckets": "epoch",
        "loss": "pseudo_huber", "huber_schedule": "exponential", "huber_delta": 0.9,
        "huber_delta_noise": 0.2, "weighting": "min_snr", "min_snr_gamma": 2.0,
    }  # fmt: skip
    noises = [
        {"name": "immiscible_noise", "num_candidates": 3},
        {"name": "pyramid_noise"},
        {"name": "noise_offset", "strength": 0.3},
    ]
    done = project.train("all", objective=objective, techniques=noises, training__max_steps=12)
    plain = project.train("plain", training__max_steps=1)

    # Two epochs of six items: each meets each sixth of the distribution once. The shift of frames
    # of 4·2 tokens is e^μ with μ = 0.5 + 0.65·(8 - 256) / 3840.
    shift = 0.5 + 0.65 * (8 - 256) / 3840
    shares = [normal_cdf((math.log(s / (1 - s)) - shift) / 1.5) for s in sigmas(done)]
    for epoch in (shares[:6], shares[6:]):
        assert sorted(int(6 * share) for share in epoch) == list(range(6))

    (noisy, batch), event = done.steps[0], done.of("step")[0]
    assert not torch.allclose(noisy.noise_BCFHW, plain.steps[0][0].noise_BCFHW)
    sigma = noisy.sigma_B.double().item()
    expected_mix = (1 - sigma) * batch.latents_BCFHW + sigma * noisy.noise_BCFHW
    torch.testing.assert_close(noisy.noisy_latents_BCFHW, expected_mix.float())
    model = load_transformer(
        project.folder / project.config["model"]["transformer"], config={"num_heads": HEADS}
    )
    with torch.no_grad():
        velocity = model(noisy.noisy_latents_BCFHW, 1000 * noisy.sigma_B, batch.context)
    error = velocity.double() - (noisy.noise_BCFHW - batch.latents_BCFHW).double()
    delta = 0.9 ** (1 - sigma) * 0.2**sigma
    loss = (2 * delta * ((error**2 + delta**2).sqrt() - delta)).mean().item()
    cells = 100_000
    mean = sum(min((1 - s) ** 2, 2 * s * s) for s in ((c + 0.5) / cells for c in range(cells)))
    weight = min((1 - sigma) ** 2, 2 * sigma**2) / (mean / cells)
    assert event["loss"] == pytest.approx(weight * loss, rel=1e-4)


def test_buckets_go_on_after_a_stop(project: VariantProject) -> None:
    options: dict[str, Any] = {"objective__num_timestep_buckets": 4, "training__max_steps": 5}
    whole = project.train("whole", **options)
    project.run("parts").request("stop")
    first = project.train("parts", may_fail=True, **options)
    assert first.code == 130
    rest = project.train("parts", **options)
    assert sigmas(first) + sigmas(rest) == sigmas(whole)
    ours, theirs = (load_file(project.output(name)) for name in ("parts", "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_two_experts_each_meet_all_parts_of_their_own_range(tmp_path: Path) -> None:
    project = make_project(tmp_path, "wan2.2-t2v-a14b", expert="both")
    objective = {
        "timestep_sampler": "qinglong_flux", "noisy_share": 0.3, "num_timestep_buckets": 3,
        "preserve_distribution_shape": True, "loss": "l1", "weighting": "cosmap",
    }  # fmt: skip
    done = project.train(
        "both",
        objective=objective,
        techniques=[{"name": "immiscible_noise"}, {"name": "noise_offset"}],
        training__max_steps=12,
    )
    found = sigmas(done)
    high, low = found[:3] + found[6:9], found[3:6] + found[9:]
    assert min(high) >= 0.875 > max(low)
    tokens_shift = 0.5 + 0.65 * (8 - 256) / 3840

    def below(s: float) -> float:
        logit = math.log(s / (1 - s))
        mixed = (
            normal_cdf(logit - tokens_shift),
            normal_cdf(logit - 3),
            normal_cdf(2 * logit + 5.36),
        )
        return 0.6 * mixed[0] + 0.3 * mixed[1] + 0.1 * mixed[2]

    boundary = below(0.875)
    for values, start, end in ((high, boundary, 1.0), (low, 0.0, boundary)):
        parts = Counter(int(3 * (below(value) - start) / (end - start)) for value in values)
        assert parts == {0: 2, 1: 2, 2: 2}
    assert math.isfinite(done.of("step")[-1]["loss"])
