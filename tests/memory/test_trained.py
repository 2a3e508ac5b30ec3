"""What the estimate says is trained, against the real model and the real adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_configs import make_config
from safetensors.torch import save_file

from trainer.adapters.targets import linear_layers
from trainer.contract.catalog import ADAPTERS
from trainer.contract.config import RunConfig
from trainer.contract.memory_model.flops import step_flops
from trainer.contract.memory_model.phases import training_parts
from trainer.contract.memory_model.trained import find_targets
from trainer.contract.memory_model.weights import (
    block_layers,
    linear_shapes,
    num_parameters,
    parameter_sizes,
)
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.variants import VARIANTS, TransformerConfig, get_variant
from trainer.core.seams import BuildContext
from trainer.jobs.build import build_plugin
from trainer.models.wan.transformer import WanTransformer

TINY = TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=3, text_dim=32, freq_dim=16)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_sizes_are_those_of_the_model(name: str) -> None:
    shape = get_variant(name).transformer
    with torch.device("meta"):
        model = WanTransformer(shape, seed=None)
    real = {name: value.numel() for name, value in model.named_parameters()}
    assert parameter_sizes(shape) == real
    assert num_parameters(shape) == sum(real.values())
    layers = {n: (m.in_features, m.out_features) for n, m in linear_layers(model).items()}
    assert linear_shapes(shape) == layers


def injected(config: RunConfig, shape: TransformerConfig) -> Any:
    build = BuildContext(
        variant=get_variant("wan2.1-t2v-1.3b"), seed=0, device=torch.device("cpu"), total_steps=9
    )
    adapter = build_plugin(config.adapter, "kind", build, where="adapter")
    adapter.inject(WanTransformer(shape), 0)
    return adapter


def compare(options: dict[str, Any]) -> None:
    config = RunConfig.model_validate({"adapter": options, "training": {"max_steps": 1}})
    targets = find_targets(config, TINY)
    adapter = injected(config, TINY)
    trained = adapter.trainable()
    assert targets.parameters == sum(value.numel() for value in trained.values())
    assert targets.largest == pytest.approx(max(v.numel() for v in trained.values()), abs=1)
    own = options["kind"] == "none"
    real = sorted(tuple(value.shape) for value in trained.values())
    if own:  # what is no matrix of a linear layer is told by its length
        matrices = {f"{name}.weight" for name in linear_shapes(TINY)}
        real = sorted(
            tuple(value.shape) if name in matrices else (value.numel(),)
            for name, value in trained.items()
        )
    assert sorted(targets.shapes) == real
    if not own:
        written = adapter.updates({name: value.detach() for name, value in trained.items()})
        tensors = [tensor for update in written.values() for tensor in update.tensors().values()]
        assert targets.output == sum(tensor.numel() for tensor in tensors)
    names = {name if own else name.rpartition(".")[0] for name in trained}
    assert {part.name for part in targets.parts} >= names


@pytest.mark.parametrize("kind", ADAPTERS.names)
def test_every_kind_trains_as_many_parameters_as_the_estimate_says(kind: str) -> None:
    compare({"kind": kind})


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "cross_attention", "rank": 5},
        {"exclude": [r"blocks\.<0-1>\..*"], "include": [r"head\.head", "text_embedding.2"]},
        {"rank": 4, "rank_pattern": {r".*\.ffn\..*": 7, r"blocks\.2\..*": 2}},
        {"rank": 3, "init": "pissa"},
        {"kind": "loha", "rank": 3, "rank_pattern": {r".*\.ffn\..*": 7}},
        {"kind": "lokr", "rank": 1, "factor": 4, "decompose_both": True},
        {"kind": "lokr", "rank": 2, "rank_pattern": {r".*\.ffn\..*": 700}},
        {"kind": "dora", "rank": 5},
        {"kind": "none", "targets": "ffn"},
        {"kind": "none", "exclude": [".*"], "include": [r"blocks\.1", ".*norm3", "head"]},
    ],
    ids=str,
)
def test_choices_are_those_of_the_adapter(options: dict[str, Any]) -> None:
    compare({"kind": "lora", **options})


def test_pissa_keeps_as_much_again_and_writes_twice_the_rank() -> None:
    plain, pissa = (
        find_targets(
            make_config(adapter={"init": init}), get_variant("wan2.1-t2v-1.3b").transformer
        )
        for init in ("kaiming", "pissa_niter_4")
    )
    assert plain.held == 0
    assert pissa.parameters == pissa.held == plain.parameters
    assert pissa.output == 2 * plain.output


def test_a_chosen_part_of_the_model_writes_a_whole_model() -> None:
    shape = get_variant("wan2.1-t2v-1.3b").transformer
    part = find_targets(make_config(full=True, adapter={"targets": "ffn"}), shape)
    assert part.parameters == 30 * (2 * 1536 * 8960 + 1536 + 8960)
    assert part.output == num_parameters(shape)
    assert not part.front
    assert find_targets(make_config(full=True), shape).front


def test_frozen_adapters_are_counted_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 1000)}, path)
    for expert, number in (("low_noise", 1), ("high_noise", 2)):
        both = [{"path": path}, {"path": path, "expert": "high_noise"}]
        config = make_config("wan2.2-t2v-a14b", adapter={"frozen": both}, model={"expert": expert})
        assert training_parts(workload_of(config))["frozen adapters"] == number * 4000 * 2
    assert "frozen adapters" not in training_parts(workload_of(make_config()))


def test_products_of_the_kinds_count_in_the_time_of_a_step() -> None:
    def lora(**adapter: Any) -> float:
        return step_flops(workload_of(make_config(adapter={"rank": 16, **adapter}))).lora

    plain, shape = lora(kind="lora"), get_variant("wan2.1-t2v-1.3b").transformer
    layers = block_layers(shape).values()
    widths, matrices = (sum(map(count, layers)) for count in (sum, math.prod))
    assert lora(kind="dora") == plain
    assert lora(kind="loha") == pytest.approx(plain * matrices / (16 * widths))
    # 1536 is cut into 32 · 48, so that a token takes 32 · 48 · (48 + 32) multiplications.
    only = {"exclude": [".*"], "include": [r".*\.self_attn\.q"]}
    assert lora(kind="lokr", **only) == pytest.approx(
        lora(kind="lora", **only) * 32 * 48 * 80 / (16 * 2 * 1536)
    )
