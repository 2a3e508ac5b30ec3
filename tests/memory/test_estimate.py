"""Properties of the estimate, whatever the config."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_configs import make_config

from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, UserError
from trainer.contract.memory_model import (
    GPUS,
    Circumstances,
    estimate,
    find_fit,
    find_gpu,
    gpu_of_memory,
)
from trainer.contract.memory_model.fit import with_settings
from trainer.contract.memory_model.result import PHASES
from trainer.contract.memory_model.weights import num_parameters
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.plugin_options import plugin_schemas
from trainer.contract.variants import VARIANTS

GIB = 2**30
variants = st.sampled_from(sorted(VARIANTS))
memories = st.sampled_from(
    [
        {},
        {"keep_attention": True},
        {"gradient_checkpointing": False},
        {"weight_format": "fp8_scaled"},
        {"weight_format": "fp32"},
    ]
)


def training_bytes(**setting: Any) -> int:
    return estimate(make_config(**setting)).phase("training").peak_bytes


@given(variants, memories, st.integers(0, 30), st.integers(1, 4), st.sampled_from([1, 8, 128]))
def test_parts_are_positive_and_sum_to_the_peak(
    variant: str, memory: dict[str, Any], quarters: int, batch: int, rank: int
) -> None:
    config = make_config(variant, frames=4 * quarters + 1, batch=batch, rank=rank, memory=memory)
    result = estimate(config, "RTX 4090")
    assert [phase.name for phase in result.phases] == list(PHASES)
    for phase in result.phases:
        assert all(size > 0 for size in phase.parts.values())
        assert sum(phase.parts.values()) == phase.peak_bytes
    assert result.peak_bytes == max(phase.peak_bytes for phase in result.phases)
    assert all(size >= 0 for size in (*result.host_parts.values(), *result.disk_parts.values()))
    assert result.step_seconds is not None
    assert result.step_seconds == pytest.approx(sum(result.step_parts.values()))
    assert json.loads(json.dumps(result.to_json()))["verdict"] == result.verdict


@given(variants, memories, st.integers(0, 25), st.integers(1, 5))
def test_more_frames_take_more(
    variant: str, memory: dict[str, Any], quarters: int, more: int
) -> None:
    few, many = (
        training_bytes(variant=variant, memory=memory, frames=4 * n + 1)
        for n in (quarters, quarters + more)
    )
    assert few < many


@given(variants, memories, st.integers(8, 40), st.integers(8, 40), st.integers(1, 8))
def test_more_pixels_take_more(
    variant: str, memory: dict[str, Any], columns: int, rows: int, more: int
) -> None:
    small, large = (
        training_bytes(variant=variant, memory=memory, resolution=(32 * width, 32 * rows))
        for width in (columns, columns + more)
    )
    assert small < large


@given(variants, memories, st.integers(1, 6))
def test_a_larger_batch_takes_more(variant: str, memory: dict[str, Any], batch: int) -> None:
    one, two = (
        training_bytes(variant=variant, memory=memory, batch=number)
        for number in (batch, batch + 1)
    )
    assert one < two


@given(variants, memories, st.integers(1, 256), st.integers(1, 64))
def test_a_higher_rank_takes_more(
    variant: str, memory: dict[str, Any], rank: int, more: int
) -> None:
    low, high = (
        training_bytes(variant=variant, memory=memory, rank=number)
        for number in (rank, rank + more)
    )
    assert low < high


@given(variants, st.integers(0, 28), st.booleans())
def test_more_swapped_blocks_take_no_more(variant: str, swapped: int, fp8: bool) -> None:
    kind = {"weight_format": "fp8_scaled"} if fp8 else {}
    none, some, more = (
        training_bytes(variant=variant, memory={**kind, "blocks_to_swap": number})
        for number in (0, swapped + 1, swapped + 2)
    )
    assert some <= none + 16  # parts are rounded to bytes
    assert more < some or swapped == 0  # two blocks fill the ring and save nothing yet


@given(variants, st.integers(1, 20), st.integers(2, 8))
def test_offload_and_chunks_take_less(variant: str, quarters: int, chunks: int) -> None:
    setting = {"variant": variant, "frames": 4 * quarters + 1}
    plain = training_bytes(**setting)
    parked = training_bytes(**setting, memory={"offload_checkpoints": True})
    chunked = training_bytes(**setting, memory={"feed_forward_chunks": chunks})
    both = training_bytes(
        **setting, memory={"feed_forward_chunks": chunks, "attention_chunks": chunks}
    )
    assert parked < plain
    assert both < chunked < plain
    every, second = (
        training_bytes(**setting, memory={"gradient_checkpointing": value}) for value in (True, 2)
    )
    assert every < second


def test_swapped_blocks_wait_in_host_memory() -> None:
    result = estimate(make_config("wan2.1-t2v-14b", memory={"blocks_to_swap": 40}))
    training = result.phase("training").parts
    block = result.host_parts["swapped blocks"] / 40
    assert training["block swap"] == pytest.approx(2 * block, rel=0.001)
    assert training["weights"] < block


def test_a_14b_model_fits_a_24_gib_card_with_exact_settings() -> None:
    fit = find_fit(make_config("wan2.1-t2v-14b", frames=81), find_gpu("RTX 4090"))
    assert fit.found
    assert {change.key for change in fit.changes} >= {"memory.blocks_to_swap"}
    assert all(change.exact for change in fit.changes)
    assert fit.changes[-1].peak_bytes == fit.after.peak_bytes
    fewer = [
        {change.key: change.value - (change.key == "memory.blocks_to_swap")}
        for change in fit.changes
    ]
    settings = {key: value for change in fewer for key, value in change.items()}
    config = with_settings(make_config("wan2.1-t2v-14b", frames=81), settings)
    assert estimate(config, "RTX 4090").verdict != "fits"  # no block too many


@given(variants, st.integers(2, 16), st.sampled_from([1, 2, 3]))
def test_zero_takes_less_with_more_processes(variant: str, processes: int, stage: int) -> None:
    few, many = (
        training_bytes(
            variant=variant,
            full=True,
            distributed={"engine": "deepspeed", "zero_stage": stage, "num_processes": number},
        )
        for number in (processes, 2 * processes)
    )
    assert many < few


def test_zero_stages_take_less_and_less() -> None:
    peaks = [
        training_bytes(
            variant="wan2.1-t2v-14b",
            full=True,
            distributed={"engine": "deepspeed", "zero_stage": stage, "num_processes": 8},
        )
        for stage in (1, 2, 3)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_full_finetune_of_14b_matches_what_deepspeed_keeps() -> None:
    """16 bytes a parameter: weights and gradients 2 each, float32 copy and moments 12."""
    config = make_config(
        "wan2.1-t2v-14b",
        full=True,
        frames=1,
        distributed={"engine": "deepspeed", "zero_stage": 3, "num_processes": 8},
    )
    parts = estimate(config).phase("training").parts
    kept = parts["weights"] + parts["fp32 masters"] + parts["optimizer"]
    parameters = VARIANTS["wan2.1-t2v-14b"].num_parameters
    assert kept == pytest.approx(14 * parameters / 8, rel=0.01)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_parameters_are_those_published(variant: Any) -> None:
    assert num_parameters(variant.transformer) == variant.num_parameters


def test_the_largest_bucket_decides() -> None:
    small = {"video_directory": "a", "resolution": (480, 480), "target_frames": [1, 33]}
    long = {"video_directory": "b", "resolution": (640, 480), "target_frames": [81]}
    images = {"image_directory": "c", "resolution": (1280, 720), "batch_size": 2}
    base = make_config()
    config = base.model_copy(
        update={"dataset": base.dataset.model_copy(update={"sources": (small, long, images)})}
    )
    result = estimate(config)
    assert str(result.clip) == "640x480x81"
    alone = base.dataset.model_copy(update={"sources": (long,)})
    lone = estimate(base.model_copy(update={"dataset": alone}))
    assert result.phase("training") == lone.phase("training")
    # The images are larger, and the VAE sees them as they are.
    assert result.phase("latents").peak_bytes >= lone.phase("latents").peak_bytes


def test_buckets_keep_the_area() -> None:
    base = make_config(resolution=(960, 544), frames=33)
    (source,) = base.dataset.sources
    mixed = base.dataset.model_copy(update={"sources": ({**source, "enable_bucket": True},)})
    fixed, bucketed = (
        estimate(config).tokens for config in (base, base.model_copy(update={"dataset": mixed}))
    )
    assert bucketed == fixed


def test_without_a_dataset_the_variant_s_own_size_counts() -> None:
    config = RunConfig.model_validate({"model": {"variant": "wan2.2-ti2v-5b"}})
    assert str(estimate(config).clip) == "1280x704x121"


def test_options_that_are_not_given_count_as_their_defaults() -> None:
    config = RunConfig.model_validate({"model": {"variant": "wan2.2-ti2v-5b"}})
    rank = plugin_schemas()["adapter"]["lora"]["properties"]["rank"]["default"]
    assert {part.rank for part in workload_of(config).targets.parts} == {rank}


def test_accumulation_keeps_gradients_and_multiplies_time() -> None:
    one, four = (make_config(accumulation=number) for number in (1, 4))
    first, second = estimate(one, "H200"), estimate(four, "H200")
    assert first.step_seconds is not None
    assert second.step_seconds == pytest.approx(4 * first.step_seconds, rel=0.01)
    assert second.phase("training").peak_bytes > first.phase("training").peak_bytes


def test_samples_of_a_run_stand_beside_its_training() -> None:
    prompts = {"prompts": [{"prompt": "a cat", "width": 832, "height": 480, "num_frames": 81}]}
    alone = make_config("wan2.2-t2v-a14b", sampling=prompts)
    during = make_config("wan2.2-t2v-a14b", sampling={**prompts, "every_steps": 100})
    parts = estimate(during).phase("sampling").parts
    assert parts["other expert"] == parts["weights"]
    assert parts["optimizer"] > 0
    assert "other expert" not in estimate(alone).phase("sampling").parts


def test_tiles_bound_the_vae() -> None:
    whole = make_config(resolution=(1280, 720), frames=81)
    tiled = make_config(resolution=(1280, 720), frames=81, memory={"vae_tile": 256})
    large, small = (estimate(config).phase("latents").peak_bytes for config in (whole, tiled))
    assert small < large / 3


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx 3090", "RTX 3090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("a100 40 gb", "A100 40GB"),
        ("NVIDIA GeForce RTX 4080 SUPER", "RTX 4080 SUPER"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("l40s", "L40S"),
    ],
)
def test_gpus_are_found_as_people_and_drivers_write_them(text: str, name: str) -> None:
    assert find_gpu(text).name == name


def test_every_gpu_is_found_by_its_own_name() -> None:
    assert all(find_gpu(name) is gpu for name, gpu in GPUS.items())


def test_unknown_and_ambiguous_gpus() -> None:
    with pytest.raises(UserError, match="several GPUs"):
        find_gpu("A100")
    with pytest.raises(UserError) as caught:
        find_gpu("RTX 4091")
    assert "--vram" in caught.value.hint


def test_a_card_known_by_its_memory_has_no_time() -> None:
    result = estimate(make_config(), gpu_of_memory(24))
    assert (result.step_seconds, result.verdict) == (None, "fits")
    assert gpu_of_memory(23.5, "NVIDIA GeForce RTX 4090").bf16_tflops == 165


def test_verdicts() -> None:
    config = make_config()
    peak = estimate(config).peak_bytes / GIB
    cards = {
        "does not fit": gpu_of_memory(peak - 0.01),
        "tight": gpu_of_memory(peak + 0.01),
        "fits": gpu_of_memory(1.1 * peak),
    }
    assert {name: estimate(config, card).verdict for name, card in cards.items()} == {
        name: name for name in cards
    }
    assert estimate(config).verdict == "unknown"


def test_a_correction_scales_everything_but_the_context() -> None:
    config = make_config()
    plain = estimate(config)
    known = Circumstances(correction=1.1, measured_runs=3)
    corrected = estimate(config, known=known)
    for before, after in zip(plain.phases, corrected.phases, strict=True):
        context = before.parts["CUDA context"]
        assert after.parts["CUDA context"] == context
        assert after.peak_bytes - context == pytest.approx(1.1 * (before.peak_bytes - context))
    assert corrected.margin_bytes < plain.margin_bytes * 1.1


def test_a_model_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"transformer": tmp_path / "none.safetensors"}})
    with pytest.raises(ConfigError, match="auto") as caught:
        estimate(config)
    assert "model.variant" in caught.value.hint


@pytest.mark.parametrize("variant", ["wan2.1-t2v-14b", "wan2.1-flf2v-14b", "wan2.2-ti2v-5b"])
def test_the_variant_is_read_from_the_file_s_header(variant: str, tmp_path: Path) -> None:
    shape = VARIANTS[variant].transformer
    layers = {
        "model.patch_embedding.weight": {"shape": [shape.dim, shape.in_channels, 1, 2, 2]},
        "model.blocks.0.ffn.0.weight": {"shape": [shape.ffn_dim, shape.dim]},
    }
    for index in range(shape.num_layers):
        layers[f"model.blocks.{index}.self_attn.q.weight"] = {"shape": [shape.dim, shape.dim]}
    if shape.image_dim:
        layers["img_emb.proj.0.weight"] = {"shape": [shape.image_dim]}
        layers["img_emb.emb_pos"] = {"shape": [1, 514, shape.image_dim]}
    header = json.dumps(layers).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    config = RunConfig.model_validate({"model": {"transformer": file}})
    assert workload_of(config).variant.name == variant
    folder = config.model.model_copy(update={"transformer": tmp_path})
    assert workload_of(config.model_copy(update={"model": folder})).shape == shape


def test_no_torch_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, trainer.contract.memory_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gpu_table_is_plausible() -> None:
    for gpu in GPUS.values():
        assert replace(gpu) == gpu
        assert 8 < gpu.memory_gib < 200
        assert 20 < gpu.bf16_tflops < 3000
        assert gpu.fp8_tflops == 0 or 1.9 < gpu.fp8_tflops / gpu.bf16_tflops < 2.1
        assert 0 < gpu.host_gb_s < gpu.memory_gb_s
