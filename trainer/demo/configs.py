"""The config of the demo, as a user would write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trainer.clipart.scenes import TRIGGER, UNCAPTIONED
from trainer.contract.files import write_text
from trainer.nano.files import T2V_VARIANT, asset
from trainer.nano.quality import FLOW_SHIFT, FPS, GUIDANCE_SCALE, NUM_FRAMES, NUM_STEPS, SIZE

NAME = TRIGGER

_TEMPLATE = """\
# Written by `menma demo`: a LoRA that teaches the nano model a pattern it has never seen.
# The model is tiny, so sizes, steps and learning rate fit no real one.
name = {name}

[model]
variant = {variant}
transformer = {transformer}
vae = {vae}
text_encoder = {text_encoder}

[dataset.general]
resolution = [{size}, {size}]
batch_size = {batch_size}

[[dataset.sources]]
video_directory = {clips}
target_frames = [{num_frames}]
num_repeats = 2

# Clips of what the model knows already, so that only the new word brings the new pattern.
[[dataset.sources]]
video_directory = {known}
target_frames = [{num_frames}]

[adapter]
kind = "lora"
rank = 16

[objective]
timestep_sampler = "logit_normal"
logit_mean = 1.0
logit_std = 1.4

[optimizer]
kind = "adamw"
learning_rate = {learning_rate}
weight_decay = 0.0

[lr_schedule]
kind = "cosine"
warmup_steps = 20

[training]
max_steps = {steps}
seed = {seed}

# The loss on clips that are not trained on, at fixed timesteps and noise.
[validation]
every_steps = {validate_every}
timesteps = [500, 700, 900]
noises_per_timestep = 2
batch_size = 8

[[validation.sources]]
video_directory = {held_out}
target_frames = [{num_frames}]

# What `menma eval` samples and looks at: is the new pattern there, are the known things still?
[probe]
kind = "shapes"
trigger = {trigger}
num_shots = {num_shots}

[sampling]
negative_prompt = {negative_prompt}
width = {size}
height = {size}
num_frames = {num_frames}
num_steps = {num_steps}
guidance_scale = {guidance_scale}
flow_shift = {flow_shift}
fps = {fps}

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
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """How much is trained and looked at."""

    steps: int = 240
    batch_size: int = 12
    learning_rate: float = 1e-3
    num_shots: int = 24
    """Videos asked for by the trigger word, and as many without it, before and after."""
    seed: int = 0


def write_config(root: Path, clips: Path, plan: DemoPlan) -> Path:
    """Write `<root>/configs/<name>.toml` and return its path."""
    values = {
        "name": NAME,
        "variant": T2V_VARIANT,
        "transformer": str(asset("t2v")),
        "vae": str(asset("vae")),
        "text_encoder": str(asset("text_encoder")),
        "clips": str(clips / "training"),
        "known": str(clips / "known"),
        "held_out": str(clips / "held_out"),
        "size": SIZE,
        "num_frames": NUM_FRAMES,
        "batch_size": plan.batch_size,
        "flow_shift": FLOW_SHIFT,
        "learning_rate": plan.learning_rate,
        "steps": plan.steps,
        "seed": plan.seed,
        "validate_every": max(1, plan.steps // 4),
        "trigger": TRIGGER,
        "num_shots": plan.num_shots,
        "negative_prompt": UNCAPTIONED,
        "num_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "fps": FPS,
        "runs": str(root / "runs"),
    }
    # A JSON string, number or list is a TOML one, too.
    text = _TEMPLATE.format(**{key: json.dumps(value) for key, value in values.items()})
    path = root / "configs" / f"{NAME}.toml"
    write_text(path, text)
    return path
