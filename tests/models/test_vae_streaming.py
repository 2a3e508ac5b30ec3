"""Causality, chunks in time, tiles in space, and what the VAE refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.errors import ConfigError, DataError
from trainer.models.wan.tiny import tiny_vae_config
from trainer.models.wan.vae import WanVAE
from trainer.models.wan.vae_blocks import FrameCache, RMSNorm
from trainer.models.wan.vae_tiling import blend_weights, tile_spans

VERSIONS = ("2.1", "2.2")


@pytest.fixture(scope="module", params=VERSIONS)
def vae(request) -> WanVAE:
    return WanVAE.random(tiny_vae_config(request.param), seed=5).requires_grad_(False)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def random_video(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


@torch.no_grad()
def test_encoding_is_causal(vae):
    video = random_video(1, 3, 13, 32, 32)
    whole = vae.encode(video)
    for latent_frames in (1, 2, 3):
        part = vae.encode(video[:, :, : 4 * latent_frames - 3])
        assert torch.equal(part, whole[:, :, :latent_frames])
    later = video.clone()
    later[:, :, 9:] = 0
    changed = vae.encode(later)
    assert torch.equal(changed[:, :, :3], whole[:, :, :3])
    assert not torch.equal(changed[:, :, 3], whole[:, :, 3])


@torch.no_grad()
def test_decoding_is_causal(vae):
    latents = torch.randn(1, vae.latent_channels, 3, 2, 2)
    whole = vae.decode(latents)
    assert torch.equal(vae.decode(latents[:, :, :2]), whole[:, :, :5])
    assert torch.equal(vae.decode(latents[:, :, :1]), whole[:, :, :1])


@torch.no_grad()
def test_chunks_equal_one_long_chunk(vae):
    video = random_video(1, 3, 13, 32, 32)
    folded = video
    if vae.version == "2.2":
        # pixel_unshuffle orders (channel, row, column), Wan (channel, column, row).
        folded = torch.nn.functional.pixel_unshuffle(video.transpose(1, 2), 2).transpose(1, 2)
        folded = folded.unflatten(1, (3, 2, 2)).transpose(2, 3).flatten(1, 3)
    cache = FrameCache()
    first = vae.encoder(folded[:, :, :1], cache)
    cache.first_chunk = False
    rest = vae.encoder(folded[:, :, 1:], cache)
    moments = vae.conv1(torch.cat([first, rest], dim=2), cache)
    mean, _ = vae.encode_moments(video)
    assert mean.shape[2] == 4
    torch.testing.assert_close(mean, moments.chunk(2, dim=1)[0], atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_decoded_chunks_are_the_video(vae):
    latents = torch.randn(2, vae.latent_channels, 3, 2, 3)
    chunks = list(vae.decode_chunks(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    whole = vae.decode(latents)
    step = vae.stride[1]
    assert whole.shape == (2, 3, 9, 2 * step, 3 * step)
    assert torch.equal(torch.cat(chunks, dim=2), whole)


@torch.no_grad()
def test_memory_between_chunks_does_not_grow(vae):
    held = []
    cache = FrameCache()
    channels = 3 * vae.config.pixel_patch**2
    for frames in (1, 4, 4, 4):
        vae.encoder(torch.randn(1, channels, frames, 16, 16), cache)
        cache.first_chunk = False
        storages = {t.untyped_storage().data_ptr(): t for t in cache._frames.values()}
        held.append(sum(t.untyped_storage().nbytes() for t in storages.values()))
        # Nothing but the frames themselves is kept alive.
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in storages.values())
    assert held[1] == held[2] == held[3]


def test_gradient_mode_does_not_change_the_result(vae):
    video = random_video(1, 3, 5, 32, 32)
    with torch.no_grad():
        expected = vae.encode(video)
        pixels = vae.decode(expected)
    traced = video.requires_grad_()
    latents = vae.encode(traced)
    assert latents.requires_grad
    torch.testing.assert_close(latents.detach(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(vae.decode(latents).detach(), pixels, atol=2e-6, rtol=1e-6)


def test_tiled_encoding_and_decoding_pass_gradients(vae):
    step = vae.stride[1]
    video = random_video(1, 3, 1, 2 * step, 3 * step).requires_grad_()
    latents = vae.encode(video, tile=(2 * step, 2 * step))
    vae.decode(latents, tile=(2 * step, 2 * step)).sum().backward()
    assert video.grad.abs().amin(dim=(0, 1, 2, 3)).gt(0).all()


@torch.no_grad()
def test_half_precision_is_close(vae):
    half = WanVAE(vae.config)
    half.load_state_dict(vae.state_dict())
    half.to(torch.bfloat16)
    video = random_video(1, 3, 5, 32, 32)
    expected = vae.encode(video)
    latents = half.encode(video)
    assert latents.dtype == torch.float32
    assert (latents - expected).norm() / expected.norm() < 0.03
    decoded = half.decode(expected)
    assert decoded.dtype == torch.bfloat16
    reference = vae.decode(expected)
    assert (decoded - reference).norm() / reference.norm() < 0.1


@torch.no_grad()
def test_norm_in_half_precision_rounds_once_per_factor():
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.gamma, mean=1.0)
    # Squares of these overflow float16.
    x = torch.randn(1, 64, 1, 4, 4) * 300
    exact = torch.nn.functional.normalize(x.double(), dim=1) * 8 * norm.gamma.double()
    half = norm.half()(x.half())
    assert half.dtype == torch.float16
    assert ((half - exact).abs() / exact.abs()).max() < 3e-3


@torch.no_grad()
def test_decode_without_clamp_leaves_the_range(vae):
    latents = 8 * torch.randn(1, vae.latent_channels, 2, 4, 4)
    free = vae.decode(latents, clamp=False)
    assert free.abs().max() > 1
    assert torch.equal(free.clamp(-1, 1), vae.decode(latents))


@pytest.mark.parametrize("frames", [2, 3, 4, 6, 8, 12])
def test_other_frame_counts_are_refused(vae, frames):
    with pytest.raises(DataError, match=rf"4 k \+ 1 frames, the video has {frames}"):
        vae.encode(torch.zeros(1, 3, frames, 32, 32))


def test_other_sizes_are_refused(vae):
    step = vae.stride[1]
    with pytest.raises(DataError, match=f"multiples of {step}") as caught:
        vae.encode(torch.zeros(1, 3, 1, 32, 32 + step // 2))
    assert "x32" in caught.value.hint
    with pytest.raises(DataError, match="frames"):
        vae.encode(torch.zeros(1, 3, 0, 32, 32))
    with pytest.raises(DataError, match="batch, 3"):
        vae.encode(torch.zeros(3, 1, 32, 32))


def test_latents_of_the_other_vae_are_refused(vae):
    with pytest.raises(DataError, match="latents of the Wan"):
        vae.decode(torch.zeros(1, 64 - vae.latent_channels, 1, 2, 2))


@torch.no_grad()
def test_a_tile_of_the_whole_frame_is_exact(vae):
    video = random_video(1, 3, 5, 32, 48)
    assert torch.equal(vae.encode(video, tile=(32, 48)), vae.encode(video))
    latents = vae.encode(video)
    assert torch.equal(vae.decode(latents, tile=(64, 48)), vae.decode(latents))


@torch.no_grad()
def test_tiles_far_from_seams_are_exact():
    # 2.1, decoder: a pixel depends on latents less than 16 cells away unless attention mixes more,
    # so take attention out of the comparison.
    vae = WanVAE.random(tiny_vae_config("2.1"), seed=5)
    for coder in (vae.encoder, vae.decoder):
        coder.middle[1].proj.weight.zero_()
    latents = torch.randn(1, 16, 1, 1, 80)
    whole, tiled = vae.decode(latents), vae.decode(latents, tile=(8, 8 * 48))
    spans = tile_spans(80, 48)
    assert spans == [(0, 48), (32, 80)]
    assert torch.allclose(tiled[..., : 8 * 30], whole[..., : 8 * 30], atol=1e-5)
    assert torch.allclose(tiled[..., -8 * 30 :], whole[..., -8 * 30 :], atol=1e-5)
    assert (tiled - whole).abs().max() < 0.5 * whole.abs().max()


def test_tiles_must_fit_the_stride(vae):
    with pytest.raises(ConfigError, match="not a multiple"):
        vae.encode(torch.zeros(1, 3, 1, 32, 32), tile=(20, 32))


@given(st.integers(1, 300), st.integers(1, 64))
def test_weights_of_all_tiles_sum_to_one(size, tile):
    spans = tile_spans(size, tile)
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(end - start == min(tile, size) for start, end in spans)
    total = torch.zeros(size, dtype=torch.float64)
    for (start, end), weight in zip(spans, blend_weights(spans, size, torch.float64), strict=True):
        assert (weight > 0).all()
        total[start:end] += weight
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)


@given(st.integers(9, 200), st.integers(8, 64))
def test_neighbouring_tiles_share_a_quarter(size, tile):
    spans = tile_spans(size, tile)
    for (_, end), (start, _) in pairwise(spans):
        assert end - start >= round(tile * 0.25) - 1
