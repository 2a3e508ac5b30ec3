"""What kinds of adapter refuse: key, reason, way out; and what the estimate knows of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters.kinds import make_updates
from tests.adapters.tiny_models import make_transformer
from trainer.adapters.formats.writer import save_adapter
from trainer.adapters.targets import linear_layers
from trainer.contract.adapter_kind_rules import OUTER_LAYERS
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.memory_model.adapter_kinds import HELD, TRAINED_PARAMETERS
from trainer.contract.memory_model.trained import find_targets
from trainer.contract.memory_model.training import standing_parts
from trainer.contract.memory_model.workload import workload_of
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
        ({"kind": "singlora", "init_from": "x"}, {}, "adapter.ramp_steps", "over 1000"),
        ({"kind": "vera", "init_from": "x", "d_initial": 0.1}, {}, "adapter.d_initial", "begin"),
        (
            {"kind": "lokr", "init_from": "x", "rank": "from_weights", "factor": 8},
            {},
            "adapter.factor",
            "those of the file",
        ),
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
    assert HELD["vera"]({}, [({"rank": 6}, size) for _, size in layers]) == held


@pytest.mark.parametrize("limit", [None, 3, 100])
@pytest.mark.parametrize("steps", [1, 4, 5, 9, 12])
@pytest.mark.parametrize("first", [0, 5])
def test_the_estimate_counts_what_relora_has_frozen_at_the_end(tmp_path, steps, limit, first):
    """Against a run of so many steps, with the output that it leaves."""
    options = {
        "kind": "relora",
        "rank": 2,
        "restart_every_steps": 4,
        "restart_warmup_steps": 1,
        "frozen_max_rank": limit,
        "targets": "ffn",
    }
    model = make_transformer(num_layers=1)
    if first:
        names = [n for n in linear_layers(model) if n.startswith("blocks.") and ".ffn." in n]
        path = tmp_path / "old.safetensors"
        save_adapter(make_updates(model, "lora", names=names, rank=first), path)
        options["init_from"] = str(path)
    config = config_of(options, training={"max_steps": steps})
    build = BuildContext(
        variant=get_variant("wan2.1-t2v-1.3b"), seed=0, device=torch.device("cpu"), total_steps=1
    )
    relora: Any = ADAPTERS.load("relora")
    adapter = relora(relora.Config(**{k: v for k, v in options.items() if k != "kind"}), build)
    adapter.inject(model, 0)
    (restarts,) = adapter.techniques()
    restarts.connect(Weights(adapter))
    held, written = [], []
    for step in range(1, steps + 1):
        held.append(frozen(adapter))
        for layer in adapter.trained_layers().values():
            layer.up.data.normal_()
        state = {n: p.detach() for n, p in adapter.trainable().items()}
        restarts.after_step(step)
        written.append(sum(update.num_parameters for update in adapter.updates(state).values()))
    targets = find_targets(config, model.config)
    assert targets.held == max(*held, frozen(adapter))
    if limit is None:
        assert targets.held == frozen(adapter)
    sides = sum(layer.in_features + layer.out_features for layer in adapter._layers.values())
    widths = {layer.branch.width for block in targets.blocks for _, layer in block.layers}
    assert widths == {max(held) // sides + 2}
    assert targets.output == max(held) + 2 * sides
    assert targets.parameters == 2 * sides


def frozen(adapter: Any) -> int:
    return sum(p.down.numel() + p.up.numel() for p in adapter.frozen_parts().values())


class Weights:
    """What a restart asks of an engine."""

    has_elementwise_state = True

    def __init__(self, adapter: Any) -> None:
        self._adapter = adapter

    def overwrite(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._adapter.trainable().items():
            parameter.data.copy_(values[name])

    def scale_state(self, factors: dict[str, torch.Tensor]) -> None:
        assert factors.keys() == self._adapter.trainable().keys()


def test_steps_of_relora_make_a_larger_estimate():
    """By the frozen factors in float32 and more, with a limit by no more than it allows."""

    def standing(steps: int, **options: Any) -> float:
        adapter = {"kind": "relora", "restart_every_steps": 500, **options}
        config = config_of(
            adapter, training={"max_steps": steps}, model={"variant": "wan2.1-t2v-1.3b"}
        )
        return standing_parts(workload_of(config))["adapter"]

    both = {"variant": "wan2.2-t2v-a14b", "expert": "both"}
    one, two = (
        standing_parts(
            workload_of(
                config_of(
                    {"kind": "relora", "restart_every_steps": 500},
                    training={"max_steps": 500},
                    model=model,
                )
            )
        )["adapter"]
        for model in ({**both, "expert": "low_noise"}, both)
    )
    assert two == 2 * one
    first = standing(499)
    sides = 1_367_040
    assert standing(500) - first == 16 * sides * 4
    assert standing(5000) - first == 10 * 16 * sides * 4
    assert standing(5000, frozen_max_rank=64) - first == 64 * sides * 4
