"""The directories of diffusion-pipe's dataset TOML as sources."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from app.domain.importing import values as v
from app.domain.importing.tables import Done, Keys, Lacks, Rule
from trainer.contract.dataset_config import FrameExtraction, SourceOptions

_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}
_VIDEOS = {".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg"}


def datasets(keys: Keys) -> None:
    """Folders of clips; one that holds images and videos becomes two sources."""
    used: dict[str, str] = {}
    place = 0
    indices = sorted({int(m[1]) for key in keys.values
                      if (m := re.match(r"directory\[(\d+)\]", key))})  # fmt: skip
    for index in indices:
        place = _directory(keys, index, place, used)
    for key in keys.values:
        match = re.fullmatch(r"(?:dataset|directory\[\d+\])\.(.+)", key)
        if match is None:
            continue
        if used.get(key):
            keys.done(key, _SHAPES.get(match[1], ""), used[key])
        elif match[1] in _LOST:
            keys.rule(key, _LOST[match[1]])
        elif key in used or match[1] in _SHAPES:
            keys.same(key, "as in Menma, or not used by any directory")
    if "dataset" in keys:
        keys.done("dataset", "its directories stand in [[dataset.sources]]" if place else
                  "it could not be read: give it to the import, too")  # fmt: skip


_SHAPES = {
    "enable_ar_bucket": "enable_bucket of each source",
    "resolutions": "resolution: one source for each of them, as each clip is used at each there",
    "frame_buckets": "target_frames: a window of every length that fits, not of the longest only",
    "num_repeats": "",
    "path": "",
}
_LOST: Mapping[str, Rule] = {
    **dict.fromkeys(("min_ar", "max_ar", "num_ar_buckets", "ar_buckets"),
                    Done("buckets have steps of 16 pixels, from 1:4 to 4:1", off=())),
    "size_buckets": Lacks("sizes are not listed one by one", "one source for each resolution"),
    "caption_prefix": Lacks("Menma does not change captions yet"),
    "shuffle_tags": Lacks("Menma does not change captions yet"),
    "cache_shuffle_num": Lacks("Menma does not change captions yet"),
    "cache_shuffle_delimiter": Done("of cache_shuffle_num", off=()),
    "skip_empty_caption": Done("clips without a caption are left out, and named", off=()),
    "mask_path": Lacks("Menma has no masks yet"),
    "default_mask_file": Lacks("Menma has no masks yet"),
    "control_path": Lacks("Menma has no control clips yet"),
    "loss_scale": Lacks("sources have no weights of their own yet", "num_repeats", off=(1, 1.0)),
    "round_side": Done("sides are multiples of what the model needs", off=()),
    "type": Done("a folder of images or videos", off=()),
    "video_clip_mode": Done("frame_extraction", off=()),
}  # fmt: skip
_OURS = {
    "caption_prefix": ("caption_prefix",),
    "shuffle_tags": ("shuffle_caption", "caption_shuffle", "shuffle_tags"),
    "mask_path": ("mask_directory", "mask_path"),
    "control_path": ("control_directory",),
    "loss_scale": ("loss_weight", "loss_scale"),
}
"""Keys of a directory -> names they may have in a source of Menma, which is asked for them."""


def _directory(keys: Keys, index: int, place: int, used: dict[str, str]) -> int:
    """Write the sources of one directory from number `place` on; return the next number.

    `used` gets the keys that were looked at, with what was written for them.
    """

    def value(name: str, default: Any = None) -> Any:
        for key in (f"directory[{index}].{name}", f"dataset.{name}"):
            if key in keys:
                used.setdefault(key, "")
                return keys.values[key]
        return default

    path = value("path")
    if not isinstance(path, str):
        return place
    folder = keys.file_of(path)[0]
    frames = [int(f) for f in v.several(value("frame_buckets", [1])) if isinstance(f, int)]
    repeats = value("num_repeats", 1)
    for kind in _kinds(Path(folder), frames):
        images = keys.get("image_micro_batch_size_per_gpu") if kind == "image" else None
        for size in v.several(value("resolutions", [512])):
            own: dict[str, tuple[str, Any]] = {
                f"{kind}_directory": ("path", folder),
                "resolution": ("resolutions", size),
                "num_repeats": ("num_repeats", repeats),
                "batch_size": ("", images or keys.get("micro_batch_size_per_gpu", 1)),
                "enable_bucket": ("enable_ar_bucket", v.is_on(value("enable_ar_bucket"))),
            }
            if kind == "video":
                own["target_frames"] = ("frame_buckets", [f for f in frames if f > 1] or [33])
                own |= {name: ("", part) for name, part in _clip_mode(keys).items()}
            for name, targets in _OURS.items():
                target = next((t for t in targets if t in SourceOptions.model_fields), None)
                if target is not None and value(name) is not None:
                    own[target] = (name, value(name))
            _write_source(keys, index, f"dataset.sources[{place}]", own, used)
            place += 1
    return place


def _write_source(
    keys: Keys, index: int, prefix: str, own: Mapping[str, tuple[str, Any]], used: dict[str, str]
) -> None:
    for target, (name, part) in own.items():
        if part in (None, False) or part == SourceOptions.model_fields[target].default:
            continue
        keys.draft.values[f"{prefix}.{target}"] = part
        for key in (f"directory[{index}].{name}", f"dataset.{name}"):
            if key in used:
                used[key] = used[key] or f"{prefix}.{target}"
                break


def _kinds(folder: Path, frames: list[int]) -> list[str]:
    """Return what a folder holds: what is in it, or what the frame buckets are for."""
    try:
        found = {path.suffix.lower() for path in folder.iterdir()}
    except OSError:
        found = set()
    kinds = [kind for kind, ends in (("image", _IMAGES), ("video", _VIDEOS)) if found & ends]
    return kinds or (["video"] if any(f > 1 for f in frames) else ["image"])


def _clip_mode(keys: Keys) -> dict[str, Any]:
    mode = str(keys.get("video_clip_mode") or "single_beginning")
    wanted = {"single_beginning": "head", "single_middle": "middle",
              "multiple_overlapping": "multiple_overlapping"}.get(mode, "head")  # fmt: skip
    return {"frame_extraction": wanted} if wanted in get_args(FrameExtraction) else {}
