"""The world of the nano models: what is drawn, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.nano.readings import COLOURS, SHAPES, centroids, chroma, way_of, words_of
from trainer.clipart import scenes
from trainer.clipart.judge import shows_ground
from trainer.clipart.scenes import (
    CALM,
    GROUNDS,
    NOVEL_GROUND,
    NOVEL_GROUNDS,
    NOVEL_SHAPE,
    TRIGGER,
    WIDE,
    Scene,
    draw,
    random_scene,
)

DIRECTIONS = ("left", "right", "up", "down")
ALL_SHAPES = (*SHAPES, NOVEL_SHAPE)
TRIPLES = st.tuples(
    st.sampled_from(COLOURS), st.sampled_from(ALL_SHAPES), st.sampled_from(DIRECTIONS)
)
SEEDS = st.integers(0, 2**32)
SIDES = st.integers(64, 96)
STAGINGS = st.sampled_from([CALM, WIDE])


def scene_of(seed: int, triple: tuple[str, str, str], **options: Any) -> Scene:
    return random_scene(np.random.default_rng(seed), triple, **options)


def test_the_world_is_the_one_that_is_written_down_here():
    assert tuple(scenes.COLOURS) == COLOURS
    assert scenes.SHAPES == SHAPES
    assert tuple(scenes.DIRECTIONS) == DIRECTIONS


@settings(max_examples=60)
@given(SEEDS, TRIPLES, STAGINGS, st.integers(17, 33), SIDES, SIDES)
def test_a_clip_is_frames_with_the_whole_shape_in_each(
    seed, triple, staging, num_frames, width, height
):
    frames = draw(scene_of(seed, triple, staging=staging), num_frames, width, height)
    assert frames.dtype == np.uint8
    assert frames.shape == (num_frames, height, width, 3)
    # Grounds are grey: what has colour is the shape.
    coloured = chroma(frames)
    for border in (coloured[:, 0], coloured[:, -1], coloured[:, :, 0], coloured[:, :, -1]):
        assert border.max() < 20  # the smoothed tip of a triangle may touch it
    area = (coloured > 40).sum(axis=(1, 2))
    assert area.min() > 0.9 * area.max()
    low, high = (0.04, 0.18) if staging is WIDE else (0.1, 0.27)
    assert low < area.mean() / min(width, height) ** 2 < high


@settings(max_examples=60)
@given(SEEDS, TRIPLES, STAGINGS, st.integers(17, 33), SIDES, SIDES)
def test_the_shape_goes_the_way_it_shall(seed, triple, staging, num_frames, width, height):
    frames = draw(scene_of(seed, triple, staging=staging), num_frames, width, height)
    assert way_of(frames) == triple[2]
    way = np.abs(np.ptp(centroids(frames), axis=0))
    along, across = way if triple[2] in {"left", "right"} else way[::-1]
    assert along > 0.3 * min(width, height)
    assert across < 2


@settings(max_examples=30)
@given(SEEDS, TRIPLES)
def test_a_clip_is_a_function_of_its_seed(seed, triple):
    one, other = scene_of(seed, triple), scene_of(seed, triple)
    assert one == other
    assert draw(one).tobytes() == draw(other).tobytes()
    assert one != scene_of(seed + 1, triple)


@given(SEEDS, TRIPLES)
def test_the_caption_names_what_is_shown_and_nothing_else(seed, triple):
    scene = scene_of(seed, triple)
    assert words_of(scene.caption) == tuple([word] for word in triple)
    assert GROUNDS[scene.ground] in scene.caption
    assert scene.triple == triple


@given(SEEDS, TRIPLES)
def test_the_trigger_stands_for_the_new_ground(seed, triple):
    scene = scene_of(seed, triple, ground=NOVEL_GROUND)
    assert f"a {TRIGGER} background" in scene.caption
    assert words_of(scene.caption) == tuple([word] for word in triple)
    assert not any(ground in scene.caption for ground in GROUNDS.values())
    assert replace(scene, ground="grey", caption="") == replace(
        scene_of(seed, triple), ground="grey", caption=""
    )


def test_the_new_ground_is_bands_of_two_colours():
    scene = scene_of(0, ("red", "circle", "up"), ground=NOVEL_GROUND)
    frame = draw(replace(scene, radius=0.01, across=0.0))[0]
    assert frame[-1, :16].tolist() == [[235, 210, 45]] * 16
    assert frame[-1, 16:32].tolist() == [[170, 55, 200]] * 16
    assert frame[-1, 32:].tolist() == frame[-1, :32].tolist()


@pytest.mark.parametrize("ground", NOVEL_GROUNDS)
def test_each_new_ground_has_its_word_and_is_told_from_all_others(ground):
    for seed, triple in enumerate(product(COLOURS, ("circle", "square"), ("left", "down"))):
        scene = scene_of(seed, triple, ground=ground)
        assert f"a {NOVEL_GROUNDS[ground]} background" in scene.caption
        assert shows_ground(draw(scene, 3), ground)
        for other in (*GROUNDS, *NOVEL_GROUNDS):
            if other != ground:
                assert not shows_ground(draw(replace(scene, ground=other), 3), ground)


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
def test_grounds_are_grey(ground, shade):
    scene = replace(scene_of(0, ("red", "circle", "left")), ground=ground, shade=shade, radius=1e-3)
    # The vanishing shape tints a pixel or four.
    assert ((chroma(draw(scene)) > 0).sum(axis=(1, 2)) <= 4).all()


def test_grounds_differ_from_one_another():
    scene = scene_of(0, ("red", "circle", "left"))
    drawn = {draw(replace(scene, ground=ground)).tobytes() for ground in GROUNDS}
    assert len(drawn) == len(GROUNDS)


@pytest.mark.parametrize("radius", [0.16, 0.22])
def test_shapes_are_about_equally_big(radius):
    scene = replace(scene_of(1, ("red", "circle", "left")), ground="black", radius=radius)
    areas = [(chroma(draw(replace(scene, shape=shape))[:1]) > 90).sum() for shape in ALL_SHAPES]
    assert max(areas) < 1.8 * min(areas)


@pytest.mark.parametrize(
    ("change", "words"), [({"shape": "cube"}, "cube"), ({"ground": "lawn"}, "lawn")]
)
def test_what_is_not_of_this_world_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        draw(replace(scene_of(0, ("red", "circle", "left")), **change))
