"""The text encoder in the estimate: its precision, and where it works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_configs import make_config
from torch import nn

from trainer.contract.memory_model import encoders, estimate
from trainer.contract.memory_model.texts import CPU_FLOPS
from trainer.models.wan.text_encoder import TextEncoderConfig, build_umt5
from trainer.quant.fp8 import Fp8Spec, quantise

GIB = 2**30
PARTS = {"processes", "weights in transit"}


def of(**memory: Any) -> Any:
    return estimate(make_config("wan2.1-t2v-14b", memory=memory), "H200")


def test_the_size_in_fp8_is_that_of_the_layers() -> None:
    with torch.device("meta"):
        model = build_umt5(TextEncoderConfig()).bfloat16()
    size = sum(parameter.nbytes for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = quantise(layer.weight.detach(), Fp8Spec(scaled=True))
            assert weight.scale is not None
            size += weight.values_OI.nbytes + weight.scale.nbytes - layer.weight.nbytes
    assert encoders.fp8_text_encoder_bytes() == size


def test_fp8_takes_less_memory_and_more_time() -> None:
    plain, rounded = of(), of(text_encoder_dtype="fp8_scaled")
    fewer = plain.phase("captions").peak_bytes - rounded.phase("captions").peak_bytes
    assert 4.05 * GIB < fewer < 4.15 * GIB
    assert rounded.phase("captions").parts["text encoder"] == encoders.fp8_text_encoder_bytes()
    for job in ("caching", "sampling"):
        assert rounded.jobs[job].host_phases == plain.jobs[job].host_phases
    more = rounded.jobs["caching"].item_s["caption"] - plain.jobs["caching"].item_s["caption"]
    assert 0.005 < more < 0.02  # 32 GB of traffic at 4.8 TB/s


def test_on_the_cpu_it_takes_ram_in_the_place_of_the_gpu_s() -> None:
    plain, away = of(), of(text_encoder_device="cpu")
    assert away.phase("captions").parts.keys() == {"CUDA context"}
    assert plain.phase("captions").parts["text encoder"] == encoders.text_encoder_bytes(2)
    for job, phase in (("caching", "captions"), ("sampling", "texts")):
        assert plain.jobs[job].host_phases[phase].keys() == PARTS
        parts = away.jobs[job].host_phases[phase]
        assert parts["text encoder"] == encoders.text_encoder_bytes(2)
    assert away.jobs["caching"].item_s["caption"] == pytest.approx(4.8e12 / CPU_FLOPS, rel=0.02)
    assert away.jobs["sampling"].once_s["texts"] > 10 * plain.jobs["sampling"].once_s["texts"]


def test_samples_of_a_run_have_it_in_ram_before_the_first_one() -> None:
    sampling = {"prompts": [{"prompt": "a cat"}], "every_steps": 100}
    plain, away = (
        estimate(make_config("wan2.1-t2v-14b", memory=memory, sampling=sampling), "H200")
        for memory in ({}, {"text_encoder_device": "cpu"})
    )
    assert "parked VAE" in plain.host_parts
    assert away.host_parts["text encoder"] == encoders.text_encoder_bytes(2)
    assert away.host_bytes > plain.host_bytes + 8 * GIB
