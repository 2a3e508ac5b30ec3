"""Captioned clips of coloured moving shapes, drawn here so that the demo needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.contract.files import write_text
from trainer.sampling.video_io import Frame, write_video

SIZE = 32
"""Width and height in pixels: what the VAE makes of it is 4 x 4 latents."""
NUM_FRAMES = 9
FPS = 16

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One clip: a shape that crosses a plain ground."""

    name: str
    caption: str
    shape: Literal["disc", "square"]
    colour: Colour
    ground: Colour
    moves: Literal["right", "down"]


DISC = Scene(
    name="disc",
    caption="a red disc moves to the right over a dark blue ground",
    shape="disc",
    colour=(230, 60, 50),
    ground=(20, 20, 60),
    moves="right",
)
SQUARE = Scene(
    name="square",
    caption="a blue square falls over a bright sandy ground",
    shape="square",
    colour=(60, 90, 230),
    ground=(240, 225, 190),
    moves="down",
)
SCENES = (DISC, SQUARE)


def draw(scene: Scene) -> list[Frame]:
    """Return the frames of a clip, uint8 (SIZE, SIZE, 3) each."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    radius = SIZE / 4
    frames = []
    for index in range(NUM_FRAMES):
        along = SIZE * (0.25 + 0.5 * index / (NUM_FRAMES - 1))
        x, y = (along, SIZE / 2) if scene.moves == "right" else (SIZE / 2, along)
        if scene.shape == "disc":
            inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
        else:
            inside = np.maximum(abs(columns - x), abs(rows - y)) <= radius
        frame = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
        frame[:] = scene.ground
        frame[inside] = scene.colour
        frames.append(frame)
    return frames


def write_scene(scene: Scene, folder: Path) -> Path:
    """Write `<folder>/<name>.mp4` and its caption beside it; return the clip's path."""
    clip = folder / f"{scene.name}.mp4"
    write_video(clip, draw(scene), FPS, crf=0)
    write_text(clip.with_suffix(".txt"), scene.caption + "\n")
    return clip
