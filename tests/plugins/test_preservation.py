"""Techniques that ask the model as it was: which items, with which texts, for which target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.contract.catalog import TECHNIQUES
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError
from trainer.contract.memory_model.techniques import base_forwards
from trainer.contract.variants import VARIANTS
from trainer.core.rng import generator
from trainer.core.seams import BuildContext, Technique
from trainer.core.types import Batch, NoisyInput
from trainer.jobs.build import technique_problems, technique_texts

ASKED: list[str] = []
TRIGGER = {"trigger": "sks dog", "class_word": "dog"}
SLIDER = {"positive": "old", "negative": "young", "target": "a person"}


def encoded(text: str) -> Tensor:
    """Return an embedding that tells its text."""
    ASKED.append(text)
    return torch.full((3, 4), float(sum(map(ord, text))))


def make(name: str, seed: int = 3, **options: Any) -> Technique:
    ASKED.clear()
    build = BuildContext(
        variant=VARIANTS["wan2.1-t2v-1.3b"],
        seed=seed,
        device=torch.device("cpu"),
        total_steps=1,
        encoded=encoded,
    )
    implementation: Any = TECHNIQUES.load(name)
    return implementation(implementation.Config(**options), build)


def batch_of(*captions: str, first: int = 0) -> Batch:
    return Batch(
        latents_BCFHW=torch.zeros(len(captions), 1, 1, 2, 2),
        context=tuple(encoded(caption) for caption in captions),
        captions=captions,
        item_seeds=tuple(range(first, first + len(captions))),
    )


NOISY = NoisyInput.mix(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2), torch.zeros(1))


def from_text(noisy: NoisyInput, batch: Batch) -> Tensor:
    """Predict a number of each item's text."""
    return torch.stack([item.mean() for item in batch.context]).view(-1, 1, 1, 1, 1)


def edited(technique: Technique, batch: Batch) -> Batch:
    return technique.edit_batch(batch, generator(0))


def test_a_share_of_the_items_keeps_the_answer_to_the_empty_prompt() -> None:
    technique = make("blank_prompt_preservation", blank_share=0.3)
    batch = batch_of(*["a cat"] * 1000)
    found = edited(technique, batch)
    blank = [caption == "" for caption in found.captions]
    assert 250 < sum(blank) < 350
    for row, is_blank in enumerate(blank):
        assert torch.equal(found.context[row], encoded("" if is_blank else "a cat"))
    target = torch.full((1000, 1, 1, 2, 2), 7.0)
    kept = technique.edit_target(target, found, NOISY, from_text)
    assert [bool((row == 0).all()) for row in kept] == blank
    assert all(
        bool((row == 7).all()) for row, is_blank in zip(kept, blank, strict=True) if not is_blank
    )
    # By the item, not by its batch.
    alone = edited(technique, batch_of("a cat", first=500))
    assert (alone.captions[0] == "") == blank[500]
    other = edited(make("blank_prompt_preservation", seed=4, blank_share=0.3), batch)
    assert [caption == "" for caption in other.captions] != blank


def test_without_a_chosen_item_nothing_is_asked() -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("another forward")

    for name, options in (("blank_prompt_preservation", {}), ("output_preservation", TRIGGER)):
        technique = make(name, **options)
        batch = batch_of("a cat")  # no trigger in it, and its seed is not among the tenth
        target = torch.ones(1, 1, 1, 2, 2)
        found = edited(technique, batch)
        assert found.captions == ("a cat",)
        assert technique.edit_target(target, found, NOISY, never) is target


def test_the_class_word_stands_for_the_trigger_in_a_share_of_the_items() -> None:
    technique = make("output_preservation", **TRIGGER, class_share=0.5)
    captions = ["an Sks Dog runs", "a cat sleeps", "sks dogs are many"] * 200
    found = edited(technique, batch_of(*captions))
    changed = [now != before for now, before in zip(found.captions, captions, strict=True)]
    assert {now for now, yes in zip(found.captions, changed, strict=True) if yes} == {"an dog runs"}
    assert 70 < sum(changed) < 130
    assert not any(changed[1::3] + changed[2::3]), "whole words only"
    target = torch.full((600, 1, 1, 2, 2), 7.0)
    kept = technique.edit_target(target, found, NOISY, from_text)
    said = float(sum(map(ord, "an dog runs")))
    assert [row.flatten()[0].item() for row in kept] == [said if yes else 7.0 for yes in changed]


