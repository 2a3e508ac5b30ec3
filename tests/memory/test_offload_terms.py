"""Offload, ZeRO and shared sequences in the estimate, against formulas written down by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from memory_configs import make_config

from trainer.contract.memory_model import Estimate, estimate, find_fit, find_gpu
from trainer.contract.variants import VARIANTS
from trainer.engine.offload import Offload, offload_sections

GB = 10**9
FOURTEEN = VARIANTS["wan2.1-t2v-14b"]
P = FOURTEEN.num_parameters
LAYERS = FOURTEEN.transformer.num_layers
DIM = FOURTEEN.transformer.dim
H100, TOKENS = find_gpu("H100 80GB"), 21 * 30 * 52
"""Tokens of 832x480x81."""


def fourteen(*, full: bool = True, **distributed: Any) -> Estimate:
    accumulation = distributed.pop("accumulation", 1)
    frames = distributed.pop("frames", 1)
    where = {"engine": "deepspeed", "nvme_path": "/ssd", **distributed}
    config = make_config(
        FOURTEEN.name, full=full, frames=frames, accumulation=accumulation, distributed=where
    )
    return estimate(config, H100)


def kept(result: Estimate) -> float:
    parts = result.phase("training").parts
    return sum(parts.get(part, 0) for part in ("weights", "fp32 masters", "optimizer"))


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_stage_2_and_3_keep_what_the_arithmetic_says(ranks: int) -> None:
    """14B: 28.6 + 200 / N GB at stage 2, 229 / N at stage 3, gradients of 2 bytes included."""
    gradients = 2 * P / ranks
    second = fourteen(zero_stage=2, num_processes=ranks)
    third = fourteen(zero_stage=3, num_processes=ranks)
    assert (kept(second) + gradients) / GB == pytest.approx(28.6 + 200 / ranks, rel=0.01)
    assert (kept(third) + gradients) / GB == pytest.approx(229 / ranks, rel=0.01)


def test_an_offloaded_optimizer_leaves_the_weights_on_the_gpu_and_16_bytes_in_ram() -> None:
    result = fourteen(zero_stage=2, num_processes=1, offload_optimizer="cpu")
    parts = result.phase("training").parts
    assert parts["weights"] / GB == pytest.approx(28.6, rel=0.01)
    assert parts.keys().isdisjoint({"fp32 masters", "optimizer", "gradients"})
    largest = 6 * DIM * DIM  # of the time projection
    assert parts["offload buffers"] == 2 * largest
    assert result.host_parts["offloaded optimizer"] / GB == pytest.approx(229, rel=0.01)
    # bf16 weights on the way back, and the buffer for one tensor
    transit = result.host_parts["gradients and weights in transit"]
    assert transit == pytest.approx(2 * P + 2 * largest, rel=0.001)
    assert "optimizer on NVMe" not in result.disk_parts


def test_stage_1_holds_all_gradients_until_they_are_moved() -> None:
    first = fourteen(zero_stage=1, num_processes=2, offload_optimizer="cpu").phase("training").parts
    assert first["gradients"] == pytest.approx(2 * P, rel=0.03)  # all but the last made


def test_offloaded_weights_leave_biases_and_norms_and_what_is_gathered() -> None:
    cpu = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    result = fourteen(zero_stage=3, num_processes=4, **cpu)
    parts = result.phase("training").parts
    ffn = FOURTEEN.transformer.ffn_dim
    small = LAYERS * (8 * DIM + ffn + DIM + 4 * DIM + 2 * DIM + 6 * DIM)
    assert parts["weights"] == 2 * small
    assert parts["ZeRO-3 gathered weights"] == 2 * 10**9
    assert result.host_parts["offloaded weights"] / GB == pytest.approx(28.6, rel=0.01)
    assert result.host_parts["gradients and weights in transit"] == pytest.approx(2 * P, rel=0.001)
    summed = fourteen(zero_stage=3, num_processes=4, accumulation=2, **cpu).host_parts
    assert summed["gradients and weights in transit"] == pytest.approx(4 * P, rel=0.001)


@pytest.mark.parametrize("ranks", [1, 8, 256])
def test_an_ssd_takes_what_ram_would_and_ram_keeps_the_engine_s_buffers(ranks: int) -> None:
    files = Offload(optimizer="nvme", parameters="nvme", nvme_path=Path("/ssd"))
    engine = DeepSpeedZeroConfig(stage=3, **offload_sections(files, 6 * DIM * DIM))
    result = fourteen(
        zero_stage=3, num_processes=ranks, offload_optimizer="nvme", offload_parameters="nvme"
    )
    assert result.disk_parts["optimizer on NVMe"] == pytest.approx(16 * P, rel=0.001)
    assert result.disk_parts["weights on NVMe"] == pytest.approx(2 * P, rel=0.01)
    assert "offloaded optimizer" not in result.host_parts
    states, weights = engine.offload_optimizer, engine.offload_param
    assert weights.buffer_size >= 6 * DIM * DIM  # else one process could not read it
    group = min(engine.sub_group_size, P / ranks)
    float32 = ranks * 4 * (states.buffer_count + 1) * group  # and one more for gradients
    assert result.host_parts["offload buffers"] == pytest.approx(float32)
    kept = weights.buffer_count * weights.buffer_size + weights.max_in_cpu
    assert result.host_parts["offloaded weights"] == pytest.approx(ranks * 2 * kept)
    gathered = result.phase("training").parts["ZeRO-3 gathered weights"]
    assert gathered == 2 * max(6 * DIM * DIM, engine.max_live_parameters)


def test_weights_in_files_are_fetched_beside_nothing() -> None:
    assert offload_sections(Offload(parameters="nvme"))["stage3_prefetch_bucket_size"] == 0
    one, four = (
        fourteen(zero_stage=3, num_processes=ranks, offload_parameters="nvme", frames=81)
        for ranks in (1, 4)
    )
    weights = one.disk_parts["weights on NVMe"]
    for result, ranks in ((one, 1), (four, 4)):
        once = weights / 3e9 + weights / ranks / 50e9
        assert result.step_parts["offloaded weights"] == pytest.approx(2 * once)
    assert four.step_parts["weights between GPUs"] == pytest.approx(2 * weights * 3 / 4 / 410e9)


OFFLOADS = [
    {"zero_stage": 2, "offload_optimizer": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_second_machine_has_its_own_ram(offload: dict[str, Any], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    one, two = (
        fourteen(**offload, **where) for where in ({"num_processes": 8}, {"hostfile": hosts})
    )
    assert (one.world_size, two.world_size) == (8, 16)
    halved = {"offloaded optimizer", "optimizer on NVMe", "weights on NVMe"}
    if offload.get("offload_parameters") == "cpu":
        halved |= {"offloaded weights"}
    for before, after in ((one.host_parts, two.host_parts), (one.disk_parts, two.disk_parts)):
        assert before.keys() == after.keys()
        for part in before.keys() - {"gradients and weights in transit"}:
            share = 0.5 if part in halved else 1
            assert after[part] == pytest.approx(share * before[part], rel=1e-6), part
    whole, half = (result.host_parts["gradients and weights in transit"] for result in (one, two))
    per_process = 0 if offload["zero_stage"] == 3 else 8 * 2 * 6 * DIM * DIM
    assert half - per_process == pytest.approx((whole - per_process) / 2, rel=1e-6)
    # The update itself, in RAM and through the SSD, is of half the state; so are a rank's copies.
    seconds = [result.step_parts["offloaded update"] for result in (one, two)]
    assert seconds[1] == pytest.approx(seconds[0] / 2)


def test_machines_share_the_work_as_one_with_as_many_processes(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    one = fourteen(full=False, zero_stage=2, num_processes=16)
    two = fourteen(full=False, zero_stage=2, hostfile=tmp_path / "hosts")
    assert two.phases == one.phases
    assert two.host_parts["processes"] == one.host_parts["processes"] / 2


def test_a_lora_s_state_leaves_the_gpu_and_its_weights_stay() -> None:
    here, away = (
        fourteen(full=False, zero_stage=2, num_processes=1, offload_optimizer=place)
        for place in ("none", "cpu")
    )
    trained = here.phase("training").parts["adapter"] / 4
    assert away.phase("training").parts["adapter"] == 4 * trained
    assert kept(here) - kept(away) == pytest.approx(12 * trained)
    assert away.host_parts["offloaded optimizer"] == pytest.approx(16 * trained)


def test_what_stage_0_ignores_changes_nothing() -> None:
    plain = fourteen(full=False, num_processes=1)
    assert fourteen(full=False, num_processes=1, offload_optimizer="cpu") == plain


def test_an_update_on_the_cpu_takes_the_time_of_its_traffic() -> None:
    one = fourteen(zero_stage=2, num_processes=1, offload_optimizer="cpu").step_parts
    links = (2 * P + 2 * P) / 50e9
    assert one["offloaded update"] == pytest.approx(links + 28 * P / (0.5 * 200e9), rel=0.001)
    assert "update" not in one
    four = fourteen(zero_stage=2, num_processes=4, offload_optimizer="cpu").step_parts
    assert four["offloaded update"] == pytest.approx(links / 4 + 28 * P / 100e9, rel=0.001)
    disk = fourteen(zero_stage=3, num_processes=1, offload_optimizer="nvme").step_parts
    assert disk["offloaded update"] - one["offloaded update"] == pytest.approx(28 * P / 3e9, 0.001)


def test_gradients_of_all_ranks_are_summed_by_a_ring() -> None:
    eight = fourteen(full=False, num_processes=8)
    sent = 2 * 7 / 8 * eight.phase("training").parts["adapter"]
    assert eight.step_parts["gradients between GPUs"] == pytest.approx(sent / 410e9)
    assert "gradients between GPUs" not in fourteen(full=False, num_processes=1).step_parts


def test_an_h100_hides_the_gathering_of_weights_behind_a_video() -> None:
    video = fourteen(full=False, zero_stage=3, num_processes=8, frames=81)
    twice = 2 * 2 * P * 7 / 8 / 410e9
    assert video.step_parts["weights between GPUs"] == pytest.approx(0.1 * twice, rel=0.01)


def test_a_shared_sequence_divides_activations_and_work() -> None:
    alone, two = (
        fourteen(full=False, frames=81, num_processes=2, sequence_parallel=ranks)
        for ranks in (1, 2)
    )
    whole, half = (one.phase("training").parts for one in (alone, two))
    assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=0.001)
    assert half["inputs"] == whole["inputs"]  # each rank has the whole clip
    assert half["weights"] == whole["weights"]
    assert half["sequence exchange"] == 2 * 2 * DIM * TOKENS / 2
    # A block's products with the text, and what does not depend on tokens, are not divided.
    assert half["live block"] == pytest.approx(whole["live block"] / 2, rel=0.05)
    assert two.step_parts["attention"] == pytest.approx(alone.step_parts["attention"] / 2)
    assert two.step_parts["pointwise"] == pytest.approx(alone.step_parts["pointwise"] / 2)


PROMPTS = {"prompts": [{"prompt": "a", "width": 832, "height": 480, "num_frames": 81}]}


def sampling_parts(ranks: int, **sampling: Any) -> dict[str, int]:
    where = {"engine": "deepspeed", "num_processes": 8, "sequence_parallel": ranks}
    config = make_config(
        FOURTEEN.name,
        distributed=where,
        memory={"vae_tile": 128},  # decoding must not take more than the forward
        sampling={**PROMPTS, **sampling},
    )
    return dict(estimate(config, H100).phase("sampling").parts)


@pytest.mark.parametrize("when", [{"every_steps": 5}, {"at_start": True}])
def test_processes_that_share_clips_share_a_run_s_samples(when: dict[str, Any]) -> None:
    whole, part = sampling_parts(1, **when), sampling_parts(2, **when)
    assert part["live block"] == pytest.approx(whole["live block"] / 2, rel=0.05)
    assert "sequence exchange" not in whole
    assert part["sequence exchange"] == 2 * 2 * DIM * TOKENS // 2
    assert part["latents"] == whole["latents"]  # each rank has the whole sample
    assert part["CUDA context"] == pytest.approx((0.55 + 0.3) * 2**30, abs=1)


def test_a_sample_of_its_own_is_made_by_the_processes_that_share_clips() -> None:
    alone, shared = sampling_parts(1), sampling_parts(2)
    during = sampling_parts(2, every_steps=5)
    for part in ("live block", "sequence exchange", "kept results"):
        assert shared[part] == during[part]
    assert shared["live block"] == pytest.approx(alone["live block"] / 2, rel=0.05)
    # One prompt: a process, or as many as share it; the others of the config are not started.
    assert alone["CUDA context"] == pytest.approx(0.55 * 2**30, abs=1)
    assert shared["CUDA context"] == pytest.approx((0.55 + 0.3) * 2**30, abs=1)


def test_exchanging_a_sequence_takes_four_all_to_alls_a_block_and_pass() -> None:
    four = fourteen(full=False, frames=81, num_processes=4, sequence_parallel=4)
    passes = LAYERS + (LAYERS - 1) + LAYERS  # forward, recomputation but of the last, backward
    sent = 4 * (TOKENS // 4) * DIM * 2 * 3 / 4
    assert four.step_parts["sequence exchange"] == pytest.approx(passes * sent / 410e9)


def test_an_odd_number_of_tokens_is_rounded_up() -> None:
    config = make_config(
        FOURTEEN.name, frames=81, distributed={"sequence_parallel": 7, "num_processes": 7}
    )
    parts = estimate(config).phase("training").parts
    assert parts["sequence exchange"] == 2 * 2 * DIM * (-(-TOKENS // 7))


def test_fit_sends_a_full_fine_tune_s_state_to_ram() -> None:
    where = {"engine": "deepspeed", "zero_stage": 2, "num_processes": 1}
    config = make_config(FOURTEEN.name, full=True, frames=81, distributed=where)
    fit = find_fit(config, H100)
    assert fit.found
    assert {"distributed.offload_optimizer": "cpu"}.items() <= {
        change.key: change.value for change in fit.changes
    }.items()
    ram = {change.key: change.host_bytes for change in fit.changes}
    assert ram["distributed.offload_optimizer"] > 229 * GB
    small = find_fit(config, find_gpu("RTX 4090"))
    assert small.found  # with the weights in RAM, too
    assert "distributed.offload_parameters" in {change.key for change in small.changes}


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_fp8_numbers_are_sharded_and_their_scales_stay_whole(ranks: int) -> None:
    """14B: 14.1 GB of numbers in the blocks, 0.44 GB of scales, 0.4 GB outside of the blocks."""
    where = {"engine": "deepspeed", "zero_stage": 3, "num_processes": ranks}
    parts, whole = {}, {}
    for kind in ("fp8_scaled", "bf16"):
        config = make_config(
            FOURTEEN.name, frames=1, memory={"weight_format": kind}, distributed=where
        )
        result = estimate(config, H100)
        parts[kind], whole[kind] = result.phase("training").parts, result.host_parts
    numbers = LAYERS * (8 * DIM**2 + 2 * DIM * FOURTEEN.transformer.ffn_dim)
    found = parts["fp8_scaled"]["weights"]
    assert found == pytest.approx(numbers / ranks + numbers / 32, rel=0.04)
    assert parts["bf16"]["weights"] == pytest.approx(2 * numbers / ranks, rel=0.05)
    gathered = [parts[kind]["ZeRO-3 gathered weights"] for kind in parts]
    assert gathered == [GB, 2 * GB]  # elements are counted
    loading = "weights while loading"
    assert whole["fp8_scaled"][loading] < 0.55 * whole["bf16"][loading]
