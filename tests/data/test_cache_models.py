"""The cache job with real (untrained, tiny) Wan components instead of stand-ins."""

from __future__ import annotations

import pytest
import torch
from data_clips import write_caption, write_video
from data_fakes import dataset_of

from trainer.contract.variants import VARIANTS
from trainer.data.cache_settings import CacheSettings
from trainer.data.fingerprint import model_identity
from trainer.data.items import load_cached_dataset
from trainer.data.loader import load_batch
from trainer.data.media import index_clip, read_window, to_video
from trainer.data.order import BatchOrder
from trainer.jobs.cache import CacheOptions, run_cache
from trainer.jobs.window_encoder import LazyModel
from trainer.models import load_image_encoder, load_text_encoder, load_vae
from trainer.models.wan.tiny import (
    write_tiny_image_encoder,
    write_tiny_text_encoder,
    write_tiny_vae,
)

CAPTIONS = ["a red square walks over a blue field", "two circles meet"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for version in ("2.1", "2.2"):
        write_tiny_vae(folder / f"vae-{version}.safetensors", version)
    write_tiny_text_encoder(folder / "text.safetensors", CAPTIONS)
    write_tiny_image_encoder(folder / "image.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "size", "latents", "extra"),
    [
        ("wan2.1-t2v-1.3b", [64, 32], (16, 2, 4, 8), None),
        ("wan2.1-i2v-14b", [64, 32], (16, 2, 4, 8), (20, 2, 4, 8)),
        ("wan2.2-ti2v-5b", [64, 32], (48, 2, 2, 4), None),
    ],
)
def test_real_components_fill_a_batch(tmp_path, weights, name, size, latents, extra):
    variant = VARIANTS[name]
    for clip, caption in zip(("a.mp4", "b.mp4"), CAPTIONS, strict=True):
        write_video(tmp_path / clip, 6, first_number=ord(clip[0]))
        write_caption(tmp_path / clip, caption)
    dataset = dataset_of(tmp_path, resolution=size)
    vae, text, image = (
        weights / f"{file}.safetensors" for file in (f"vae-{variant.vae}", "text", "image")
    )
    report = run_cache(
        dataset,
        variant=variant,
        vae=LazyModel(model_identity(vae), lambda: load_vae(vae)),
        text_encoder=LazyModel(model_identity(text), lambda: load_text_encoder(text)),
        image_encoder=LazyModel(model_identity(image), lambda: load_image_encoder(image)),
        options=CacheOptions(dtype="fp32"),
    )
    assert (report.encoded, report.captions_encoded, report.problems) == (2, 3, ())
    settings = CacheSettings.of(
        variant,
        vae=model_identity(vae),
        text_encoder=model_identity(text),
        image_encoder=model_identity(image),
        dtype="fp32",
    )
    items = load_cached_dataset(dataset, settings).items
    batch = load_batch(BatchOrder(items, 0).batch(0))
    assert batch.latents_BCFHW.shape == (1, *latents)
    assert (None if extra is None else (1, *extra)) == (
        None if batch.extra_channels_BCFHW is None else tuple(batch.extra_channels_BCFHW.shape)
    )
    clip = tmp_path / batch.names[0].rpartition("/")[2].split(" ")[0]
    window = read_window(index_clip(clip, "video", target_fps=16), range(5), (size[0], size[1]))
    with torch.inference_mode():
        expected = load_vae(vae).encode(to_video(window)[None])
        caption = clip.with_suffix(".txt").read_text()
        context = load_text_encoder(text)([caption])[0]
    assert torch.equal(batch.latents_BCFHW, expected)
    # Encoded alone or in a batch: the same but for rounding.
    torch.testing.assert_close(batch.context[0], context)
