"""The fit of the nano VAE: how it starts, that it can be interrupted, what it ends with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.clipart.scenes import Scene, draw
from trainer.clipart.split import training_scene
from trainer.nano import vae_training
from trainer.nano.vae_training import Phase, VAEFit, as_video, psnr

STEPS = 6
PHASES = (Phase(0.5, 1, 16, 2), Phase(1.0, 5, 16, 1))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_training, "PHASES", PHASES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(1)
    return [training_scene(rng) for _ in range(2)]


def video_of(scene: Scene, num_frames: int = 9) -> Tensor:
    return as_video(draw(scene, num_frames)).unsqueeze(0)


def test_pixels_become_numbers_between_minus_one_and_one():
    frames = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    frames[1, 2, 3] = (0, 51, 255)
    video = as_video(frames)
    assert video.dtype == torch.float32
    assert video.shape == (3, 2, 4, 6)
    torch.testing.assert_close(video[:, 1, 2, 3], torch.tensor([-1.0, -0.6, 1.0]))
    assert (video[:, 0] == -1).all()


def test_before_training_every_frame_is_treated_alone(scenes):
    vae = VAEFit(STEPS, 0).vae
    video = video_of(scenes[0])
    with torch.no_grad():
        latents = vae.encode(video)
        # A latent shows the last of its four frames.
        for index in range(3):
            alone = vae.encode(video[:, :, 4 * index : 4 * index + 1])
            torch.testing.assert_close(latents[:, :, index : index + 1], alone)
        decoded = vae.decode(latents, clamp=False)
        for index in range(3):
            alone = vae.decode(latents[:, :, index : index + 1], clamp=False)
            start = max(0, 4 * index - 3)
            part = decoded[:, :, start : 4 * index + 1]
            torch.testing.assert_close(part, alone.expand_as(part))
    assert not torch.allclose(latents[:, :, 0], latents[:, :, 2])


def test_training_lets_frames_know_of_one_another(short, scenes):
    fit = VAEFit(STEPS, 0)
    while fit.step < STEPS:
        fit.advance()
    video = video_of(scenes[0])
    with torch.no_grad():
        latents, alone = fit.vae.encode(video), fit.vae.encode(video[:, :, 8:])
    assert not torch.allclose(latents[:, :, 2:], alone)


def test_the_first_noise_is_small():
    fit = VAEFit(STEPS, 0)
    with torch.no_grad():
        _, log_variance = fit.vae.encode_moments(torch.zeros(1, 3, 1, 16, 16))
    assert log_variance.mean().item() == pytest.approx(-4, abs=1.5)


def test_an_interrupted_fit_goes_on_bit_for_bit(short, tmp_path):
    whole, first = VAEFit(STEPS, 3), VAEFit(STEPS, 3)
    errors = [whole.advance() for _ in range(STEPS)]
    for _ in range(2):
        first.advance()
    torch.save(first.state(), tmp_path / "state.pt")
    torch.manual_seed(99)
    second = VAEFit(STEPS, 3)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == 2
    assert [second.advance() for _ in range(STEPS - 2)] == errors[2:]
    expected, found = whole.vae.state_dict(), second.vae.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_seed_decides(short):
    errors = {VAEFit(STEPS, seed).advance() for seed in (0, 0, 1)}
    assert len(errors) == 2


def test_a_few_steps_lower_the_error(monkeypatch):
    monkeypatch.setattr(vae_training, "PHASES", (Phase(1.0, 1, 16, 8),))
    fit = VAEFit(60, 0)
    errors = [fit.advance() for _ in range(60)]
    assert np.mean(errors[-10:]) < 0.6 * np.mean(errors[:10])


def test_latents_are_normalised_in_the_end_and_decoded_as_before(short, scenes, monkeypatch):
    fit = VAEFit(STEPS, 0)
    videos = [video_of(scene, 17) for scene in scenes]
    with torch.no_grad():
        before = fit.vae.decode(fit.vae.normalise(fit.vae.encode_moments(videos[0])[0]))

    known: Iterator[Scene] = cycle(scenes)
    monkeypatch.setattr(vae_training, "training_scene", lambda *_: next(known))
    vae = fit.finished(num_clips=2)
    with torch.no_grad():
        latents = torch.cat([vae.encode(video) for video in videos])
        after = vae.decode(vae.encode(videos[0]))
    rows = latents.double().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(rows.std(axis=1, ddof=1), 1, atol=1e-4)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert not vae.training


def test_psnr_by_numpy(scenes):
    videos = [as_video(draw(scene)) for scene in scenes]
    changed = [np.clip(0.9 * video.numpy().astype(np.float64), -1, 1) for video in videos]
    errors = [(c - v.numpy()) ** 2 for c, v in zip(changed, videos, strict=True)]
    expected = 20 * math.log10(2) - 10 * math.log10(np.mean(errors))
    found = psnr(videos, lambda video: (0.9 * video).clamp(-1, 1))
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_released_recipe_ends_with_whole_pictures():
    assert vae_training.PHASES[-1].until == 1
    assert vae_training.PHASES[-1].size == 64
    assert all(phase.num_frames % 4 == 1 for phase in vae_training.PHASES)
