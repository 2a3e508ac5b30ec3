"""The model that comes with Menma, as something to train without any download."""

from __future__ import annotations

from pathlib import Path

from app.domain.presets import Preset, read_preset
from app.domain.weight_search import ModelFiles
from trainer.contract import config_io

ASSETS = Path(config_io.__file__).parents[1] / "assets" / "nano"
TITLE = "the demo model: tiny, comes with Menma, to try everything"
VARIANT = "wan2.1-t2v-1.3b"
"""Whose channels and branches it has; its sizes stand in its file."""


def demo_files() -> ModelFiles:
    """Return its weight files."""
    return ModelFiles(
        variant=VARIANT,
        transformer=ASSETS / "wan_nano_t2v.safetensors",
        vae=ASSETS / "wan_nano_vae.safetensors",
        text_encoder=ASSETS / "umt5_nano.safetensors",
    )


def demo_preset() -> Preset:
    """Return its values, which fit no other model; it is in no list."""
    return read_preset(str(ASSETS / "demo.toml"))


def is_demo(files: ModelFiles) -> bool:
    """Tell whether a model is this one."""
    return files.transformer == demo_files().transformer
