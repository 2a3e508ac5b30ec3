"""Where a walk begins, and that solvers with more than one evaluation or own noise are served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_fakes import FakeImageEncoder, FakeTransformer, FakeVae

from trainer.contract.catalog import SOLVERS
from trainer.contract.config import Prompt
from trainer.contract.variants import get_variant
from trainer.core.flow import add_noise
from trainer.sampling.conditions import encode_files
from trainer.sampling.pipeline import Expert, SamplingModels, generate, initial_noise
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import walk_of
from trainer.sampling.video_io import write_frames

T2V = "wan2.1-t2v-1.3b"
SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_steps": 6}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    write_frames(tmp_path / "clip", pixels)
    return tmp_path / "clip"


class Drawn:
    """Fake models of a variant, and what they were asked."""

    def __init__(self, variant: str) -> None:
        self.variant = get_variant(variant)
        self.transformer = FakeTransformer()
        self.experts: list[Expert] = []
        self.steps: list[tuple[int, int]] = []

    @property
    def timesteps(self) -> list[float]:
        """Of the calls with the prompt."""
        calls = [call for call in self.transformer.calls if call["context"].mean() > 0]
        return [float(call["timestep"].max()) for call in calls]

    def request(self, **fields: object) -> SampleRequest:
        return SampleRequest.of(Prompt(prompt="a cat", **(SMALL | fields)), self.variant)

    def __call__(self, request: SampleRequest) -> torch.Tensor:
        def transformer(expert: Expert) -> FakeTransformer:
            self.experts.append(expert)
            return self.transformer

        texts = {"a cat": torch.ones(3, 8), request.negative_prompt: torch.zeros(2, 8)}
        models = SamplingModels(
            variant=self.variant,
            transformer=transformer,
            contexts=texts,
            vae=FakeVae(self.variant.vae_stride, self.variant.latent_channels),
            image_encoder=FakeImageEncoder(),
        )
        return generate(models, request, on_step=lambda *done: self.steps.append(done))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_video_is_noised_to_where_the_walk_begins(clip: Path, strength: float) -> None:
    drawn = Drawn(T2V)
    request = drawn.request(video=clip, strength=strength)
    drawn(request)
    walk = walk_of(request)
    assert walk.num_steps == 6 * strength
    assert drawn.timesteps == walk.timesteps.tolist()
    with torch.no_grad():
        clean = encode_files(request, drawn.variant, FakeVae(), None).start_latents_BCFHW
    noise = initial_noise(request, drawn.variant)
    expected = add_noise(clean, noise, walk.sigmas[:1])
    torch.testing.assert_close(drawn.transformer.calls[0]["latents"], expected)


def test_less_strength_stays_nearer_to_the_video(clip: Path) -> None:
    far = []
    for strength in (0.2, 0.5, 0.8, 1.0):
        drawn = Drawn(T2V)
        request = drawn.request(video=clip, strength=strength, solver="euler", flow_shift=1.0)
        with torch.no_grad():
            clean = encode_files(request, drawn.variant, FakeVae(), None).start_latents_BCFHW
        far.append(float((drawn(request) - clean).square().mean()))
    assert far == sorted(far)


def test_the_expert_that_begins_follows_from_the_sigma(clip: Path) -> None:
    for strength, expected in ((1.0, {"high_noise", "low_noise"}), (0.5, {"low_noise"})):
        drawn = Drawn("wan2.2-t2v-a14b")
        request = drawn.request(video=clip, strength=strength, flow_shift=2.0)
        drawn(request)
        assert set(drawn.experts) == expected
        assert (drawn.timesteps[0] >= 875) is (len(expected) == 2)


def test_a_first_frame_is_held_beside_a_video(clip: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (250, 10, 90)).save(tmp_path / "first.png")
    drawn = Drawn("wan2.2-ti2v-5b")
    request = drawn.request(image=tmp_path / "first.png", video=clip, strength=0.5)
    result = drawn(request)
    vae = FakeVae(drawn.variant.vae_stride, drawn.variant.latent_channels)
    first = encode_files(request, drawn.variant, vae, None).first_latents_BC1HW
    assert torch.equal(result[:, :, :1], first)
    drawn = Drawn("wan2.1-i2v-14b")
    drawn(drawn.request(image=tmp_path / "first.png", video=clip, strength=0.5))
    assert all(call["extra_channels"] is not None for call in drawn.transformer.calls)
    assert len(drawn.timesteps) == 3


def test_an_image_is_started_from_as_well(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (250, 10, 90)).save(tmp_path / "i.png")
    drawn = Drawn(T2V)
    assert drawn(drawn.request(video=tmp_path / "i.png", num_frames=1)).shape[2] == 1


@pytest.mark.parametrize("solver", SOLVERS.names)
def test_every_solver_repeats_and_reports_its_evaluations(solver: str) -> None:
    drawn = Drawn(T2V)
    request = drawn.request(solver=solver)
    first = drawn(request)
    evaluations = 11 if solver == "heun" else 6
    assert drawn.steps == [(done, evaluations) for done in range(1, evaluations + 1)]
    assert len(drawn.timesteps) == evaluations
    assert torch.equal(drawn(request), first)
    other = replace(request, seed=request.seed + 1)
    assert not torch.equal(drawn(other), first)


def test_the_noise_that_lcm_adds_is_not_the_noise_it_starts_from() -> None:
    drawn = Drawn(T2V)
    request = drawn.request(solver="lcm", num_steps=2, guidance_scale=1.0)
    drawn(request)
    noise = initial_noise(request, drawn.variant)
    before, after = (call["latents"] for call in drawn.transformer.calls)
    torch.testing.assert_close(before, noise)
    sigma = walk_of(request).sigmas[1]
    velocity = torch.sin(before + 1000 / 700) + 1
    added = (after - (1 - sigma) * (before - velocity)) / sigma
    generator = torch.Generator().manual_seed(request.seed)
    torch.randn(noise.shape, generator=generator)
    torch.testing.assert_close(
        added, torch.randn(noise.shape, generator=generator), atol=1e-4, rtol=0
    )
