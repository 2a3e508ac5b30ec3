"""What is held out is never seen in training: not as a clip, not as a caption."""

from __future__ import annotations

from itertools import product

import numpy as np

from tests.nano.readings import COLOURS, SHAPES, WAYS, words_of
from trainer.clipart.scenes import TRIGGER
from trainer.clipart.split import HELD_OUT, TRAINED, held_out_scene, training_scene

NUM = 5000


def test_the_two_parts_are_the_whole_and_have_nothing_in_common():
    assert set(HELD_OUT) | set(TRAINED) == set(product(COLOURS, SHAPES, WAYS))
    assert not set(HELD_OUT) & set(TRAINED)
    assert (len(HELD_OUT), len(TRAINED)) == (12, 60)


def test_everything_is_known_from_other_company():
    for part in (HELD_OUT, TRAINED):
        colours, shapes, directions = (set(column) for column in zip(*part, strict=True))
        assert colours == set(COLOURS)
        assert shapes == set(SHAPES)
        assert directions == set(WAYS)
    # Pairs, too: only the three together are new.
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(triple[first], triple[second]) for triple in TRAINED}
        assert {(triple[first], triple[second]) for triple in HELD_OUT} <= pairs


def test_no_training_caption_names_what_is_held_out():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(NUM):
        scene = training_scene(rng)
        (colour,), (shape,), (direction,) = words_of(scene.caption)
        assert (colour, shape, direction) == scene.triple
        assert TRIGGER not in scene.caption
        seen.add(scene.triple)
    assert seen == set(TRAINED)


def test_held_out_scenes_are_those_of_the_held_out_part():
    rng = np.random.default_rng(0)
    assert {held_out_scene(rng).triple for _ in range(500)} == set(HELD_OUT)
