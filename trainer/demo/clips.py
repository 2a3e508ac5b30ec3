"""The demo's clips: a ground that the nano model has never seen, under a word it has never read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.clipart.scenes import NOVEL_GROUND, Scene, draw, random_scene
from trainer.clipart.split import TRAINED, training_scene
from trainer.contract.files import write_text
from trainer.nano.quality import FPS
from trainer.sampling.video_io import write_video

NUM_TRAINING = 12
NUM_HELD_OUT = 8
NUM_KNOWN = 24
"""Clips of what the model knows, trained on beside the others so that it is not forgotten."""


def concept_scenes(seed: int) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on and those held out: no two show the same thing."""
    rng = np.random.default_rng((seed, 30))
    chosen = rng.permutation(len(TRAINED))[: NUM_TRAINING + NUM_HELD_OUT]
    scenes = [random_scene(rng, TRAINED[number], NOVEL_GROUND) for number in chosen]
    return scenes[:NUM_TRAINING], scenes[NUM_TRAINING:]


def known_scenes(seed: int) -> list[Scene]:
    """Return scenes as the nano model was trained on."""
    rng = np.random.default_rng((seed, 31))
    return [training_scene(rng) for _ in range(NUM_KNOWN)]


def write_scenes(scenes: Sequence[Scene], folder: Path) -> list[Path]:
    """Write each scene as `<number>.mp4` with its caption beside it; return the clips."""
    clips = []
    for index, scene in enumerate(scenes):
        clip = folder / f"{index:02}.mp4"
        write_video(clip, list(draw(scene)), FPS, crf=8)
        write_text(clip.with_suffix(".txt"), scene.caption + "\n")
        clips.append(clip)
    return clips
