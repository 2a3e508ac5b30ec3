"""Configs of small and of released models for the estimate's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.contract.config import RunConfig
from trainer.contract.variants import get_variant


def make_config(
    variant: str = "wan2.1-t2v-1.3b",
    *,
    num_layers: int | None = None,
    resolution: tuple[int, int] = (832, 480),
    frames: int = 33,
    batch: int = 1,
    rank: int = 32,
    full: bool = False,
    adapter: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    accumulation: int = 1,
    techniques: Sequence[Mapping[str, Any]] = (),
    **sections: Mapping[str, Any],
) -> RunConfig:
    """Return a config as `load_config` would; `sections` are merged over the rest."""
    model: dict[str, Any] = {"variant": variant}
    if num_layers is not None:
        model["shape"] = {"num_layers": num_layers}
    if get_variant(variant).experts:
        model["expert"] = "low_noise"
    source = {
        "video_directory": "clips",
        "resolution": resolution,
        "target_frames": [frames],
        "batch_size": batch,
    }
    values: dict[str, Any] = {
        "model": model,
        "dataset": {"sources": [source]},
        "adapter": {**({"kind": "none"} if full else {"rank": rank}), **(adapter or {})},
        "memory": dict(memory or {}),
        "training": {"gradient_accumulation_steps": accumulation},
        "distributed": {"engine": "local"},
        "techniques": [dict(technique) for technique in techniques],
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return RunConfig.model_validate(values)


def clip_sizes() -> Sequence[tuple[tuple[int, int], int, int]]:
    """Return resolution, frames and batch of the grid: images, short and long clips."""
    return (
        ((512, 512), 1, 1),
        ((512, 512), 1, 4),
        ((480, 480), 81, 1),
        ((832, 480), 33, 1),
        ((832, 480), 81, 1),
        ((832, 480), 17, 2),
        ((1280, 704), 81, 1),
    )
