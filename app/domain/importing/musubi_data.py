"""The dataset TOML of musubi-tuner, which is Menma's too, with Takenoko's additions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from app.domain.importing.tables import Keys
from trainer.contract.dataset_config import MEDIA_KEYS, GeneralOptions, SourceOptions
from trainer.contract.dataset_problems import UNSUPPORTED_KEYS

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "caption_dropout_rate": ("caption_dropout_rate", "caption_dropout"),
    "mask_path": ("mask_directory", "mask_path"),
    "mask_directory": ("mask_directory", "mask_path"),
    "control_directory": ("control_directory",),
    "caption_prefix": ("caption_prefix",),
    "shuffle_caption": ("shuffle_caption", "caption_shuffle", "shuffle_tags"),
    "is_reg": ("is_reg", "regularisation", "is_regularisation"),
}
"""Key -> names it may have in Menma, which is asked for them."""
DONE: Mapping[str, str] = {
    "load_control": "control_directory says it",
    "skip_existing": "what is cached and has not changed is kept",
    "sequence_batches": "",
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
        _carry(keys, key, value, name, prefix, options)


def _carry(keys: Keys, key: str, value: Any, name: str, prefix: str, options: set[str]) -> None:
    found = next((n for n in OTHER_NAMES.get(name, (name,)) if n in options), None)
    if found is not None:
        note = ""
        if name in _PATHS:
            value, note = keys.file_of(value)
        elif name == "resolution" and isinstance(value, str):
            value = PRESETS.get(value.lower(), value)
            note = "Menma's word for it" if isinstance(value, list) else ""
        keys.put(key, f"{prefix}.{found}", value, note=note)
    elif value in (False, None, "", 0):
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
    **dict.fromkeys(
        ("caption_dropout_rate", "caption_prefix", "shuffle_caption"),
        "Menma does not change captions yet",
    ),
    **dict.fromkeys(("mask_path", "mask_directory"), "Menma has no masks yet"),
    **dict.fromkeys(("is_reg", "prior_loss_weight"), "Menma has no regularisation sets yet"),
    **dict.fromkeys(("concept_id", "concept_name"), "Menma has no class labels"),
    "control_suffix": "Menma has no control clips beside the others",
    "load_control": "Menma has no control clips yet",
    "min_short_clip_frames": "clips shorter than all target_frames are left out and named",
    "sequence_batches": "Menma does not keep clips in order",
    "sequence_validate_names": "Menma does not keep clips in order",
    "enable_stochastic_delta_time_sampling": "Menma takes frames at even distances",
    "bucket_constraint_type": "buckets are of about one area",
    "is_val": "use [[validation.sources]]",
}
"""Keys of a source that Menma knows and lacks."""
