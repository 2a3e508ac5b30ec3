"""What patterns, presets and files choose. Expected names are written out or told by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.contract.errors import ConfigError
from trainer.contract.lora_header import FileLayer
from trainer.contract.targets import plan_layers, plan_parameters
from trainer.contract.toml_lines import locate

INSIDE = (
    *(f"{attention}.{letter}" for attention in ("self_attn", "cross_attn") for letter in "qkvo"),
    "ffn.0",
    "ffn.2",
)
NAMES = (
    "text_embedding.0",
    "time_projection.1",
    *(f"blocks.{index}.{name}" for index in range(12) for name in INSIDE),
    "head.head",
)


def chosen(**options: Any) -> list[str]:
    return list(plan_layers(NAMES, {"rank": 8, **options}))


def refusal(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan_layers(NAMES, {"rank": 8, **options})
    return caught.value


@pytest.mark.parametrize(
    ("preset", "inside"),
    [
        ("all", INSIDE),
        ("attention", INSIDE[:8]),
        ("self_attention", INSIDE[:4]),
        ("cross_attention", INSIDE[4:8]),
        ("ffn", INSIDE[8:]),
    ],
)
def test_presets_choose_of_every_block(preset: str, inside: tuple[str, ...]) -> None:
    expected = [f"blocks.{index}.{name}" for index in range(12) for name in inside]
    assert chosen(targets=preset) == expected


def test_include_brings_back_what_exclude_took_and_what_is_outside() -> None:
    first = chosen(include=[r"blocks\.0\..*"], exclude=[".*"])
    assert first == [name for name in NAMES if name.startswith("blocks.0.")]
    assert chosen(targets="ffn", include=[r"head\.head"])[-1] == "head.head"
    assert not any(".ffn." in name for name in chosen(exclude=[r".*\.ffn\..*"]))


def test_a_range_stands_for_its_numbers() -> None:
    blocks = {int(n.split(".")[1]) for n in chosen(include=[r"blocks\.<9-11>\..*"], exclude=[".*"])}
    assert blocks == {9, 10, 11}


def test_of_several_patterns_the_first_counts() -> None:
    plan = plan_layers(
        NAMES,
        {
            "rank": 8,
            "alpha": 4.0,
            "targets": "self_attention",
            "rank_pattern": {r".*\.q": 32, r"blocks\.0\..*": 2},
            "alpha_pattern": {r"blocks\.<0-1>\..*": 1.0},
            "lr_pattern": {r"blocks\.11\..*": 0.25},
        },
    )
    told = {name: (layer.rank, layer.alpha, layer.lr_factor) for name, layer in plan.items()}
    assert told["blocks.0.self_attn.q"] == (32, 1.0, 1.0)
    assert told["blocks.0.self_attn.k"] == (2, 1.0, 1.0)
    assert told["blocks.5.self_attn.q"] == (32, 4.0, 1.0)
    assert told["blocks.11.self_attn.v"] == (8, 4.0, 0.25)


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"include": ["blocks.0"]}, "adapter.include", ["'blocks.0'", "matches none"]),
        ({"exclude": ["self_attn.q"]}, "adapter.exclude", ["'self_attn.q'", "whole name"]),
        ({"include": ["("]}, "adapter.include", ["not a regular expression"]),
        ({"include": [r"blocks\.<5-3>\..*"]}, "adapter.include", ["<5-3>"]),
        ({"exclude": [".*"]}, "adapter.exclude", ["leaves none"]),
        ({"include": ["patch_embedding"]}, "adapter.include", ["matches none"]),
        (
            {"rank_pattern": {r"blocks\.40\..*": 4}},
            r"adapter.rank_pattern.blocks\.40\..*",
            ["matches none"],
        ),
        ({"alpha_pattern": {"[": 4.0}}, "adapter.alpha_pattern.[", ["not a regular"]),
        # It matches a layer of the model, but none that is trained.
        (
            {"targets": "ffn", "lr_pattern": {r".*\.q": 0.1}},
            r"adapter.lr_pattern..*\.q",
            ["trained"],
        ),
        ({"rank": "from_weights"}, "adapter.rank", ["none is given"]),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], key: str, words: list[str]):
    (problem,) = refusal(**options).problems
    assert problem.key == key
    for word in words:
        assert word in str(problem)


def test_all_problems_are_told_at_once() -> None:
    problems = refusal(include=["a", "b"], exclude=["c"], lr_pattern={"d": 1.0}).problems
    assert [problem.key for problem in problems] == [
        "adapter.include",
        "adapter.include",
        "adapter.exclude",
        "adapter.lr_pattern.d",
    ]


FILE = {
    name: FileLayer(key=f"diffusion_model.{name}.lora_A.weight", rank=4, inputs=8, outputs=8)
    for name in ("blocks.1.ffn.2", "blocks.0.self_attn.q")
}


def test_from_weights_takes_layers_and_ranks_of_the_file() -> None:
    plan = plan_layers(NAMES, {"rank": "from_weights", "init_from": "a"}, FILE)
    assert {name: layer.rank for name, layer in plan.items()} == {
        "blocks.0.self_attn.q": 4,
        "blocks.1.ffn.2": 4,
    }


def test_a_file_of_other_layers_or_ranks_is_refused_by_name_and_key() -> None:
    only = {"exclude": [".*"], "init_from": "old.safetensors"}
    three = [r"blocks\.0\.self_attn\.[qk]", r"blocks\.1\.ffn\.2"]

    def told(**options: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            plan_layers(NAMES, {**only, **options}, FILE)
        assert all("old.safetensors" in problem.message for problem in caught.value.problems)
        return [str(problem) for problem in caught.value.problems]

    (lost,) = told(rank=4, include=[r"blocks\.0\.self_attn\.q"])
    assert "diffusion_model.blocks.1.ffn.2.lora_A.weight" in lost
    (absent,) = told(rank=4, include=three)
    assert "blocks.0.self_attn.k" in absent
    (rank,) = told(rank=8, include=[r"blocks\.0\.self_attn\.q", r"blocks\.1\.ffn\.2"])
    assert "has rank 4, 8 is trained" in rank
    beyond = {"blocks.99.ffn.0": FileLayer(key="k99", rank=4, inputs=8, outputs=8)}
    with pytest.raises(ConfigError, match="another model: k99"):
        plan_layers(NAMES, {"rank": "from_weights", "init_from": "x"}, {**FILE, **beyond})


@pytest.mark.parametrize("rank", [4, "from_weights"])
def test_a_slot_starts_from_a_file_of_that_slot_alone(rank: object) -> None:
    loraid = {"slot": 2, "slots": 12, "granularity": "block"}
    options = {"rank": rank, "init_from": "old.safetensors", "loraid": loraid}
    of_slot = {
        name: FileLayer(key=f"k.{name}", rank=4, inputs=8, outputs=8)
        for name in NAMES
        if name.startswith("blocks.1.")
    }
    assert list(plan_layers(NAMES, options, of_slot)) == [f"blocks.1.{name}" for name in INSIDE]
    more = {**of_slot, "blocks.0.ffn.0": FileLayer(key="k0", rank=4, inputs=8, outputs=8)}
    with pytest.raises(ConfigError, match="would be lost: k0") as caught:
        plan_layers(NAMES, options, more)
    assert "of this slot" in str(caught.value)


PARAMETERS = tuple(
    f"blocks.{index}.{name}"
    for index in range(3)
    for name in ("modulation", "self_attn.q.weight", "self_attn.q.bias", "norm3.weight")
)


def test_parameters_are_chosen_by_their_name_or_a_module_around_them() -> None:
    assert list(plan_parameters(PARAMETERS, {})) == list(PARAMETERS)
    one = plan_parameters(PARAMETERS, {"exclude": [".*"], "include": [r"blocks\.1"]})
    assert list(one) == list(PARAMETERS[4:8])
    weights = plan_parameters(PARAMETERS, {"exclude": [r".*\.bias", ".*norm3", ".*modulation"]})
    assert list(weights) == [name for name in PARAMETERS if name.endswith("q.weight")]
    attention = plan_parameters(
        PARAMETERS, {"targets": "attention", "lr_pattern": {r"blocks\.2": 0.5}}
    )
    assert attention["blocks.2.self_attn.q.bias"] == 0.5
    assert attention["blocks.1.self_attn.q.bias"] == 1.0
    assert not any("norm3" in name for name in attention)


def test_the_line_of_a_key_that_is_a_pattern_is_that_of_its_table() -> None:
    lines = {"adapter.rank_pattern": 7}
    assert locate(r"adapter.rank_pattern.blocks\.[0-9]\..*", lines) == 7
    assert locate(r"adapter.rank_pattern.(.*[ab])", lines) == 7
