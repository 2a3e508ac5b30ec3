"""What `auto` becomes: by trying every value, and by what is said where nothing will do."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from memory_configs import make_config

from trainer.contract.config import RunConfig
from trainer.contract.config_rules import check_rules
from trainer.contract.errors import ConfigError, RunError
from trainer.contract.memory_model import (
    Clip,
    Estimate,
    estimate,
    find_fit,
    find_gpu,
    gpu_of_memory,
    resolve_memory,
)
from trainer.contract.memory_model.denoising import WorkingSet
from trainer.contract.memory_model.header import sizes_of_file, variant_of_file
from trainer.contract.memory_model.stack import training_peak
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.variants import VARIANTS

AUTO = {"blocks_to_swap": "auto", "gradient_checkpointing": "auto"}
LAYERS = 12
SAMPLES = {"every_steps": 5, "prompts": [{"prompt": "a", "width": 1280, "height": 720}]}


def small(**setting: Any) -> RunConfig:
    """Return a 14B model with few blocks, so that every value can be tried."""
    return make_config("wan2.1-t2v-14b", num_layers=LAYERS, **{"frames": 81, **setting})


def phases_of(config: RunConfig) -> tuple[str, ...]:
    return ("training", "sampling") if config.sampling.every_steps else ("training",)


def judged(config: RunConfig, gib: float) -> Estimate:
    """Return the estimate of what decides, on an RTX 4090 with that much memory."""
    return estimate(config, gpu_of_memory(gib, "RTX 4090")).only(*phases_of(config))


def every_value(own: dict[str, Any], **setting: Any) -> list[RunConfig]:
    """Return the config with each value in the place of each `auto`."""
    tried = {
        "blocks_to_swap": range(LAYERS + 1),
        "gradient_checkpointing": (False, 4, 3, 2, True),
    }
    fields = [field for field, value in own.items() if value == "auto"]
    configs = [
        small(**setting, memory={**own, **dict(zip(fields, values, strict=True))})
        for values in product(*(tried[field] for field in fields))
    ]
    return [config for config in configs if not check_rules(config)]


@pytest.mark.parametrize("gib", [16, 18, 20, 24, 32, 48, 80])
@pytest.mark.parametrize(
    "own",
    [
        AUTO,
        {"blocks_to_swap": "auto"},
        {"gradient_checkpointing": "auto"},
        {"gradient_checkpointing": "auto", "blocks_to_swap": 5},
        {**AUTO, "keep_attention": True},
        {**AUTO, "weight_format": "fp8_scaled", "offload_checkpoints": True},
    ],
)
@pytest.mark.parametrize("setting", [{}, {"sampling": SAMPLES}])
def test_no_other_value_fits_and_is_faster(
    gib: float, own: dict[str, Any], setting: dict[str, Any]
) -> None:
    resolved = resolve_memory(small(**setting, memory=own), gpu_of_memory(gib, "RTX 4090"))
    assert not resolved.config.memory.automatic
    assert not check_rules(resolved.config)
    assert resolved.judged is not None
    mine = judged(resolved.config, gib)
    assert mine.peak_bytes == resolved.judged.peak_bytes
    tried = [(judged(other, gib), other) for other in every_value(own, **setting)]
    fitting = [(result, other) for result, other in tried if result.verdict == "fits"]
    if not fitting:
        assert resolved.judged.verdict != "fits"
        assert mine.peak_bytes == min(result.peak_bytes for result, _ in tried)
        return
    assert resolved.judged.verdict == "fits"
    assert mine.step_seconds is not None
    assert mine.step_seconds <= min(result.step_seconds or 0 for result, _ in fitting) * (1 + 1e-9)
    if resolved.config.memory.swapped_blocks and own.get("blocks_to_swap") == "auto":
        every = resolved.config.memory.gradient_checkpointing
        fewest = min(
            other.memory.swapped_blocks
            for _, other in fitting
            if other.memory.gradient_checkpointing == every
        )
        assert resolved.config.memory.swapped_blocks == fewest


def test_the_same_question_has_the_same_answer() -> None:
    config, card = small(memory=AUTO), find_gpu("RTX 4090")
    first, second = resolve_memory(config, card), resolve_memory(config, card)
    assert first == second
    assert first.in_words() == second.in_words()
    assert "memory.blocks_to_swap = auto: " in first.in_words()
    assert f"of {LAYERS}" in first.in_words()
    assert "for RTX 4090: estimated peak" in first.in_words()
    assert "of 23.6 GiB" in first.in_words()


def test_nothing_else_of_the_config_changes() -> None:
    config = small(memory=AUTO)
    resolved = resolve_memory(config, find_gpu("RTX 4090"))
    back = resolved.config.memory.model_copy(update=AUTO)
    assert resolved.config.model_copy(update={"memory": back}) == config
    plain = small()
    assert resolve_memory(plain, find_gpu("RTX 4090")).config is plain
    assert resolve_memory(plain, find_gpu("RTX 4090")).in_words() == ""


def test_a_cpu_swaps_nothing_and_checkpoints_each_block() -> None:
    resolved = resolve_memory(small(memory=AUTO), None)
    assert resolved.values == {"blocks_to_swap": 0, "gradient_checkpointing": True}
    assert "CPU" in resolved.in_words()
    assert resolved.require_fit() == ""


def test_a_card_of_unknown_speed_gets_an_answer() -> None:
    resolved = resolve_memory(small(memory=AUTO), gpu_of_memory(20))
    assert resolved.judged is not None
    assert resolved.judged.verdict == "fits"


def test_what_fits_with_no_value_is_refused_and_what_is_tight_is_remarked_upon() -> None:
    config = small(memory=AUTO)
    smallest = judged(small(memory={"blocks_to_swap": LAYERS}), 80).peak_bytes / 2**30
    with pytest.raises(RunError, match=r"no value of memory\.blocks_to_swap and .* fit") as caught:
        resolve_memory(config, gpu_of_memory(smallest - 0.1)).require_fit()
    assert "--fit" in caught.value.hint
    tight = resolve_memory(config, gpu_of_memory(smallest + 0.1))
    assert "less than the margin" in tight.require_fit()
    assert resolve_memory(config, find_gpu("H200")).require_fit() == ""


def test_forwards_alone_swap_less_than_training() -> None:
    config = make_config("wan2.1-t2v-14b", frames=81, memory={**AUTO})
    card = gpu_of_memory(20, "RTX 4090")
    clip = Clip(width=832, height=480, num_frames=81)
    training = resolve_memory(config, card)
    sampling = resolve_memory(config, card, forwards=[WorkingSet(clip=clip)])
    assert sampling.values["gradient_checkpointing"] is True  # it means nothing without gradients
    assert 0 < sampling.values["blocks_to_swap"] < training.values["blocks_to_swap"]
    sizes = [Clip(width=1280, height=720, num_frames=81), replace(clip, batch=2)]
    larger, batch = (resolve_memory(config, card, forwards=[WorkingSet(clip=one)]) for one in sizes)
    assert larger.values["blocks_to_swap"] > sampling.values["blocks_to_swap"]
    assert batch.values["blocks_to_swap"] > sampling.values["blocks_to_swap"]


def test_the_estimate_is_that_of_the_values() -> None:
    config = make_config("wan2.1-t2v-14b", memory=AUTO, frames=81)
    result = estimate(config, "L40S")
    assert result.automatic.keys() == AUTO.keys()
    memory = config.memory.model_copy(update=dict(result.automatic))
    plain = estimate(config.model_copy(update={"memory": memory}), "L40S")
    assert (result.phases, result.step_seconds) == (plain.phases, plain.step_seconds)
    assert result.to_json()["automatic"] == dict(result.automatic)
    assert plain.automatic == {}


def test_without_a_gpu_there_is_nothing_to_choose_for() -> None:
    with pytest.raises(ConfigError, match=r"memory\.blocks_to_swap is auto") as caught:
        estimate(make_config(memory={"blocks_to_swap": "auto"}))
    assert "name the GPU" in caught.value.hint


def test_fit_begins_with_what_auto_becomes() -> None:
    config = make_config("wan2.1-t2v-14b", memory=AUTO, frames=81)
    fit = find_fit(config, find_gpu("RTX 4090"))
    assert fit.found  # which auto alone does not reach
    assert fit.before.verdict != "fits"
    assert "memory.offload_checkpoints" in {change.key for change in fit.changes}


@pytest.mark.parametrize(
    "sections",
    [
        {"memory": {"blocks_to_swap": "auto", "gradient_checkpointing": False}},
        {"memory": {"blocks_to_swap": "auto"}, "distributed": {"zero_stage": 3}},
        {"memory": {"blocks_to_swap": "auto"}, "full": True},
    ],
)
def test_auto_is_refused_where_no_block_could_be_swapped(sections: dict[str, Any]) -> None:
    distributed = {"engine": "deepspeed", "zero_stage": 2, **sections.pop("distributed", {})}
    problems = check_rules(make_config(**sections, distributed=distributed))
    assert [problem.key for problem in problems] == ["memory.blocks_to_swap"]
    assert "blocks_to_swap = 0" in problems[0].hint


def test_checkpointing_of_a_full_fine_tune_is_chosen_too() -> None:
    where = {"engine": "deepspeed", "zero_stage": 2}
    config = make_config(full=True, memory={"gradient_checkpointing": "auto"}, distributed=where)
    large = resolve_memory(config, find_gpu("H200")).values["gradient_checkpointing"]
    less = resolve_memory(config, find_gpu("RTX 5090")).values["gradient_checkpointing"]
    assert (large, less) == (False, True)


def test_an_unresolved_value_cannot_be_used() -> None:
    memory = make_config(memory=AUTO).memory
    assert memory.automatic == ("blocks_to_swap", "gradient_checkpointing")
    for read in ("swapped_blocks", "checkpointed_every"):
        with pytest.raises(ValueError, match="not been resolved"):
            getattr(memory, read)


def write_header(path: Path, layers: dict[str, Any]) -> Path:
    header = json.dumps(layers).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_a_model_of_no_released_size_is_told_by_its_file(tmp_path: Path) -> None:
    from dataclasses import asdict

    from trainer.models.wan.detect import transformer_metadata

    shape = VARIANTS["wan2.1-t2v-14b"].transformer
    own = {**asdict(shape), "dim": 1024, "num_heads": 8, "ffn_dim": 4096, "num_layers": 9}
    layers = {
        "__metadata__": transformer_metadata(type(shape)(**own), "wan2.2-t2v-a14b"),
        "patch_embedding.weight": {"shape": [1024, 16, 1, 2, 2]},
    }
    file = write_header(tmp_path / "own.safetensors", layers)
    assert variant_of_file(file) is VARIANTS["wan2.2-t2v-a14b"]
    assert sizes_of_file(file) == own
    values = {"model": {"transformer": file}, "memory": AUTO}
    config = RunConfig.model_validate(values)
    assert workload_of(resolve_memory(config, None).config).shape.num_layers == 9
    resolved = resolve_memory(config, gpu_of_memory(5.5))
    assert "of 9, memory" in resolved.in_words()
    named = {**values, "model": {"transformer": file, "shape": {"num_layers": 3}}}
    config = resolve_memory(RunConfig.model_validate(named), None).config
    assert workload_of(config).shape.num_layers == 3


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    layer = {"patch_embedding.weight": {"shape": [5120, 16, 1, 2, 2]}}
    file = write_header(tmp_path / "a.safetensors", layer)
    assert variant_of_file(file) is VARIANTS["wan2.1-t2v-14b"]
    write_header(file, {"patch_embedding.weight": {"shape": [1536, 16, 1, 2, 2]}, "b.c": {}})
    assert variant_of_file(file) is VARIANTS["wan2.1-t2v-1.3b"]
    assert sizes_of_file(tmp_path / "none.safetensors") == {}
    write_header(file, {"patch_embedding.weight": {"shape": [64, 48, 1, 2, 2]}})
    assert variant_of_file(file) is VARIANTS["wan2.2-ti2v-5b"]  # of no released width


def test_a_search_reads_the_dataset_once_and_walks_the_blocks_once_a_checkpointing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer.contract import dataset_config

    looked = []
    parse = dataset_config.parse_dataset

    def counting(*args: Any, **kwargs: Any) -> Any:
        looked.append(args)
        return parse(*args, **kwargs)

    monkeypatch.setattr(dataset_config, "parse_dataset", counting)
    training_peak.cache_clear()
    found = resolve_memory(small(memory=AUTO), gpu_of_memory(18, "RTX 4090"))
    assert 0 < found.values["blocks_to_swap"] < LAYERS  # found by halving
    assert len(looked) == 1
    assert training_peak.cache_info().misses <= 5
