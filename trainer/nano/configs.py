"""The configs that train the nano transformers, as a user would write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract.files import write_text

_TEMPLATE = """\
# Written by `python -m trainer.nano`.
name = {name}

[model]
{model}

[dataset.general]
batch_size = {batch_size}

{sources}

[adapter]
kind = "none"

# So small a picture says little: what it shows is decided at the noisiest timesteps.
[objective]
timestep_sampler = "logit_normal"
logit_mean = {logit_mean}
logit_std = {logit_std}
{objective}

[optimizer]
kind = "adamw"
learning_rate = {learning_rate}
weight_decay = 0.01
betas = [0.9, 0.98]

[lr_schedule]
kind = "cosine"
warmup_steps = {warmup_steps}

[training]
max_steps = {steps}
seed = {seed}

[memory]
weight_format = "fp32"
vae_dtype = "fp32"
text_encoder_dtype = "fp32"
cache_dtype = "bf16"
gradient_checkpointing = false

[distributed]
engine = "local"
num_processes = 1
device = "cpu"

[checkpoint]
every_steps = 200
keep_last = 1

[output]
runs_dir = {runs}
dtype = "fp32"
"""
_SOURCE = """\
[[dataset.sources]]
video_directory = {folder}
resolution = [{width}, {height}]
target_frames = [{num_frames}]
cache_directory = {cache}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipKind:
    """Clips of one size."""

    num_frames: int
    width: int
    height: int
    share: float
    """Of all clips."""

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return f"{self.num_frames}x{self.width}x{self.height}"


CLIP_KINDS = (
    ClipKind(num_frames=17, width=64, height=64, share=0.9),
    ClipKind(num_frames=17, width=96, height=64, share=0.05),
    ClipKind(num_frames=33, width=64, height=64, share=0.05),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the configs of the transformers differ in."""

    name: str
    model: Mapping[str, str]
    """Keys of `[model]`."""
    steps: int
    learning_rate: float
    batch_size: int = 32
    logit_mean: float = 1.0
    logit_std: float = 1.4
    objective: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of `[objective]`."""


def write_config(
    root: Path, clips: Path, kinds: Sequence[ClipKind], training: Training, seed: int
) -> Path:
    """Write `<root>/configs/<name>.toml` and return its path."""
    cache = "i2v" if "image_encoder" in training.model else "t2v"
    sources = [
        _SOURCE.format(
            folder=json.dumps(str(clips / kind.name)),
            cache=json.dumps(str(root / "cache" / cache / kind.name)),
            width=kind.width,
            height=kind.height,
            num_frames=kind.num_frames,
        )
        for kind in kinds
    ]
    text = _TEMPLATE.format(
        name=json.dumps(training.name),
        model=_lines(training.model),
        objective=_lines(training.objective),
        sources="\n".join(sources),
        batch_size=training.batch_size,
        logit_mean=training.logit_mean,
        logit_std=training.logit_std,
        learning_rate=training.learning_rate,
        warmup_steps=min(100, training.steps // 10),
        steps=training.steps,
        seed=seed,
        runs=json.dumps(str(root / "runs")),
    )
    path = root / "configs" / f"{training.name}.toml"
    write_text(path, text)
    return path


def _lines(values: Mapping[str, Any]) -> str:
    # A JSON string or number is a TOML one, too.
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
