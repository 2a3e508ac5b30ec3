"""The backends of SimpleTuner's multidatabackend.json as sources."""

from __future__ import annotations

import re
from collections.abc import Mapping

from app.domain.importing import values as v
from app.domain.importing.tables import Keys
from trainer.contract.dataset_config import SourceOptions

_BACKEND = re.compile(r"backends\[(\d+)\]\.(.+)")
_BACKEND_DONE: Mapping[str, str] = {
    "id": "sources are told apart by their folders",
    "crop": "clips are scaled to cover a bucket and cut in the middle",
    "crop_style": "clips are cut in the middle",
    "crop_aspect": "buckets keep the aspect ratio: enable_bucket",
    "minimum_image_size": "small clips are used, too; bucket_no_upscale keeps them small",
    "maximum_image_size": "clips are scaled in one go",
    "target_downsample_size": "clips are scaled in one go",
    "metadata_backend": "clips are looked at when they are cached",
    "cache_dir_vae": "Menma caches in its own format, beside the clips: cache_directory",
    "cache_dir": "Menma caches in its own format, beside the clips: cache_directory",
    "video.min_frames": "clips shorter than all target_frames are left out",
    "video.is_i2v": "the variant says it",
    "video.bucket_strategy": "buckets keep the aspect ratio; target_frames are the lengths",
    "type": "folders of this machine",
    "dataset_type": "the kind of folder",
    "disabled": "",
    "resolution_type": "resolution is the area to keep",
    "video.frame_interval": "lengths are 4n + 1",
    "video.num_frames": "",
    "video.max_frames": "",
}
_BACKEND_LOST: Mapping[str, tuple[str, str]] = {
    "caption_strategy": ("captions are text files beside the clips", "write them there"),
    "instance_prompt": ("captions are text files beside the clips", "write it into them"),
    "prepend_instance_prompt": ("captions are text files beside the clips", "write them there"),
    "only_instance_prompt": ("captions are text files beside the clips", "write them there"),
    "probability": ("sources are not drawn by chance", "num_repeats"),
    "caption_shuffle": ("Menma does not change captions yet", ""),
    "minimum_aspect_ratio": ("no clip is left out for its shape", "remove it"),
    "maximum_aspect_ratio": ("no clip is left out for its shape", "remove it"),
    "conditioning_data": ("Menma has no control clips yet", ""),
    "conditioning": ("Menma has no control clips yet", ""),
    "is_regularisation_data": ("Menma has no regularisation sets yet", ""),
    "is_regularization_data": ("Menma has no regularisation sets yet", ""),
}


def datasets(keys: Keys) -> None:
    """Folders of images and videos; backends that hold embeddings are not needed."""
    place = 0
    for index in sorted({int(m[1]) for key in keys.values if (m := _BACKEND.match(key))}):
        place = _backend(keys, index, place)
    for key in keys.values:
        match = _BACKEND.fullmatch(key)
        if match is not None:
            _rest(keys, key, match[2])
    keys.done("data_backend_config", "its sources stand in [[dataset.sources]]" if place else
              "it could not be read: give it to the import, too")  # fmt: skip
    keys.done("train_batch_size", "batch_size of each source")


def _backend(keys: Keys, index: int, place: int) -> int:
    """Write a backend as source number `place` if it is one; return the next number."""
    kind = str(keys.get(f"backends[{index}].dataset_type") or "image").lower()
    off = v.is_on(keys.get(f"backends[{index}].disabled"))
    if kind in {"image", "video"} and not off:
        return _source(keys, index, kind, place)
    for key in keys.values:
        if not key.startswith(f"backends[{index}]."):
            continue
        if kind in {"text_embeds", "image_embeds", "conditioning_image_embeds"}:
            keys.done(key, "a place for caches: `menma cache` has its own")
        elif off:
            keys.done(key, "this backend is switched off, and left out")
        else:
            keys.lacks(key, f"Menma has no sources of {kind}")
    return place


def _rest(keys: Keys, key: str, name: str) -> None:
    """Say what becomes of a key that is no value of a source."""
    if name in _BACKEND_LOST and keys.get(key):
        keys.lacks(key, *_BACKEND_LOST[name])
    elif _BACKEND_DONE.get(name):
        keys.done(key, _BACKEND_DONE[name])
    elif name in _BACKEND_DONE or name in _BACKEND_LOST:
        keys.same(key)
    elif name.startswith(("aws_", "parquet", "huggingface", "csv_")):
        keys.lacks(key, "clips are in folders of this machine")


def _source(keys: Keys, index: int, kind: str, place: int) -> int:
    """Write one source, number `place`; return the next number."""
    old, prefix = f"backends[{index}]", f"dataset.sources[{place}]"
    if str(keys.get(f"{old}.type") or "local") != "local":
        keys.lacks(f"{old}.type", "clips are in folders of this machine", "download them")
        return place
    folder = keys.get(f"{old}.instance_data_dir")
    if not isinstance(folder, str) or not folder:
        return place
    path, note = keys.file_of(folder)
    keys.put(f"{old}.instance_data_dir", f"{prefix}.{kind}_directory", path, note=note)
    _resolution(keys, old, prefix)
    repeats = keys.read(f"{old}.repeats", v.whole, 0)
    keys.put(f"{old}.repeats", f"{prefix}.num_repeats", repeats + 1,
             note="0 repeats are one view")  # fmt: skip
    keys.draft.values[f"{prefix}.enable_bucket"] = True
    batch = keys.read("train_batch_size", v.positive, 4)
    if batch != 1:
        keys.draft.values[f"{prefix}.batch_size"] = batch
    if kind == "video":
        frames = keys.read(f"{old}.video.num_frames", v.positive, 125)
        keys.put(f"{old}.video.num_frames", f"{prefix}.target_frames", [frames],
                 note="rounded down to 4n + 1; windows begin at the start")  # fmt: skip
        keys.draft.values[f"{prefix}.target_frames"] = [frames]
    if str(keys.get(f"{old}.caption_strategy") or "") == "textfile":
        keys.same(f"{old}.caption_strategy", "text files beside the clips, as in Menma")
    for name, target in (("caption_dropout_probability", "caption_dropout_rate"),
                         ("mask_dir", "mask_directory")):  # fmt: skip
        if keys.get(f"{old}.{name}") and target in SourceOptions.model_fields:
            keys.put(f"{old}.{name}", f"{prefix}.{target}", keys.get(f"{old}.{name}"))
    return place + 1


def _resolution(keys: Keys, old: str, prefix: str) -> None:
    kind = str(keys.get(f"{old}.resolution_type") or keys.get("resolution_type") or "pixel_area")
    size = keys.read(f"{old}.resolution", v.number, keys.read("resolution", v.number, 1024))
    note = ""
    if kind == "area" or size < 16:
        size, note = (size * 1_000_000) ** 0.5, "megapixels as the side of a square"
    elif kind == "pixel":
        note = "the shorter side there; here the side of a square of the same area"
    side = max(16, round(size / 16) * 16)
    keys.put(f"{old}.resolution", f"{prefix}.resolution", [side, side], note=note)
    keys.draft.values[f"{prefix}.resolution"] = [side, side]


def dropout(keys: Keys) -> None:
    """Share of items that are trained without a caption."""
    share = keys.read("caption_dropout_probability", v.number)
    target = next((t for t in ("caption_dropout_rate", "caption_dropout")
                   if t in SourceOptions.model_fields), None)  # fmt: skip
    if not share:
        return
    if target is None:
        keys.lacks("caption_dropout_probability", "Menma does not drop captions yet")
    else:
        keys.put("caption_dropout_probability", f"dataset.general.{target}", share)
