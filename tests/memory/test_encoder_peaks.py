"""What the VAEs and the text encoder take, against the real ones on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from memory_oracle import Peak, make_fake, watched
from torch import Tensor

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip
from trainer.contract.variants import get_variant
from trainer.models.wan import vae_blocks
from trainer.models.wan.text_encoder import TextEncoderConfig, build_umt5
from trainer.models.wan.vae import WanVAE
from trainer.models.wan.vae_config import VAE_21, VAE_22

VAES = {"2.1": ("wan2.1-t2v-1.3b", VAE_21), "2.2": ("wan2.2-ti2v-5b", VAE_22)}


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int],
    padding: tuple[int, int],
) -> Tensor:
    """Convolve as on a GPU: the CPU has a way of its own."""
    return F.conv3d(x, weight, bias, stride=stride, padding=(0, *padding))


def lengths(x: Tensor) -> Tensor:
    """Return the lengths of channel vectors as on a GPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with (
        patch.object(vae_blocks, "_conv", convolve),
        patch.object(vae_blocks, "_channel_lengths", lengths),
    ):
        yield


def vae_peak(version: str, clip: Clip, direction: str, dtype: torch.dtype) -> tuple[int, Peak]:
    """Return the bytes of the weights, and the peak of one direction."""
    config = VAES[version][1]
    with watched() as live, torch.inference_mode():
        with torch.device("meta"):
            vae = WanVAE(config)
        make_fake(vae, lambda _name: dtype)
        vae.eval().requires_grad_(False)
        weights = live.now
        if direction == "encode":
            video = torch.empty(1, 3, clip.num_frames, clip.height, clip.width)
            size = video.untyped_storage().nbytes()
            live.start()
            vae.encode(video)
            live.peak.num_bytes -= size  # it waits in host memory
        else:
            stride = config.stride[1]
            frames = (clip.num_frames - 1) // 4 + 1
            latents = torch.empty(
                1, config.z_dim, frames, clip.height // stride, clip.width // stride
            )
            live.start()
            for _ in vae.decode_chunks(latents):
                pass
        return weights, live.peak


@pytest.mark.slow
@pytest.mark.parametrize("version", VAES)
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("frames", [1, 9, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vae_peaks(version: str, direction: str, frames: int, dtype: torch.dtype) -> None:
    variant = get_variant(VAES[version][0])
    clip = Clip(width=832, height=480, num_frames=frames)
    weights, peak = vae_peak(version, clip, direction, dtype)
    assert encoders.vae_bytes(variant, dtype.itemsize) == pytest.approx(weights, rel=0.001)
    work = encoders.vae_work_bytes(variant, clip, direction, element=dtype.itemsize, tile=None)
    assert weights + work == pytest.approx(peak.num_bytes, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [128, 512])
def test_text_encoder_peak(tokens: int) -> None:
    with watched() as live, torch.no_grad():
        with torch.device("meta"):
            model = build_umt5(TextEncoderConfig(num_layers=2))
        make_fake(model, lambda _name: torch.bfloat16)
        before = live.now
        live.start()
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    work = live.peak.num_bytes - before
    assert encoders.text_encoding_bytes(tokens, 2) == pytest.approx(work, rel=0.05)


def test_text_encoder_size() -> None:
    with torch.device("meta"):
        model = build_umt5(TextEncoderConfig())
    assert sum(p.numel() for p in model.parameters()) == encoders.UMT5_PARAMETERS


def test_image_encoder_size() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
    )
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == pytest.approx(encoders.CLIP_PARAMETERS, rel=0.01)
