"""The judge names what is there, and nothing where there is nothing to name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.nano.readings import COLOURS, SHAPES, WAYS, way_of
from trainer.clipart.judge import look
from trainer.clipart.scenes import GROUNDS, Frames, Scene, draw, random_scene

NUM_SCENES = 192  # each of 6 colours, 4 shapes and 4 directions twice
COLOUR = (220, 40, 40)
FIELDS = ("colour", "shape", "direction")
Blob = Callable[[np.ndarray, np.ndarray], np.ndarray]
TO_THE_RIGHT = (1.5, 0.0)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(5)
    every = list(product(COLOURS, (*SHAPES, "cross"), WAYS))
    return [random_scene(rng, every[index % len(every)]) for index in range(NUM_SCENES)]


def noisy(video: Frames, rng: np.random.Generator) -> Frames:
    values = video + rng.normal(0, 10, video.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def blurred(video: Frames, rng: np.random.Generator) -> Frames:
    padded = np.pad(video.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = video.shape[1:3]
    parts = [padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.rint(np.mean(parts, axis=0)).astype(np.uint8)


def darker(video: Frames, rng: np.random.Generator) -> Frames:
    return np.rint(video * 0.75).astype(np.uint8)


def brighter(video: Frames, rng: np.random.Generator) -> Frames:
    return np.clip(video.astype(int) + 30, 0, 255).astype(np.uint8)


def everything(video: Frames, rng: np.random.Generator) -> Frames:
    return noisy(blurred(np.rint(video * 0.9).astype(np.uint8), rng), rng)


@pytest.mark.parametrize("change", [None, noisy, blurred, darker, brighter, everything])
def test_drawn_scenes_are_recognised(scenes, change):
    rng = np.random.default_rng(6)
    hits = []
    for scene in scenes:
        video = draw(scene)
        seen = look(video if change is None else change(video, rng))
        hits.append([getattr(seen, name) == getattr(scene, name) for name in FIELDS])
    shares = dict(zip(FIELDS, np.mean(hits, axis=0), strict=True))
    assert min(shares.values()) >= 0.99, shares


@pytest.mark.parametrize(("width", "height", "num_frames"), [(96, 64, 17), (64, 96, 33)])
def test_other_sizes_are_recognised(scenes, width, height, num_frames):
    for scene in scenes[::6]:
        seen = look(draw(scene, num_frames, width, height))
        assert (seen.colour, seen.shape, seen.direction) == scene.triple


def test_the_direction_is_that_of_another_reading(scenes):
    for scene in scenes[::3]:
        video = draw(scene)
        assert look(video).direction == way_of(video)


@pytest.mark.parametrize("ground", GROUNDS)
def test_an_empty_ground_shows_nothing(scenes, ground):
    seen = look(draw(replace(scenes[0], ground=ground, radius=1e-3)))
    assert (seen.colour, seen.shape, seen.direction, seen.overlap) == (None, None, None, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_shows_neither_shape_nor_direction(channels):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (17, 64, 64, channels), dtype=np.uint8)
    seen = look(np.broadcast_to(values, (17, 64, 64, 3)))
    assert (seen.shape, seen.direction) == (None, None)


def test_a_picture_of_one_colour_shows_no_shape():
    seen = look(np.full((17, 64, 64, 3), COLOUR, dtype=np.uint8))
    assert (seen.shape, seen.direction) == (None, None)


def moving(blob: Blob, way: tuple[float, float] = TO_THE_RIGHT) -> Frames:
    """Return a red blob that moves over grey by `way` pixels a frame."""
    frames = np.full((17, 64, 64, 3), 120, dtype=np.uint8)
    rows, columns = np.mgrid[0:64, 0:64] + 0.5
    for index, frame in enumerate(frames):
        x, y = (32 + step * (index - 8) for step in way)
        frame[blob(columns - x, rows - y)] = COLOUR
    return frames


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) < 11


OTHER_BLOBS: dict[str, Blob] = {
    "ring": lambda x, y: abs(np.hypot(x, y) - 10) < 2.5,
    "line": lambda x, y: (abs(y) < 1.5) & (abs(x) < 16),
    "bar": lambda x, y: (abs(y) < 3) & (abs(x) < 14),
    "brick": lambda x, y: (abs(y) < 6) & (abs(x) < 14),
    "two discs": lambda x, y: np.hypot(x, abs(y) - 9) < 6,
    "corner": lambda x, y: (np.maximum(abs(x), abs(y)) < 10) & ((x < -4) | (y > 4)),
    "star": lambda x, y: np.hypot(x, y) < 7 + 5 * np.cos(5 * np.arctan2(y, x)),
    "oblique cross": lambda x, y: (
        (np.minimum(abs(x + y), abs(x - y)) < 4) & (np.maximum(abs(x), abs(y)) < 11)
    ),
}


@pytest.mark.parametrize("name", OTHER_BLOBS)
def test_other_blobs_are_no_known_shape(name):
    seen = look(moving(OTHER_BLOBS[name]))
    assert seen.shape is None
    assert (seen.colour, seen.direction) == ("red", "right")


def test_the_blobs_are_told_apart_by_their_outline():
    assert look(moving(disc)).shape == "circle"
    assert look(moving(lambda x, y: np.maximum(abs(x), abs(y)) < 9)).shape == "square"


@pytest.mark.parametrize("way", [(0.0, 0.0), (0.1, 0.0), (0.9, 0.9), (-0.9, 0.7), (0.5, -0.8)])
def test_standing_still_and_going_aslant_are_no_direction(way):
    seen = look(moving(disc, way))
    assert seen.direction is None
    assert (seen.colour, seen.shape) == ("red", "circle")


def test_going_to_and_fro_is_no_direction():
    there = moving(disc)[:9]
    assert look(np.concatenate([there, there[::-1]])).direction is None


def test_a_flash_is_not_a_shape():
    video = moving(disc)
    video[3:] = 120
    assert look(video).shape is None


def test_a_shape_that_leaves_the_picture_is_judged_while_it_is_there():
    seen = look(moving(disc, (3.5, 0.0)))
    assert (seen.colour, seen.direction) == ("red", "right")
