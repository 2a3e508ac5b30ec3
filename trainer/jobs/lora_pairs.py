"""One file with a LoRA for each expert of Wan 2.2.

ComfyUI-style files put `transformer_1.` (high noise) and `transformer_2.` behind
`diffusion_model.`; diffusers' pipelines have `transformer.` and `transformer_2.`, and the settings
of both in one header. kohya-style names have no place for a second transformer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.adapters import load_adapter
from trainer.adapters.base import AdapterFile, Update
from trainer.adapters.formats.peft_config import HEADER_KEY
from trainer.adapters.formats.writer import model_hash, save_adapter
from trainer.contract.errors import ConfigError
from trainer.contract.expert_turns import EXPERTS
from trainer.contract.files import disk_errors
from trainer.contract.lora_keys import Expert
from trainer.contract.loraid_metadata import KEYS
from trainer.io.atomic_save import save_safetensors
from trainer.io.mapped_load import open_weights
from trainer.jobs.lora_metadata import kept_metadata
from trainer.jobs.lora_output import FOLDED_KEY, common_dtype, folded_alphas

_PREFIXES: Mapping[str, tuple[str, Mapping[Expert, str]]] = {
    "comfy": (
        "diffusion_model.",
        {
            "high_noise": "diffusion_model.transformer_1.",
            "low_noise": "diffusion_model.transformer_2.",
        },
    ),
    "peft": ("transformer.", {"high_noise": "transformer.", "low_noise": "transformer_2."}),
}
"""Layout -> prefix of a file with one LoRA, and of each part of a file with two."""


def write_pair(
    pair: Mapping[Expert, AdapterFile],
    updates: Mapping[Expert, Mapping[str, Update]],
    path: Path,
    *,
    layout: str,
    dtype: torch.dtype,
    differences: Mapping[Expert, Mapping[str, Tensor]],
) -> None:
    """Write both LoRAs into one file, and verify that both can be read from it.

    Args:
        pair: the files they come from; the header keeps what both say alike.
        updates: what is written.
        path: the file.
        layout: `comfy` or `peft`.
        dtype: of the factors.
        differences: of parameters that are no weights of linear layers, as they are written.

    Raises:
        ConfigError: the layout has no place for two.
        ModelFileError: a value does not fit `dtype`.
        DiskError: the disk is full, read-only or faulty; the file is as it was.
    """
    if layout not in _PREFIXES:
        raise ConfigError(
            f"layout {layout} has no names for two experts in one file",
            hint="--split writes a file for each, --layout comfy or peft one with both",
        )
    prefix, of_part = _PREFIXES[layout]
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".lora-", dir=path.parent) as folder:
            for expert in EXPERTS:
                part = Path(folder) / f"{expert}.safetensors"
                save_adapter(
                    updates[expert],
                    part,
                    layout=layout,
                    dtype=dtype,
                    differences=differences[expert],
                )
                files = open_weights(part)
                for name in files:
                    renamed = of_part[expert] + name.removeprefix(prefix)
                    tensors[renamed] = files.read(name).clone()
                own = json.loads(files.metadata.get(HEADER_KEY, "{}"))
                settings |= {of_part[expert] + k.removeprefix(prefix): v for k, v in own.items()}
    metadata = _common(pair)
    if layout == "comfy":
        metadata |= _folded(updates)
    if settings:
        metadata |= {HEADER_KEY: json.dumps(settings), "format": "pt"}
    metadata["sshs_model_hash"] = model_hash(tensors)

    def check(file: Path) -> None:
        for expert in EXPERTS:
            read = load_adapter(file, expert=expert, differences=True)
            same = set(read) == set(updates[expert])
            if not same or read.differences.keys() != differences[expert].keys():
                raise RuntimeError(f"the {expert} part that was written has other modules")

    save_safetensors(tensors, path, metadata, check=check)


def _folded(updates: Mapping[Expert, Mapping[str, Update]]) -> dict[str, str]:
    tables = {
        expert: json.loads(found[FOLDED_KEY])
        for expert, own in updates.items()
        if (found := folded_alphas(own, common_dtype([own])))
    }
    return {FOLDED_KEY: json.dumps(tables)} if tables else {}


def _common(pair: Mapping[Expert, AdapterFile]) -> dict[str, str]:
    high, low = (kept_metadata(pair[expert]) for expert in EXPERTS)
    kept = {key: value for key, value in high.items() if low.get(key) == value}
    kept.pop("menma.expert", None)
    if "ss_loraid" not in kept:  # of one slot in the one, of another in the other
        kept = {key: value for key, value in kept.items() if key not in KEYS}
    names = [pair[expert].path.name for expert in EXPERTS]
    return {**kept, "menma.kind": "lora", "menma.converted_from": ", ".join(dict.fromkeys(names))}
