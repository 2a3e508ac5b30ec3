"""What options of sampling do to the estimate's memory and seconds."""

from __future__ import annotations

from typing import Any

import pytest
from memory_configs import make_config

from app.render.estimates import sampling_line, summary
from trainer.contract.config import RunConfig
from trainer.contract.memory_model import (
    Estimate,
    estimate,
    estimate_sampling,
    find_gpu,
    resolve_memory,
)
from trainer.contract.memory_model.videos import planned_videos
from trainer.contract.variants import get_variant

FOURTEEN = "wan2.1-t2v-14b"
H200 = find_gpu("H200")
SIZE: dict[str, Any] = {"width": 832, "height": 480, "num_frames": 81, "num_steps": 10}
TOKENS, DIM, LAYERS, TEXT = 21 * 30 * 52, 5120, 40, 512


def config_of(*, memory: dict[str, Any] | None = None, **sampling: Any) -> RunConfig:
    tiled = {"vae_tile": 128, **(memory or {})}  # decoding must not take more than the forward
    return make_config(FOURTEEN, memory=tiled, sampling={**SIZE, **sampling})


def found(**given: Any) -> Estimate:
    return estimate(config_of(**given), H200)


def parts(**given: Any) -> dict[str, int]:
    return dict(found(**given).phase("sampling").parts)


def test_kept_results_are_keys_and_values_of_both_texts_and_a_start() -> None:
    text = 2 * TEXT * DIM * (1 + 2 * LAYERS)
    assert parts()["kept results"] == 2 * text + 2 * TOKENS * DIM
    assert parts(guidance_scale=1.0)["kept results"] == text
    for memory in ({"blocks_to_swap": 1}, {"compile_blocks": True}):
        assert "kept results" not in parts(memory=memory)


def test_a_step_cache_keeps_a_residual_for_each_pass_that_waits() -> None:
    residual = 2 * TOKENS * DIM
    cached = parts(step_cache="magcache", memory={"blocks_to_swap": 1})
    assert cached["step cache"] == residual
    skipping = {"slg_mode": "original", "slg_layers": [9]}
    assert parts(step_cache="magcache", **skipping)["step cache"] == 2 * residual
    assert "step cache" not in parts(step_cache="magcache", guidance_scale=1.0)


def test_passes_in_one_batch_double_the_activations_where_there_is_guidance() -> None:
    one, two = parts(), parts(cfg_batch=True)
    assert two["live block"] == pytest.approx(2 * one["live block"], rel=0.01)
    assert parts(cfg_batch=True, guidance_scale=1.0) == parts(guidance_scale=1.0)


def test_auto_swaps_more_blocks_for_passes_in_one_batch() -> None:
    swapped = []
    for batch in (False, True):
        config = config_of(memory={"blocks_to_swap": "auto"}, cfg_batch=batch)
        (video,) = planned_videos(config.sampling, get_variant(FOURTEEN))
        resolved = resolve_memory(config, find_gpu("RTX 4090"), forwards=[video.working_set()])
        swapped.append(resolved.values["blocks_to_swap"])
    assert 0 < swapped[0] < swapped[1]


def test_passes_in_one_batch_wait_for_swapped_blocks_once() -> None:
    image = {"width": 512, "height": 512, "num_frames": 1, "memory": {"blocks_to_swap": 40}}
    one, two = (found(cfg_batch=batch, **image).jobs["sampling"].item_s for batch in (False, True))
    assert two["products"] == pytest.approx(one["products"], rel=0.001)
    assert two["copies from RAM"] < 0.6 * one["copies from RAM"]


def test_blocks_that_are_left_out_take_no_time() -> None:
    plain = found().jobs["sampling"]
    always: dict[str, Any] = {"slg_layers": list(range(10)), "slg_end": 1.0}
    spared = found(slg_mode="uncond", **always).jobs["sampling"]
    more = found(slg_mode="original", **always).jobs["sampling"]
    assert (plain.num_forwards, spared.num_forwards, more.num_forwards) == (20, 20, 30)
    for part in ("products", "attention"):
        assert spared.item_s[part] == pytest.approx(plain.item_s[part] * 7 / 8)
        assert more.item_s[part] == pytest.approx(plain.item_s[part] * 11 / 8)


def test_a_step_cache_makes_the_time_an_upper_bound() -> None:
    result = found(step_cache="teacache")
    cost = result.jobs["sampling"]
    assert cost.at_most
    assert cost.to_json()["at_most"] is True
    assert cost.total_s == found().jobs["sampling"].total_s
    assert "up to 20 passes" in "\n".join(summary(result))
    assert "up to 20 passes" not in "\n".join(summary(found()))
    assert "up to" in sampling_line(60, "H200", at_most=True)
    assert "up to" not in sampling_line(60, "H200")


@pytest.mark.parametrize(("shared", "rounds"), [(1, 2), (2, 3), (4, 5)])
def test_prompts_are_dealt_out_to_processes_or_shared_by_them(shared: int, rounds: int) -> None:
    prompts = [{"prompt": text} for text in "abcde"]
    config = config_of(prompts=prompts)
    where = {"engine": "deepspeed", "num_processes": 4, "sequence_parallel": shared}
    several = RunConfig.model_validate(config.model_dump() | {"distributed": where})
    alone, cost = (estimate_sampling(one, H200) for one in (config, several))
    assert cost.total_s is not None
    videos = cost.total_s - sum(cost.once_s.values())
    assert videos == pytest.approx(rounds * sum(cost.item_s.values()))
    assert cost.item_s["attention"] == pytest.approx(alone.item_s["attention"] / shared)
    assert cost.host_phases["steps"]["processes"] == 4 * alone.host_phases["steps"]["processes"]
    sent = 4 * (TOKENS // shared) * DIM * 2 * (shared - 1) / shared
    exchange = cost.item_s.get("sequence exchange", 0)
    assert exchange == pytest.approx(20 * LAYERS * sent / (H200.link_gb_s * 1e9))
    # One prompt keeps no more processes busy than share it.
    first = several.sampling.model_copy(update={"prompts": several.sampling.prompts[:1]})
    single = estimate_sampling(several.model_copy(update={"sampling": first}), H200)
    ratio = single.host_phases["steps"]["processes"] / alone.host_phases["steps"]["processes"]
    assert ratio == shared
