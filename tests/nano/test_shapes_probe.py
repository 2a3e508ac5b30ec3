"""The probe `shapes`: what it asks for, and that it counts what it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.nano.readings import words_of
from trainer.clipart.scenes import NOVEL_GROUND, TRIGGER, Frames, Scene, draw
from trainer.clipart.split import HELD_OUT
from trainer.contract.catalog import PROBES
from trainer.contract.variants import VARIANTS
from trainer.core.seams import BuildContext
from trainer.probes.shapes import Shapes

NUM = 12
BUILD = BuildContext(
    variant=VARIANTS["wan2.1-t2v-1.3b"], seed=0, device=torch.device("cpu"), total_steps=1
)
NAMES = {
    "concept_with_trigger",
    "concept_leak",
    "prior_colour",
    "prior_shape",
    "prior_direction",
}


def probe_of(**options: object) -> Shapes:
    return Shapes(Shapes.Config(**{"num_shots": NUM, **options}), BUILD)


def drawn_from(
    prompt: str, *, shape: str = "", colour: str = "", direction: str = "", ground: str = ""
) -> Frames:
    """Draw what a prompt says, the trigger as the new ground; a word given replaces its own."""
    colours, shapes, directions = words_of(prompt)
    scene = Scene(
        colour=colour or colours[0],
        shape=shape or shapes[0],
        direction=direction or directions[0],
        ground=ground or (NOVEL_GROUND if TRIGGER in prompt else "grey"),
        caption=prompt,
    )
    return draw(scene)


@pytest.fixture(scope="module")
def probe() -> Shapes:
    return probe_of()


@pytest.fixture(scope="module")
def prompts(probe: Shapes) -> list[str]:
    return [shot.prompt for shot in probe.shots()]


@pytest.fixture(scope="module")
def right(prompts: list[str]) -> list[Frames]:
    return [drawn_from(prompt) for prompt in prompts]


def test_half_of_the_shots_have_the_trigger_and_half_are_held_out(probe, prompts):
    assert len(prompts) == 2 * NUM
    assert all(TRIGGER in prompt.split() for prompt in prompts[:NUM])
    assert not any(TRIGGER in prompt for prompt in prompts[NUM:])
    for prompt in prompts:
        (colour,), (shape,), (direction,) = words_of(prompt)
        assert (colour, shape, direction) in HELD_OUT


def test_shots_are_the_same_each_time(probe):
    assert probe.shots() == probe.shots() == probe_of().shots()
    assert [shot.seed for shot in probe.shots()] == list(range(5000, 5000 + 2 * NUM))
    other = probe_of(first_seed=7).shots()
    assert [shot.seed for shot in other] == list(range(7, 7 + 2 * NUM))
    assert [shot.prompt for shot in other] != [shot.prompt for shot in probe.shots()]
    assert len(PROBES.load("shapes")(Shapes.Config(), BUILD).shots()) == 48


def test_the_trigger_can_be_another_word():
    shots = probe_of(trigger="flumph").shots()
    assert ["flumph" in shot.prompt.split() for shot in shots] == [True] * NUM + [False] * NUM


def test_another_new_ground_has_another_word():
    probe = probe_of(ground="tiles")
    prompts = [shot.prompt for shot in probe.shots()]
    assert all("a vesk background" in prompt for prompt in prompts[:NUM])
    videos = [drawn_from(prompt, ground="tiles") for prompt in prompts[: NUM + 3]]
    videos += [drawn_from(prompt) for prompt in prompts[NUM + 3 :]]
    figures = probe.judge(videos)
    assert (figures["concept_with_trigger"], figures["concept_leak"]) == (1.0, 3 / NUM)


def test_what_was_asked_for_scores_one(probe, right):
    figures = probe.judge(right)
    assert set(figures) == NAMES
    assert figures.pop("concept_leak") == 0
    assert set(figures.values()) == {1.0}


def test_nothing_scores_nothing(probe):
    grey = [np.full((17, 64, 64, 3), 120, dtype=np.uint8)] * (2 * NUM)
    assert set(probe.judge(grey).values()) == {0.0}


def test_known_grounds_in_place_of_the_new_one_are_counted(probe, prompts, right):
    videos = list(right)
    for index in range(3):
        videos[index] = drawn_from(prompts[index], ground="checks")
    assert probe.judge(videos) == {
        **dict.fromkeys(NAMES, 1.0),
        "concept_with_trigger": pytest.approx(9 / 12),
        "concept_leak": 0.0,
    }


def test_new_grounds_that_nobody_asked_for_are_counted(probe, prompts, right):
    videos = list(right)
    for index in range(NUM, NUM + 6):
        videos[index] = drawn_from(prompts[index], ground=NOVEL_GROUND)
    assert probe.judge(videos)["concept_leak"] == 0.5


def test_colour_and_direction_are_counted_apart(probe, prompts, right):
    videos = list(right)
    other = {"left": "right", "right": "up", "up": "down", "down": "left"}
    for index in (0, 1, NUM):
        videos[index] = drawn_from(prompts[index], direction=other[words_of(prompts[index])[2][0]])
    for index in (2, NUM + 1, NUM + 2):
        colour = "red" if words_of(prompts[index])[0] != ["red"] else "blue"
        videos[index] = drawn_from(prompts[index], colour=colour)
    assert probe.judge(videos) == {
        **dict.fromkeys(NAMES, 1.0),
        "concept_leak": 0.0,
        "prior_direction": pytest.approx(11 / 12),
        "prior_colour": pytest.approx(10 / 12),
    }


def test_a_video_too_many_is_a_mistake(probe, right):
    with pytest.raises(ValueError, match="zip"):
        probe.judge(right[:-1])
