"""What kinds of adapter refuse: key, reason, way out; and what the estimate knows of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters.tiny_models import make_transformer
from trainer.adapters.targets import linear_layers
from trainer.contract.adapter_kind_rules import OUTER_LAYERS
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.memory_model.adapter_kinds import HELD, TRAINED_PARAMETERS
from trainer.contract.variants import get_variant
from trainer.core.seams import BuildContext

KINDS = ("tlora", "singlora", "relora", "ggpo", "vera")


def config_of(adapter: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"adapter": adapter, **sections})


@pytest.mark.parametrize(
    ("adapter", "sections", "key", "words"),
    [
        ({"kind": "tlora", "rank": 4, "min_rank": 5}, {}, "adapter.min_rank", "(5)"),
        ({"kind": "tlora", "min_rank": 17}, {}, "adapter.min_rank", "(16)"),
        ({"kind": "tlora", "include": ["head.*"]}, {}, "adapter.include", "head.head"),
        (
            {"kind": "relora", "restart_every_steps": 40},
            {},
            "adapter.restart_warmup_steps",
            "still be rising",
        ),
        ({"kind": "relora"}, {"distributed": {"zero_stage": 3}}, "distributed.zero_stage", "shard"),
        ({"kind": "relora"}, {"optimizer": {"kind": "adamw8bit"}}, "optimizer.kind", "8-bit"),
        ({"kind": "ggpo", "sigma": 0, "beta": 0}, {}, "adapter.sigma", "plain LoRA"),
        ({"kind": "ggpo"}, {"distributed": {"zero_stage": 3}}, "distributed.zero_stage", "norms"),
        ({"kind": "ggpo"}, {"memory": {"compile_blocks": True}}, "memory.compile_blocks", "noise"),
    ],
)
def test_what_cannot_work_is_told(adapter, sections, key, words):
    problems = check_rules(config_of(adapter, **sections))
    assert [(problem.key, words in problem.message) for problem in problems] == [(key, True)]
    assert problems[0].hint


@pytest.mark.parametrize("kind", KINDS)
def test_as_declared_each_kind_is_fine(kind):
    assert check_rules(config_of({"kind": kind})) == []
    assert check_rules(config_of({"kind": kind, "include": ["("]})) == []


def test_a_restart_that_forgets_nothing_needs_no_elementwise_state():
    adapter = {"kind": "relora", "optimizer_reset_ratio": 0.0}
    assert check_rules(config_of(adapter, optimizer={"kind": "adamw8bit"})) == []


def test_outer_layers_are_those_of_the_model():
    linears = linear_layers(make_transformer(image=True))
    assert set(OUTER_LAYERS) == {name for name in linears if not name.startswith("blocks.")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"rank": 5}])
def test_the_estimate_counts_what_is_trained(kind, options):
    implementation: Any = ADAPTERS.load(kind)
    build = BuildContext(
        variant=get_variant("wan2.1-t2v-1.3b"), seed=0, device=torch.device("cpu"), total_steps=1
    )
    model = make_transformer(num_layers=1)
    sizes = {n: (m.in_features, m.out_features) for n, m in linear_layers(model).items()}
    adapter = implementation(implementation.Config(**options), build)
    adapter.inject(model, 0)
    counted: dict[str, int] = {}
    for name, parameter in adapter.trainable().items():
        layer = name.rpartition(".")[0]
        counted[layer] = counted.get(layer, 0) + parameter.numel()
    own = adapter.config.model_dump()
    assert counted == {name: TRAINED_PARAMETERS[kind](own, *sizes[name]) for name in counted}


def test_the_estimate_counts_what_is_held():
    model = make_transformer(num_layers=2)
    build = BuildContext(
        variant=get_variant("wan2.1-t2v-1.3b"), seed=0, device=torch.device("cpu"), total_steps=1
    )
    sizes = {n: (m.in_features, m.out_features) for n, m in linear_layers(model).items()}
    layers = [({}, size) for name, size in sizes.items() if name.startswith("blocks.")]
    ggpo: Any = ADAPTERS.load("ggpo")
    adapter = ggpo(ggpo.Config(), build)
    adapter.inject(model, 0)
    norms = sum(2 * layer.weight_norms_O.numel() for layer in adapter.perturbed_layers().values())
    assert HELD["ggpo"]({}, layers) == norms
    vera: Any = ADAPTERS.load("vera")
    adapter = vera(vera.Config(rank=6), build)
    adapter.inject(make_transformer(num_layers=2), 0)
    held = sum(tensor.numel() for tensor in adapter._projections._made.values())
    assert HELD["vera"]({"rank": 6}, layers) == held
    assert HELD["relora"]({}, layers) == 0
    assert HELD["relora"]({"frozen_max_rank": 2}, layers) == 2 * sum(
        map(sum, (s for _, s in layers))
    )
