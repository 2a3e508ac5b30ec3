"""Masks and conditioning channels against the formulas of the Wan repositories."""

from __future__ import annotations

import pytest
import torch
from sampling_fakes import FakeVae

from trainer.models.wan.conditioning import (
    first_frame_timestep,
    frame_mask,
    image_conditioning,
    keep_first_frame,
)


@pytest.mark.parametrize(
    ("num_frames", "last"),
    [(1, False), (5, False), (81, False), (5, True), (17, True), (81, True)],
)
def test_mask_is_the_repositories_construction(num_frames: int, last: bool) -> None:
    # Wan repository, i2v and flf2v: per pixel frame, first one four times, then cut into fours.
    mask = torch.ones(1, num_frames, 1, 1)
    mask[:, 1 : -1 if last else None] = 0
    mask = torch.cat([torch.repeat_interleave(mask[:, 0:1], repeats=4, dim=1), mask[:, 1:]], dim=1)
    expected = mask.view(1, mask.shape[1] // 4, 4, 1, 1).transpose(1, 2)[0, :, :, 0, 0]
    assert torch.equal(frame_mask(num_frames, last=last), expected)


def test_the_whole_padded_clip_is_encoded() -> None:
    with torch.no_grad():
        channels = image_conditioning(FakeVae(), torch.full((2, 3, 16, 24), 0.5), 9)
    assert channels.shape == (2, 20, 3, 2, 3)
    # FakeVae adds 0.1 even to grey: zeros in the place of encoded grey would show.
    torch.testing.assert_close(channels[0, 4, :, 0, 0], torch.tensor([0.6, 0.1, 0.1]))


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="size"):
        image_conditioning(
            FakeVae(), torch.zeros(1, 3, 16, 16), 5, last_image_B3HW=torch.zeros(1, 3, 16, 24)
        )


def test_timesteps_per_token() -> None:
    timestep = first_frame_timestep(torch.tensor([900.0, 5.0]), (3, 4, 6), (1, 2, 2))
    assert timestep.shape == (2, 3 * 2 * 3)
    mask = torch.ones(3, 4, 6)
    mask[0] = 0
    for row, value in zip(timestep, (900.0, 5.0), strict=True):
        assert torch.equal(row, (mask[:, ::2, ::2] * value).flatten())  # the repository's way


def test_first_frame_is_replaced_without_touching_the_original() -> None:
    latents = torch.zeros(1, 2, 3, 2, 2)
    kept = keep_first_frame(latents, torch.ones(1, 2, 1, 2, 2))
    assert kept[:, :, 0].min() == 1
    assert kept[:, :, 1:].max() == 0
    assert latents.max() == 0
