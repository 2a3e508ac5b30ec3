"""What caching and sampling take: plans as the sampler makes them, costs as settings say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_configs import make_config

from trainer.contract.catalog import SCHEDULES, SOLVERS
from trainer.contract.config import Prompt, RunConfig, SamplingSection
from trainer.contract.memory_model import (
    Circumstances,
    Clip,
    caching_seconds,
    estimate,
    find_fit,
    find_gpu,
    gpu_of_memory,
)
from trainer.contract.memory_model.costs import JobCost
from trainer.contract.memory_model.flops import step_flops
from trainer.contract.memory_model.forwards import CONVOLUTIONS, forward_flops, forward_seconds
from trainer.contract.memory_model.vae_flops import vae_flops
from trainer.contract.memory_model.videos import planned_videos, turns
from trainer.contract.memory_model.workload import workload_of
from trainer.contract.variants import VARIANTS, get_variant
from trainer.contract.walk import planned_timesteps
from trainer.sampling.guidance import needs_negative
from trainer.sampling.pipeline import expert_at
from trainer.sampling.requests import SampleRequest
from trainer.sampling.schedule import walk_of

GIB = 2**30
A14B, FOURTEEN = "wan2.2-t2v-a14b", "wan2.1-t2v-14b"
H200 = find_gpu("H200")


def job(name: str, variant: str = FOURTEEN, *, gpu: str = "H200", **setting: Any) -> JobCost:
    return estimate(make_config(variant, **setting), gpu).jobs[name]


# What is planned is what the sampler does


@given(
    st.sampled_from(SOLVERS.names),
    st.sampled_from(("", *SCHEDULES.names)),
    st.integers(1, 60),
    st.floats(0.5, 20),
    st.sampled_from([None, 0.03, 0.3, 0.58, 0.8, 1.0]),
)
def test_timesteps_are_the_solver_s(
    solver: str, schedule: str, steps: int, shift: float, strength: float | None
) -> None:
    settings = {"solver": solver, "schedule": schedule, "num_steps": steps, "flow_shift": shift}
    request = SampleRequest.of(Prompt(prompt="a", **settings), get_variant(FOURTEEN))
    walk = walk_of(replace(request, strength=strength))
    planned = planned_timesteps(
        steps, shift, solver, schedule=schedule, strength=1.0 if strength is None else strength
    )
    assert planned == pytest.approx(walk.timesteps.tolist(), abs=1e-6)
    assert len(walk.sigmas) == len(planned) + 1


PROMPTS: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": "b", "width": 480, "height": 320, "num_frames": 5, "num_steps": 7},
    {"prompt": "c", "guidance_scale": 1.0, "negative_prompt": ""},
    {"prompt": "d", "guidance_scale": 1.0, "guidance_scale_high_noise": 2.0, "solver": "euler"},
    {"prompt": "e", "flow_shift": 1.5, "negative_prompt": "n"},
    {"prompt": "f", "solver": "heun", "schedule": "beta", "num_steps": 9},
    {"prompt": "g", "solver": "dpm++", "video": "v.mp4", "strength": 0.6},
    {"prompt": "h", "video": "v.mp4"},
    {"prompt": "i", "one_frame": "target_index=1,control_index=0;2", "control_images": ["a", "b"]},
]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "section", [{}, {"guidance_scale": 3.0, "num_steps": 12, "solver": "euler", "height": 256}]
)
def test_videos_are_planned_as_requests_are_filled_in(name: str, section: dict[str, Any]) -> None:
    variant = get_variant(name)
    sampling = SamplingSection.model_validate({**section, "prompts": PROMPTS})
    for video, prompt in zip(planned_videos(sampling, variant), sampling.prompts, strict=True):
        request = SampleRequest.of(prompt, variant, sampling)
        size = (request.width, request.height, request.num_walked_frames)
        assert (video.clip.width, video.clip.height, video.clip.num_frames) == size
        walk = walk_of(request)
        assert video.num_steps == walk.num_steps
        assert video.starts_from_video is (request.video is not None)
        assert set(video.texts) == set(request.texts)
        passes = {"high_noise": 0, "low_noise": 0}
        for timestep in walk.timesteps.tolist():
            expert = expert_at(timestep, variant)
            scale = request.guidance_scale[expert == "high_noise"]
            passes[expert] += 2 if needs_negative(scale) else 1
        assert dict(video.passes.by_expert) == {who: many for who, many in passes.items() if many}


def test_experts_take_turns_once_a_video() -> None:
    sampling = SamplingSection.model_validate({"prompts": [{"prompt": "a"}] * 3})
    videos = planned_videos(sampling, get_variant(A14B))
    assert turns(videos) == ["high_noise", "low_noise"] * 3
    assert turns(planned_videos(sampling, get_variant(FOURTEEN))) == ["low_noise"]


# Time


def test_a_forward_is_that_of_the_step() -> None:
    work = workload_of(make_config(FOURTEEN, frames=81, resolution=(832, 480)))
    step = step_flops(work)
    forward = forward_flops(work.shape, work.tokens)
    assert forward.attention == pytest.approx(step.attention)
    assert forward.blocks == pytest.approx(step.matmul)
    assert forward.outer < 0.01 * forward.total
    lora = forward_seconds(work, H200, work.clip)["LoRA"]
    assert lora == pytest.approx(step.lora / (989e12 * 0.8), rel=0.01)


def test_sampling_time_follows_steps_guidance_and_prompts() -> None:
    short = {"num_steps": 10}
    one = job("sampling", sampling={"prompts": [{"prompt": "a"}], **short})
    two = job("sampling", sampling={"prompts": [{"prompt": "a"}, {"prompt": "b"}], **short})
    plain = job("sampling", sampling={"guidance_scale": 1.0, **short})
    assert (one.num_forwards, plain.num_forwards) == (20, 10)
    decoding = one.item_s["VAE decoding"]
    each = sum(one.item_s.values())
    assert sum(plain.item_s.values()) - decoding == pytest.approx((each - decoding) / 2)
    assert one.total_s is not None
    assert two.total_s is not None
    caption = one.once_s["texts"] / 2  # the prompt, and the negative one that both share
    assert two.total_s - one.total_s == pytest.approx(each + caption)


def test_swapped_blocks_cost_time_where_a_forward_is_short() -> None:
    image = {"width": 512, "height": 512, "num_frames": 1}
    for size, hidden in ((image, False), ({}, True)):
        none, all_ = (job("sampling", memory={"blocks_to_swap": n}, sampling=size) for n in (0, 40))
        more = sum(all_.item_s.values()) / sum(none.item_s.values())
        assert (more < 1.05) is hidden
        assert more > 1


def test_experts_change_places_in_ram() -> None:
    prompts = {"prompts": [{"prompt": "a"}, {"prompt": "b"}]}
    found = job("sampling", A14B, sampling=prompts)
    weights = workload_of(make_config(A14B)).resident_bytes
    # Parked, loaded; parked and back twice.
    assert found.once_s["experts to and from RAM"] == pytest.approx(5 * weights / 25e9)
    assert found.host_parts["parked expert"] == pytest.approx(weights, abs=1)
    swapped = job("sampling", A14B, sampling=prompts, memory={"blocks_to_swap": 40})
    block = workload_of(make_config(A14B)).block_bytes
    assert swapped.host_parts["swapped blocks"] == pytest.approx(80 * block, abs=1)
    assert "experts to and from RAM" not in job("sampling").once_s


def test_tiles_take_longer_and_hold_the_whole_video() -> None:
    whole, tiled = (job("sampling", memory={"vae_tile": tile}) for tile in (None, 256))
    assert tiled.item_s["VAE decoding"] > 1.2 * whole.item_s["VAE decoding"]
    frames = tiled.host_phases["decoding"]["decoded frames"]
    assert frames == 2 * 3 * 81 * 832 * 480
    assert whole.host_phases["decoding"]["decoded frames"] == 2 * 3 * 4 * 832 * 480


def test_caching_time_is_that_of_its_operations() -> None:
    found = job("caching", frames=81)
    variant, clip = get_variant(FOURTEEN), Clip(width=832, height=480, num_frames=81)
    expected = vae_flops(variant, clip, "encode") / (989e12 * CONVOLUTIONS)
    assert found.item_s["VAE encoding"] == pytest.approx(expected)
    assert set(found.item_s) == {"VAE encoding", "caption"}
    image = job("caching", "wan2.1-i2v-14b", frames=81)
    assert set(image.item_s) == {*found.item_s, "VAE conditioning", "image encoder"}
    single = job("caching", memory={"vae_dtype": "fp32"}, frames=81)
    assert single.item_s["VAE encoding"] == pytest.approx(4 * expected)


def test_caching_a_dataset_adds_up() -> None:
    config = make_config(FOURTEEN, frames=81)
    clip = Clip(width=832, height=480, num_frames=81)
    none, some = (caching_seconds(config, H200, {clip: n}, m) for n, m in ((0, 0), (10, 3)))
    cost = estimate(config, H200).jobs["caching"]
    assert none is not None
    assert some is not None
    assert none == pytest.approx(cost.once_s["loading"])
    added = 10 * cost.item_s["VAE encoding"] + 3 * cost.item_s["caption"]
    assert some - none == pytest.approx(added)
    assert caching_seconds(config, gpu_of_memory(24), {clip: 1}, 1) is None


def test_weight_files_that_are_there_are_loaded_by_their_size(tmp_path: Path) -> None:
    file = tmp_path / "text.safetensors"
    file.write_bytes(bytes(1000))
    before = job("caching").once_s["loading"]
    config = make_config(FOURTEEN)
    model = config.model.model_copy(update={"text_encoder": file})
    small = estimate(config.model_copy(update={"model": model}), H200).jobs["caching"]
    assert small.once_s["loading"] < 0.1 * before


def test_without_arithmetic_there_is_no_time() -> None:
    for name, cost in estimate(make_config(FOURTEEN), gpu_of_memory(24)).jobs.items():
        assert (name, cost.item_s, cost.once_s, cost.total_s) == (name, {}, {}, None)
        assert cost.host_bytes > 2 * GIB


def test_clips_to_validate_on_are_cached_too() -> None:
    source = {"video_directory": "v", "resolution": [1280, 704], "target_frames": [81]}
    more = {"every_steps": 10, "sources": [source]}
    config = make_config(FOURTEEN)
    with_them = RunConfig.model_validate(config.model_dump() | {"validation": more})
    assert estimate(with_them).jobs["caching"].clip == Clip(width=1280, height=704, num_frames=81)
    few, many = (estimate(one).phase("latents").peak_bytes for one in (config, with_them))
    assert few < many


# Samples of a run


def test_samples_of_a_run_wait_in_ram_and_take_time_each_round() -> None:
    prompts = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    wanted = {"every_steps": 100, "at_start": True, "prompts": prompts}
    config = make_config(FOURTEEN, sampling=wanted, training={"max_steps": 500})
    result = estimate(config, H200)
    samples = result.jobs["samples"]
    assert samples.rounds == 6
    assert samples.total_s == pytest.approx(3 * sum(samples.item_s.values()), rel=0.001)
    assert result.host_parts["parked VAE"] == 2 * 126_892_531
    assert "samples" not in result.host_peaks  # they are part of training
    assert "samples" not in estimate(make_config(FOURTEEN), H200).jobs


def test_prompts_are_dealt_out_to_processes_but_not_with_zero_3() -> None:
    prompts = [{"prompt": text} for text in "abcde"]
    wanted = {"every_steps": 100, "prompts": prompts}
    totals = {}
    for stage in (1, 3):
        given = {"engine": "deepspeed", "num_processes": 4, "zero_stage": stage}
        found = job("samples", sampling=wanted, distributed=given)
        totals[stage] = found.total_s
        assert ("weights between GPUs" in found.item_s) is (stage == 3)
    assert totals[1] is not None
    assert totals[3] is not None
    assert totals[3] > 2.4 * totals[1]  # five videos instead of two


# RAM of the machine


@pytest.mark.parametrize(
    ("ram", "verdict"), [(60, "fits"), (31, "tight"), (20, "does not fit"), (None, "unknown")]
)
def test_the_job_that_takes_most_ram_decides(ram: int | None, verdict: str) -> None:
    known = Circumstances(machine_bytes=None if ram is None else ram * GIB)
    result = estimate(make_config(A14B), H200, known)
    assert max(result.host_peaks, key=lambda name: result.host_peaks[name]) == "sampling"
    assert result.host_verdict == verdict
    assert result.to_json()["host"]["verdict"] == verdict


@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 40), st.integers(0, 25))
def test_parts_sum_up_and_can_be_written(variant: str, swapped: int, quarters: int) -> None:
    wanted = {"at_start": True}
    config = make_config(
        variant,
        frames=4 * quarters + 1,
        memory={"blocks_to_swap": min(swapped, VARIANTS[variant].transformer.num_layers)},
        sampling=wanted,
    )
    result = estimate(config, "RTX 4090")
    assert list(result.jobs) == ["caching", "sampling", "samples"]
    for cost in result.jobs.values():
        assert sum(cost.host_parts.values()) == cost.host_bytes
        assert all(size > 0 for parts in cost.host_phases.values() for size in parts.values())
        assert all(value > 0 for value in (*cost.item_s.values(), *cost.once_s.values()))
    assert json.loads(json.dumps(result.to_json()))["jobs"].keys() == result.jobs.keys()


def test_fit_tells_the_jobs_with_its_settings() -> None:
    fit = find_fit(make_config(FOURTEEN, frames=81), find_gpu("RTX 4090"))
    before, after = (one.jobs["sampling"] for one in (fit.before, fit.after))
    assert "swapped blocks" not in before.host_phases["steps"]
    assert "swapped blocks" in after.host_phases["steps"]
    unknown = find_fit(make_config(FOURTEEN, frames=81), gpu_of_memory(24))
    assert unknown.after.step_seconds is None
