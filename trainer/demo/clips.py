"""The demo's clips: a shape that the nano model has never seen, under a word it has never read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from trainer.clipart.scenes import (
    COLOURS,
    DIRECTIONS,
    NOVEL_SHAPE,
    TRIGGER,
    Scene,
    draw,
    random_scene,
)
from trainer.contract.files import write_text
from trainer.sampling.video_io import write_video

NUM_TRAINING = 12
NUM_HELD_OUT = 8
FPS = 16


def concept_scenes(seed: int) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on and those held out: no colour goes the same way in both."""
    rng = np.random.default_rng((seed, 30))
    pairs = list(product(COLOURS, DIRECTIONS))
    # Each colour twice and each direction three times, and the same pair never again.
    training = [
        (colour, direction)
        for index, (colour, direction) in enumerate(pairs)
        if (index // len(DIRECTIONS) + index) % 2 == 0
    ]
    held_out = [pair for pair in pairs if pair not in training][:: len(pairs) // 2 // NUM_HELD_OUT]
    return (
        [_scene(rng, *pair) for pair in training[:NUM_TRAINING]],
        [_scene(rng, *pair) for pair in held_out[:NUM_HELD_OUT]],
    )


def _scene(rng: np.random.Generator, colour: str, direction: str) -> Scene:
    return random_scene(rng, (colour, NOVEL_SHAPE, direction), name=TRIGGER)


def write_scenes(scenes: Sequence[Scene], folder: Path) -> list[Path]:
    """Write each scene as `<number>.mp4` with its caption beside it; return the clips."""
    clips = []
    for index, scene in enumerate(scenes):
        clip = folder / f"{index:02}.mp4"
        write_video(clip, list(draw(scene)), FPS, crf=8)
        write_text(clip.with_suffix(".txt"), scene.caption + "\n")
        clips.append(clip)
    return clips
