"""The largest batch that a config's dataset can give."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.contract.config import RunConfig
from trainer.contract.dataset_config import SourceOptions
from trainer.contract.variants import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The size of a batch's items."""

    width: int
    height: int
    num_frames: int
    batch: int = 1

    def latent_frames(self, variant: Variant) -> int:
        """Return the frames of the latents."""
        return (self.num_frames - 1) // variant.vae_stride[0] + 1

    def tokens(self, variant: Variant) -> int:
        """Return the transformer's tokens of one item."""
        step = variant.pixel_multiple
        return self.latent_frames(variant) * (self.width // step) * (self.height // step)

    def __str__(self) -> str:
        """Write it as people do."""
        return f"{self.width}x{self.height}x{self.num_frames}"


def training_clips(config: RunConfig, variant: Variant) -> tuple[Clip, ...]:
    """Return the largest clip of each source; the variant's own size where there is no dataset.

    A source with buckets gives sizes of no more than its area; the area counts, so its own
    resolution stands for them.

    Raises:
        ConfigError: the dataset file is missing or a key is wrong.
    """
    dataset = config.dataset
    if dataset.file is None and not dataset.sources:
        return (default_clip(variant),)
    return tuple(_largest(source, variant) for source in dataset.load().sources)


def cached_clips(config: RunConfig, variant: Variant) -> tuple[Clip, ...]:
    """Return the largest clip of each source that is cached, those to validate on included.

    Raises:
        ConfigError: the dataset file is missing or a key is wrong.
    """
    trained = training_clips(config, variant)
    if not config.validation.sources:
        return trained
    sources = config.validation.load_sources(config.dataset.load().general)
    return (*trained, *(_largest(source, variant) for source in sources))


def default_clip(variant: Variant) -> Clip:
    """Return the size that the variant was made for."""
    return Clip(width=variant.width, height=variant.height, num_frames=variant.num_frames)


def _largest(source: SourceOptions, variant: Variant) -> Clip:
    step = variant.pixel_multiple
    width, height = (max(side // step, 1) * step for side in source.resolution)
    if source.enable_bucket:
        # Buckets keep the area, not the sides: take one that fills it.
        width = max(width, source.resolution[0] * source.resolution[1] // height // step * step)
    frames = 1
    if source.kind == "video":
        full = source.frame_extraction == "full"
        frames = source.max_frames if full else max(source.target_frames)
    return Clip(
        width=width, height=height, num_frames=(frames - 1) // 4 * 4 + 1, batch=source.batch_size
    )
