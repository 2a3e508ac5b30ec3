"""The demo's clips: a ground that the nano model has never seen, under a word it has never read."""

from __future__ import annotations

import numpy as np

from trainer.clipart.scenes import NOVEL_GROUND, Scene, random_scene
from trainer.clipart.split import TRAINED, training_scene

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
