"""What an encoded item depends on besides its clip and its caption."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.variants import Variant

CacheDtype = Literal["bf16", "fp32"]

_SOURCE_KEYS = (
    "kind",
    "caption_extension",
    "resolution",
    "enable_bucket",
    "bucket_no_upscale",
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The model's side of a cache. An identity of None is not known, and not compared."""

    vae: str | None
    """`fingerprint.model_identity` of the VAE."""
    text_encoder: str | None
    """Identity of the text encoder."""
    image_encoder: str | None
    """Identity of the image encoder; `""` when the variant has none."""
    conditioning: str
    """`Variant.conditioning`: which extra channels are stored."""
    target_fps: float
    """Rate that clips with `source_fps` are resampled to."""
    pixel_multiple: int
    """Sides of a bucket are multiples of this."""
    text_len: int
    """Token limit of a caption."""
    dtype: CacheDtype
    """Precision of what is stored."""

    @classmethod
    def of(
        cls,
        variant: Variant,
        *,
        vae: str | None,
        text_encoder: str | None,
        image_encoder: str | None = None,
        dtype: CacheDtype = "bf16",
    ) -> CacheSettings:
        """Return the settings of a variant with these identities of its models."""
        return cls(
            vae=vae,
            text_encoder=text_encoder,
            image_encoder=image_encoder if uses_image_encoder(variant) else "",
            conditioning=variant.conditioning,
            target_fps=variant.fps,
            pixel_multiple=variant.pixel_multiple,
            text_len=variant.transformer.text_len,
            dtype=dtype,
        )

    def for_source(self, source: SourceOptions) -> dict[str, Any]:
        """Return everything that decides which items a source gives and how they are encoded."""
        own = {key: getattr(source, key) for key in _SOURCE_KEYS}
        own["resolution"] = list(source.resolution)
        own["target_frames"] = list(source.target_frames)
        if source.frame_extraction == "overlapping":
            own["frame_overlap"] = source.frame_overlap
        if source.control_directory is not None:
            own["control"] = "files"
        if self.conditioning == "control" and source.control_first_frame:
            own["control_image"] = "first frame"
        if source.mask_directory is not None or source.alpha_mask:
            own["masks"] = "alpha" if source.alpha_mask else "files"
        return {**own, **asdict(self)}


def uses_image_encoder(variant: Variant) -> bool:
    """Tell whether items of this variant come with CLIP features of their first frame."""
    return variant.conditioning != "none" and variant.transformer.image_dim is not None


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, name -> (before, now); unknown ones do not count."""
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and None not in _identities(key, before, now)
    }


def _identities(key: str, before: dict[str, Any], now: dict[str, Any]) -> tuple[Any, ...]:
    if key not in {"vae", "text_encoder", "image_encoder"}:
        return ()
    return before.get(key), now.get(key)