def test_the_texts_that_must_be_encoded() -> None:
    techniques = [
        {"name": "output_preservation", **TRIGGER},
        {"name": "concept_slider", **SLIDER},
        {"name": "blank_prompt_preservation"},
        {"name": "text_token_dropout"},
    ]
    config = RunConfig.model_validate({"techniques": techniques})
    captions = ["a sks dog", "SKS DOG and sks dog", "nothing"]
    assert technique_texts(config, captions) == (
        "a dog", "dog and dog", "a person", "old", "young", "",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no caption of the dataset has the trigger") as found:
        technique_texts(config, ["nothing"])
    assert found.value.problems[0].key == "techniques[0]"


def test_a_slider_goes_from_one_prompt_towards_the_other() -> None:
    technique = make("concept_slider", **SLIDER, slider_scale=3.0)
    found = edited(technique, batch_of("a cat", "a house"))
    assert found.captions == ("a person", "a person")
    assert all(torch.equal(own, encoded("a person")) for own in found.context)
    target = technique.edit_target(torch.zeros(2, 1, 1, 2, 2), found, NOISY, from_text)
    person, old, young = (sum(map(ord, text)) for text in ("a person", "old", "young"))
    assert set(target.flatten().tolist()) == {person + 3.0 * (old - young)}


def test_text_tokens_are_dropped_one_by_one() -> None:
    technique = make("text_token_dropout", token_share=0.25)
    batch = replace(batch_of("x", "y"), context=(torch.ones(2000, 4), torch.ones(30, 4)))
    first, second = edited(technique, batch).context
    assert set(first.sum(1).tolist()) == {0.0, 4.0}, "whole tokens"
    assert 420 < int((first.sum(1) == 0).sum()) < 580
    alone = edited(technique, replace(batch, context=batch.context[1:], item_seeds=(1,)))
    assert torch.equal(alone.context[0], second)
    again = edited(technique, replace(batch, item_seeds=(7, 8)))
    assert not torch.equal(again.context[0], first)
    assert bool((batch.context[0] == 1).all()), "the batch is left as it was"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blank_prompt_preservation", {}),
        ("output_preservation", TRIGGER),
        ("concept_slider", SLIDER),
    ],
)
def test_what_they_need(name: str, options: dict[str, Any]) -> None:
    techniques = {"techniques": [{"name": name, **options}]}

    def words(**sections: Any) -> str:
        problems = technique_problems(RunConfig.model_validate(techniques | sections), 2)
        return " ".join(problem.message for problem in problems)

    assert words() == ""
    assert "as it was before training" in words(adapter={"kind": "none"})
    assert words(distributed={"zero_stage": 3}) == ""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blank_prompt_preservation", {"blank_share": 0.5}),
        ("output_preservation", {**TRIGGER, "class_share": 0.5}),
        ("masked_loss", {"prior_weight": 1.0}),
        ("masked_loss", {}),
        ("concept_slider", SLIDER),
    ],
)
def test_what_they_say_of_their_forwards_is_true(name: str, options: dict[str, Any]) -> None:
    """ZeRO-3 relies on it: a process that is wrong about them leaves the others waiting."""
    technique = make(name, **options)
    counts = []
    for first in range(20):
        batch = batch_of("a sks dog", first=first)
        if first % 2:
            batch = replace(batch, mask_B1FHW=torch.zeros(1, 1, 1, 2, 2))
        found = edited(technique, batch)
        said = technique.asks_base(found)
        calls: list[Batch] = []

        def counted(noisy: NoisyInput, batch: Batch, calls: list[Batch] = calls) -> Tensor:
            calls.append(batch)
            return from_text(noisy, batch).expand(1, 1, 1, 2, 2).clone()

        technique.edit_target(torch.zeros(1, 1, 1, 2, 2), found, NOISY, counted)
        counts.append(len(calls))
        assert said is None or len(calls) == said
    if name == "concept_slider":
        assert set(counts) == {3}
    else:
        assert set(counts) == ({0} if name == "masked_loss" and not options else {0, 1})


def test_the_estimate_counts_the_forwards() -> None:
    def count(batch_size: int, *techniques: dict[str, Any]) -> float:
        config = RunConfig.model_validate({"techniques": list(techniques)})
        return base_forwards(config, batch_size)

    assert count(4, {"name": "noise_offset"}) == 0
    assert count(1, {"name": "concept_slider", **SLIDER}) == 3
    assert count(1, {"name": "blank_prompt_preservation"}) == pytest.approx(0.1)
    assert count(2, {"name": "output_preservation", **TRIGGER}) == pytest.approx(1 - 0.75**2)
    both = ({"name": "masked_loss", "prior_weight": 1.0}, {"name": "concept_slider", **SLIDER})
    assert count(1, *both) == 4
