"""Stand-ins for the models: exact, small, and counting what they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.contract.dataset_config import DatasetConfig, parse_dataset
from trainer.contract.variants import VARIANTS, Variant
from trainer.data.cache_settings import CacheSettings
from trainer.jobs.cache import CacheOptions, CacheReport, run_cache
from trainer.jobs.window_encoder import LazyModel

T2V = VARIANTS["wan2.1-t2v-1.3b"]


class FakeVAE:
    """Latent of channel c = mean colour of the 8 x 8 x (1 or 4) pixels it stands for, plus c."""

    stride = (4, 8, 8)

    def __init__(self) -> None:
        self.encoded: list[tuple[int, ...]] = []
        self.nan_at: set[int] = set()

    def encode(self, video_BCFHW: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
        self.encoded.append(tuple(video_BCFHW.shape))
        batch, _, frames, height, width = video_BCFHW.shape
        assert (frames - 1) % 4 == 0
        assert height % 8 == width % 8 == 0
        grey = video_BCFHW.mean(1)
        padded = torch.cat([grey[:, :1].expand(-1, 3, -1, -1), grey], dim=1)
        cells = padded.reshape(batch, -1, 4, height // 8, 8, width // 8, 8).mean((2, 4, 6))
        latents = cells[:, None] + torch.arange(16.0).view(1, 16, 1, 1, 1)
        if len(self.encoded) - 1 in self.nan_at:
            latents = latents.clone()
            latents[0, 0, 0, 0, 0] = float("nan")
        return latents


class FakeTextEncoder:
    """One row a word; its first value is the word's length."""

    def __init__(self) -> None:
        self.captions: list[str] = []

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        self.captions += captions
        return [self.context(caption) for caption in captions]

    @staticmethod
    def context(caption: str) -> Tensor:
        words = caption.split() or [""]
        return torch.tensor([[float(len(word)), 1.0, 2.0, 3.0] for word in words])


class FakeImageEncoder:
    """257 tokens, each the mean of the image."""

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 257, 4)


class Models:
    """The three stand-ins with their identities, and a log of what is loaded when."""

    def __init__(self) -> None:
        self.vae = FakeVAE()
        self.text = FakeTextEncoder()
        self.image = FakeImageEncoder()
        self.vae_identity = "vae-1"
        self.text_identity = "text-1"
        self.loaded: list[str] = []

    def _load(self, name: str, model: object) -> object:
        self.loaded.append(name)
        return model

    def cache(
        self,
        dataset: DatasetConfig,
        *,
        variant: Variant = T2V,
        options: CacheOptions | None = None,
        **more: object,
    ) -> CacheReport:
        return run_cache(
            dataset,
            variant=variant,
            vae=LazyModel(self.vae_identity, lambda: self._load("vae", self.vae)),
            text_encoder=LazyModel(self.text_identity, lambda: self._load("text", self.text)),
            image_encoder=LazyModel("image-1", lambda: self._load("image", self.image)),
            options=options or CacheOptions(dtype="fp32", num_threads=2, prune=True),
            **more,
        )

    def settings(self, variant: Variant = T2V) -> CacheSettings:
        return CacheSettings.of(
            variant,
            vae=self.vae_identity,
            text_encoder=self.text_identity,
            image_encoder="image-1",
            dtype="fp32",
        )


def dataset_of(folder: Path, **keys: object) -> DatasetConfig:
    """Return a dataset of one folder of videos, 64 x 32 pixels, windows of 5 frames."""
    general = {"strict": keys.pop("strict", False)}
    source = {"video_directory": str(folder), "resolution": [64, 32], "target_frames": [5]}
    return parse_dataset({"general": general, "datasets": [source | keys]})
