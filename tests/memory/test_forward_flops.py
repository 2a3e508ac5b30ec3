"""Operations of all models' forwards, against torch's own counter on the real modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainer.contract.memory_model import encoders
from trainer.contract.memory_model.clips import Clip
from trainer.contract.memory_model.forwards import forward_flops, image_flops, text_flops
from trainer.contract.memory_model.vae_flops import VAE_SHAPES, VaeShape, shape_flops, vae_flops
from trainer.contract.variants import VARIANTS, get_variant
from trainer.models.wan import vae_config
from trainer.models.wan.image_encoder import ImageEncoderConfig, build_clip_vision
from trainer.models.wan.text_encoder import TextEncoderConfig, build_umt5
from trainer.models.wan.tiny import tiny_vae_config
from trainer.models.wan.transformer import WanTransformer
from trainer.models.wan.vae import WanVAE
from trainer.models.wan.vae_config import VAEConfig
from trainer.models.wan.vae_tiling import tile_spans


@contextmanager
def counting(device: str = "meta") -> Iterator[FlopCounterMode]:
    """Count operations; on the meta device nothing is computed, so sizes may be the real ones."""
    # The counter knows no attention but the one that is written in products.
    with (
        torch.no_grad(),
        torch.device(device),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        yield counter


def shape_of(config: VAEConfig) -> VaeShape:
    return VaeShape(
        grouped=config.version == "2.2",
        encoder_dim=config.base_dim,
        decoder_dim=config.decoder_base_dim,
        latent_channels=config.z_dim,
        pixel_patch=config.pixel_patch,
    )


def count_vae(vae: WanVAE, direction: str, size: tuple[int, int], chunks: int, device: str) -> int:
    height, width = size
    stride = vae.stride[1]
    with counting(device) as counter:
        if direction == "encode":
            vae.encode_moments(torch.zeros(1, 3, 4 * chunks - 3, height * stride, width * stride))
        else:
            for _ in vae.decode_chunks(torch.zeros(1, vae.latent_channels, chunks, height, width)):
                pass
    return int(counter.get_total_flops())


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_a_tiny_vae_computes_what_is_counted(version, direction, chunks):
    config = tiny_vae_config(version)
    vae = WanVAE.random(config).eval()
    found = count_vae(vae, direction, (6, 4), chunks, "cpu")
    assert shape_flops(shape_of(config), 6, 4, chunks, direction) == found


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b"])
def test_the_released_vaes_compute_what_is_counted(name, direction):
    variant = get_variant(name)
    config = {"2.1": vae_config.VAE_21, "2.2": vae_config.VAE_22}[variant.vae]
    assert VAE_SHAPES[variant.vae] == shape_of(config)
    with torch.device("meta"):
        vae = WanVAE(config)
    step = variant.vae_stride[1]
    found = count_vae(vae, direction, (12, 20), 4, "meta")
    clip = Clip(width=20 * step, height=12 * step, num_frames=13)
    assert vae_flops(variant, clip, direction) == found


@pytest.mark.parametrize("cells", range(8, 70, 11))
@pytest.mark.parametrize("tile", [8, 16, 32])
def test_tiles_are_as_many_as_the_vae_makes(cells, tile):
    variant = get_variant("wan2.1-t2v-14b")
    clip = Clip(width=8 * cells, height=8 * tile, num_frames=1)
    one = Clip(width=8 * min(tile, cells), height=8 * tile, num_frames=1)
    found = vae_flops(variant, clip, "encode", tile=8 * tile)
    tiles = found / vae_flops(variant, one, "encode")
    assert tiles == pytest.approx(len(tile_spans(cells, tile)))


def test_umt5_computes_what_is_counted():
    config = TextEncoderConfig()
    assert (config.num_layers, config.dim, config.ffn_dim, config.num_heads) == (
        encoders.UMT5_LAYERS,
        encoders.UMT5_DIM,
        encoders.UMT5_FFN,
        encoders.UMT5_HEADS,
    )
    with torch.device("meta"):
        model = build_umt5(config).eval()
    table = model.shared.weight.numel()
    assert table == encoders.UMT5_TABLE_PARAMETERS
    for tokens in (77, 512):
        with counting() as counter:
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        assert text_flops(tokens) == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_clip_computes_what_is_counted():
    with torch.device("meta"):
        model = build_clip_vision(ImageEncoderConfig()).eval()
    with counting() as counter:
        model(pixel_values=torch.zeros(1, 3, 224, 224), output_hidden_states=True)
    assert image_flops() == pytest.approx(counter.get_total_flops(), rel=0.001)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_transformer_computes_what_is_counted(name):
    shape = replace(VARIANTS[name].transformer, num_layers=2)
    with torch.device("meta"):
        model = WanTransformer(shape, seed=None)
    images = None
    if shape.image_dim:
        num = shape.image_tokens * (2 if shape.image_position_embedding else 1)
        images = torch.zeros(2, num, shape.image_dim, device="meta")
    extra = shape.in_channels - shape.out_channels
    with counting() as counter:
        model(
            torch.zeros(2, shape.out_channels, 3, 16, 20),
            torch.zeros(2),
            [torch.zeros(shape.text_len, shape.text_dim)] * 2,
            extra_channels=torch.zeros(2, extra, 3, 16, 20) if extra else None,
            image_context=images,
        )
    found = forward_flops(shape, 3 * 8 * 10, batch=2).total
    assert found == pytest.approx(counter.get_total_flops(), rel=0.001)
