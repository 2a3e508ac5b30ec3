"""The dataset TOML of musubi-tuner, which is Menma's too, with Takenoko's additions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from app.domain.importing import values as v
from app.domain.importing.tables import Keys
from trainer.contract.dataset_config import MEDIA_KEYS, GeneralOptions, SourceOptions
from trainer.contract.dataset_problems import UNSUPPORTED_KEYS

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "caption_dropout_rate": ("caption_dropout",),
    "mask_path": ("mask_directory",),
    "shuffle_caption": ("shuffle_tags",),
    "keep_tokens": ("keep_tags",),
    "caption_separator": ("tag_separator",),
}
"""Key -> names it may have in Menma, which is asked for them."""
EXTRACTIONS = {"multiple_overlapping": "overlapping"}
"""Takenoko's words for windows, where they are not Menma's."""
DONE: Mapping[str, str] = {
    "skip_existing": "what is cached and has not changed is kept",
}
PRESETS = {"480p": [832, 480], "720p": [1280, 720], "540p": [960, 544]}
"""Takenoko's short words for sizes."""
_KEY = re.compile(r"(general|datasets\[(\d+)\]|val\[(\d+)\])\.(.+)")
_PATHS = (*MEDIA_KEYS, "cache_directory", "control_directory", "mask_path", "mask_directory")


def datasets(keys: Keys) -> None:
    """Carry the tables of clips over, key by key.

    Keys: `general.…`, `datasets[0].…` (sources to train on), `val[0].…` (to validate on).
    """
    for key, value in keys.values.items():
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        table, number, val_number, name = match.groups()
        if table == "general":
            prefix, options = "dataset.general", set(GeneralOptions.model_fields)
        else:
            prefix, options = f"dataset.sources[{number}]", set(SourceOptions.model_fields)
            if val_number is not None:
                prefix = f"validation.sources[{val_number}]"
        if name == "is_reg" and "loss_weight" in options:
            _regularisation(keys, key, prefix)
        else:
            _carry(keys, key, value, name, prefix, options)


def _regularisation(keys: Keys, key: str, prefix: str) -> None:
    """A regularisation set is a source with a weight of its own in the loss."""
    if not v.is_on(keys.get(key)):
        keys.same(key)
        return
    weight = keys.read("prior_loss_weight", v.number, 1.0)
    keys.put(key, f"{prefix}.loss_weight", weight, note="the weight is prior_loss_weight")
    keys.done("prior_loss_weight", "", f"{prefix}.loss_weight")


def _carry(keys: Keys, key: str, value: Any, name: str, prefix: str, options: set[str]) -> None:
    found = next((n for n in OTHER_NAMES.get(name, (name,)) if n in options), None)
    if found is not None:
        note = ""
        if name in _PATHS:
            value, note = keys.file_of(value)
        elif name == "resolution" and isinstance(value, str):
            value = PRESETS.get(value.lower(), value)
            note = "width and height" if isinstance(value, list) else ""
        elif name == "frame_extraction" and str(value) in EXTRACTIONS:
            value = EXTRACTIONS[str(value)]
            note = "Menma's word for it"
        keys.put(key, f"{prefix}.{found}", value, note=note)
    elif value is None or value is False or value in ("", 0):
        keys.same(key)
    elif name in UNSUPPORTED_KEYS:
        keys.lacks(key, f"Menma lacks {UNSUPPORTED_KEYS[name]} so far")
    elif DONE.get(name):
        keys.done(key, DONE[name])
    elif prefix == "dataset.general" and name in SourceOptions.model_fields:
        keys.lacks(key, "it belongs to a source", f"put it into each [[dataset.sources]]: {name}")
    elif name in KNOWN:
        keys.lacks(key, KNOWN[name])


KNOWN: Mapping[str, str] = {
    **dict.fromkeys(("concept_id", "concept_name"), "Menma has no class labels"),
    "control_suffix": "control clips have the clips' names, in control_directory",
    "load_control": "control clips stand in control_directory",
    "min_short_clip_frames": "clips shorter than all target_frames are left out and named",
    "sequence_batches": "Menma does not keep clips in order",
    "sequence_validate_names": "Menma does not keep clips in order",
    "enable_stochastic_delta_time_sampling": "Menma takes frames at even distances",
    "bucket_constraint_type": "buckets are of about one area",
    "is_val": "use [[validation.sources]]",
}
"""Keys of a source that Menma knows and lacks."""
