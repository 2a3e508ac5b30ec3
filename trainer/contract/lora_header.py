"""Layers and ranks of a LoRA file, from its safetensors header; no torch, no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.errors import ModelFileError
from trainer.contract.lora_keys import Key, parse_key
from trainer.contract.safetensors_header import tensor_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayer:
    """One layer of a LoRA file."""

    key: str
    """Of its down factor, as the file spells it."""
    rank: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Numbers of both factors."""
        return self.rank * (self.inputs + self.outputs)


def lora_layers(path: Path, *, expert: str | None = None) -> dict[str, FileLayer]:
    """Return the layers of a plain LoRA by canonical name, in the order of the file's header.

    Args:
        path: safetensors file of any known layout, or a folder with one.
        expert: `high_noise` or `low_noise`: which of two LoRAs in one file is meant.

    Raises:
        ModelFileError: no such file, no safetensors, not a plain LoRA, a factor without its other,
            or LoRAs of both experts and none is chosen; names the key.
    """
    if not path.exists():
        raise ModelFileError(f"{path} does not exist", hint="check the path")
    shapes = tensor_shapes(path)
    if not shapes:
        raise ModelFileError(
            f"{path} has no safetensors header to read ranks from",
            hint="give a LoRA as a safetensors file; `menma lora convert` writes one",
        )
    keys = _of_expert(path, _parsed(path, shapes), expert)
    factors: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        if len(shapes[name]) == 2:
            factors.setdefault(key.module, {})[key.role] = name
    return {module: _layer(path, found, shapes) for module, found in factors.items()}


def _parsed(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for name in shapes:
        key = parse_key(name)
        if key is None or key.role not in {"down", "up", "alpha"}:
            raise ModelFileError(
                f"{path}: {name} is no part of a plain LoRA of a Wan model",
                hint="`menma lora inspect` says what the file is",
            )
        keys[name] = key
    return keys


def _of_expert(path: Path, keys: dict[str, Key], expert: str | None) -> dict[str, Key]:
    if len({key.part for key in keys.values()}) < 2:
        return keys
    if expert is None:
        raise ModelFileError(
            f"{path} holds LoRAs of both experts of Wan 2.2",
            hint="take one out of it: `menma lora convert IN OUT --expert high_noise`",
        )
    low = expert == "low_noise"
    return {name: key for name, key in keys.items() if (key.part == "transformer_2") == low}


def _layer(
    path: Path, found: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> FileLayer:
    if len(found) != 2:
        name = next(iter(found.values()))
        raise ModelFileError(
            f"{path}: {name} lacks the other factor of its layer",
            hint="the file is incomplete; download or export it again",
        )
    (rank, inputs), (outputs, again) = shapes[found["down"]], shapes[found["up"]]
    if rank != again or not rank:
        raise ModelFileError(
            f"{path}: the ranks of {found['down']} and {found['up']} differ: {rank} and {again}",
            hint="the file is damaged; download or export it again",
        )
    return FileLayer(key=found["down"], rank=rank, inputs=inputs, outputs=outputs)
