"""The two configs of the demo, as a user would write them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.files import write_text
from trainer.demo.clips import NUM_FRAMES, SIZE, Scene
from trainer.demo.models import VARIANT, DemoModels

BATCH_SIZE = 8
"""The clip is repeated this often, so that each step sees it under as many noises."""
FLOW_SHIFT = 3.0

_HEAD = """\
# Written by `menma demo`. Its models are tiny, so sizes and learning rates fit no real one.
name = {name}

[model]
variant = {variant}
transformer = {transformer}
vae = {vae}
text_encoder = {text_encoder}

[dataset.general]
resolution = {size}
batch_size = {batch_size}

[[dataset.sources]]
video_directory = {clips}
target_frames = [{num_frames}]
num_repeats = {batch_size}

[objective]
timestep_sampler = "shift"
flow_shift = {flow_shift}

[lr_schedule]
kind = "cosine"
warmup_steps = 20

[training]
max_steps = {steps}
seed = {seed}

[memory]
weight_format = "fp32"
vae_dtype = "fp32"
text_encoder_dtype = "fp32"
cache_dtype = "fp32"
gradient_checkpointing = false

[distributed]
num_processes = 1

[output]
runs_dir = {runs}
dtype = "fp32"
"""
_FULL = """
[adapter]
kind = "none"

[optimizer]
kind = "adamw"
learning_rate = 2e-3
weight_decay = 0.0
"""
_LORA = """
[adapter]
kind = "lora"
rank = 16

[optimizer]
kind = "adamw"
learning_rate = 5e-3
weight_decay = 0.0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What the two configs differ in."""

    name: str
    transformer: Path
    scene: Scene
    clips: Path
    steps: int
    full: bool
    """Train the model's own weights instead of a LoRA."""


def write_config(root: Path, models: DemoModels, wanted: DemoConfig, seed: int) -> Path:
    """Write `<root>/configs/<name>.toml` and return its path."""
    values = {
        "name": wanted.name,
        "variant": VARIANT,
        "transformer": str(wanted.transformer),
        "vae": str(models.vae),
        "text_encoder": str(models.text_encoder),
        "size": [SIZE, SIZE],
        "batch_size": BATCH_SIZE,
        "clips": str(wanted.clips),
        "num_frames": NUM_FRAMES,
        "flow_shift": FLOW_SHIFT,
        "steps": wanted.steps,
        "seed": seed,
        "runs": str(root / "runs"),
    }
    # A JSON string, number or list is a TOML one, too.
    text = _HEAD.format(**{key: json.dumps(value) for key, value in values.items()})
    path = root / "configs" / f"{wanted.name}.toml"
    write_text(path, text + (_FULL if wanted.full else _LORA))
    return path
