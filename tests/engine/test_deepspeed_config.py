"""What DeepSpeed is told, and every combination that must never reach it."""

from __future__ import annotations

import itertools

import pytest

from trainer.contract.errors import ConfigError
from trainer.engine.deepspeed_config import build_deepspeed_config, lint_deepspeed_config


def build(**options):
    return build_deepspeed_config(
        **{"zero_stage": 2, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0} | options
    )


def allowed(stage, bf16, accumulation, elementwise):
    """Return the matrix of deepspeed.md section 2, written down once more."""
    if not elementwise and stage > 0:
        return False  # silently another optimizer
    if bf16 and stage == 0:
        return False  # an extra step at the start
    return not (bf16 and stage == 1 and accumulation > 1)  # another optimizer class inside


@pytest.mark.parametrize(
    ("stage", "bf16", "accumulation", "elementwise"),
    list(itertools.product(range(4), (False, True), (1, 4), (False, True))),
)
def test_each_cell_of_the_matrix(stage, bf16, accumulation, elementwise):
    options = {
        "zero_stage": stage,
        "full_finetune_bf16": bf16,
        "gradient_accumulation_steps": accumulation,
        "elementwise_optimizer": elementwise,
    }
    if not allowed(stage, bf16, accumulation, elementwise):
        with pytest.raises(ConfigError) as caught:
            build(**options)
        assert all(problem.key == "distributed.zero_stage" for problem in caught.value.problems)
        return
    config = build(**options)
    assert config["zero_optimization"]["stage"] == stage
    assert ("bf16" in config) == bf16
    assert "fp16" not in config
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["gradient_clipping"] == (1.0 if stage else 0.0)
    assert ("data_types" in config) == (bf16 and accumulation > 1)


def test_stage_3_leaves_torch_alone_and_keeps_small_weights_whole():
    zero = build(zero_stage=3)["zero_optimization"]
    assert zero["memory_efficient_linear"] is False
    assert zero["stage3_param_persistence_threshold"] == 1_000_000
    assert (
        build(zero_stage=3, persistence_threshold=0)["zero_optimization"][
            "stage3_param_persistence_threshold"
        ]
        == 0
    )


def test_buckets_are_no_larger_than_what_is_trained():
    assert build(num_trained=1234)["zero_optimization"]["reduce_bucket_size"] == 1234
    assert build()["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_no_stage_4():
    with pytest.raises(ConfigError, match="not 0, 1, 2 or 3"):
        build(zero_stage=4)


TRAPS = {
    "misspelt clipping is ignored": ({"gradient_cliping": 1.0}, "gradient_cliping"),
    "misspelt zero is ignored": ({"zero_optimizaton": {}}, "zero_optimizaton"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16"),
    "elasticity": ({"elasticity": {}}, "elasticity"),
    "amp": ({"amp": {}}, "amp"),
    "sparse_attention": ({"sparse_attention": {}}, "sparse_attention"),
    "curriculum_learning": ({"curriculum_learning": {}}, "curriculum_learning"),
    "compression_training": ({"compression_training": {}}, "compression_training"),
    "progressive_layer_drop": ({"progressive_layer_drop": {}}, "progressive_layer_drop"),
    "prescale_gradients": ({"prescale_gradients": True}, "prescale_gradients"),
    "bf16 at stage 0": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}},
        "distributed.zero_stage",
    ),
    "fp32 sums of bf16 at stage 1": (
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
        },
        "distributed.zero_stage",
    ),
    "fp32 sums without bf16": (
        {"data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype",
    ),
    "round robin": (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "zero_optimization.round_robin_gradients",
    ),
    "mics": (
        {"zero_optimization": {"stage": 2, "mics_shard_size": 2}},
        "zero_optimization.mics_shard_size",
    ),
    "loco": (
        {"zero_optimization": {"stage": 2, "zeropp_loco_param": {}}},
        "zero_optimization.zeropp_loco_param",
    ),
    "linear replaced": (
        {"zero_optimization": {"stage": 3}},
        "zero_optimization.memory_efficient_linear",
    ),
    "clipping at stage 0": (
        {"gradient_clipping": 1.0, "zero_optimization": {"stage": 0}},
        "gradient_clipping",
    ),
    "offload of a torch optimizer": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "zero_force_ds_cpu_optimizer",
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_is_refused(name):
    changes, key = TRAPS[name]
    lint_deepspeed_config(build(), elementwise_optimizer=True)
    with pytest.raises(ConfigError) as caught:
        lint_deepspeed_config(build() | changes, elementwise_optimizer=True)
    assert key in {problem.key for problem in caught.value.problems}


def test_all_problems_are_reported_at_once():
    broken = build() | {"fp16": {}, "amp": {}, "bf16": {"enabled": True}}
    broken["zero_optimization"] = {"stage": 0}
    with pytest.raises(ConfigError) as caught:
        lint_deepspeed_config(broken, elementwise_optimizer=True)
    assert len(caught.value.problems) >= 3
