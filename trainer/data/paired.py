"""Whether control videos and masks fit their clips, and what the cache must know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from trainer.contract.dataset_config import SourceOptions
from trainer.contract.errors import DataError
from trainer.data.fingerprint import FileIdentity
from trainer.data.media import index_clip
from trainer.data.sources import MediaItem
from trainer.data.sources.paired import kind_of

_MOST_UNLIKE = 0.05
"""Largest difference of aspect ratios: beyond it cutting to one size would shift the picture."""
NAMES = {"control": "control video", "mask": "mask"}


class Sized(Protocol):
    """Size and length of a clip."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def num_frames(self) -> int: ...


def common_frames(
    item: MediaItem,
    clip: Sized,
    source: SourceOptions,
    *,
    conditioning: str,
    target_fps: float,
) -> int:
    """Return how many frames a clip and all that belongs to it have in common.

    Args:
        item: the clip with its files.
        clip: what is in it, after resampling in time.
        source: where it is from.
        conditioning: `Variant.conditioning`.
        target_fps: rate that clips with `source_fps` are resampled to.

    Raises:
        DataError: a file cannot be read, has another aspect ratio, or is missing for this model,
            or not for it.
    """
    if conditioning == "control" and item.control is None:
        raise DataError(
            "has no control video, which this model is conditioned on",
            hint="set control_directory of the source (in a list: control_path)",
        )
    if conditioning != "control" and item.control is not None:
        raise DataError(
            "has a control video, and this model is not conditioned on them",
            hint="remove control_directory of the source (in a list: control_path), or take a "
            "Fun-Control variant",
        )
    frames = clip.num_frames
    for what, path in item.paired.items():
        kind = kind_of(path)
        if what == "control" and kind != source.kind:
            raise DataError(f"its control video {path.name} is no {source.kind}")
        try:
            other = index_clip(path, kind, target_fps=target_fps, source_fps=source.source_fps)
        except DataError as error:
            raise DataError(f"its {NAMES[what]} {path.name} {error.message}") from None
        if abs(other.width * clip.height / (other.height * clip.width) - 1) > _MOST_UNLIKE:
            raise DataError(
                f"its {NAMES[what]} has another aspect ratio: {other.width}x{other.height}, and "
                f"the clip {clip.width}x{clip.height}"
            )
        if what == "control" or other.num_frames > 1:
            frames = min(frames, other.num_frames)
    return frames


def conditions(
    paired: Mapping[str, FileIdentity], source: SourceOptions, conditioning: str
) -> dict[str, str]:
    """Return what an encoded window depends on beside the clip; empty where there is nothing."""
    known = {what: identity.content for what, identity in paired.items()}
    if source.alpha_mask:
        known["mask"] = "alpha"
    if conditioning == "control" and source.control_first_frame:
        known["control_image"] = "first frame"
    return known
