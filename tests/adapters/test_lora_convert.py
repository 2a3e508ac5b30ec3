"""`menma lora convert`: round trips to the last bit, and files with both experts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trainer.adapters import load_adapter
from trainer.adapters.base import LoRAFactors
from trainer.adapters.formats.writer import save_adapter
from trainer.jobs.convert import restored
from trainer.jobs.inspect_lora import inspect_lora

from .lora_tool_runs import deltas, header, lora, refusal, same_bits, tool
from .tiny_models import make_factors, make_transformer, make_twin, model_inputs, run_twin

NAMES = ["blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.0.cross_attn.k_img"]


def convert(source, output, layout, **options):
    return tool("convert", input=source, output=output, layout=layout, force=True, **options)


def random_factors(ranks, alphas, dtype, seed):
    stream = torch.Generator().manual_seed(seed)
    return {
        name: LoRAFactors(
            torch.randn(rank, 8, generator=stream).to(dtype),
            torch.randn(6, rank, generator=stream).to(dtype),
            alpha,
        )
        for name, rank, alpha in zip(NAMES, ranks, alphas, strict=True)
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.tuples(*[st.integers(1, 5)] * 3),
    powers=st.tuples(*[st.integers(-4, 4)] * 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    way=st.sampled_from([("comfy",), ("peft",), ("comfy", "peft"), ("peft", "comfy")]),
    seed=st.integers(0, 1000),
)
def test_there_and_back_gives_every_bit(tmp_path, ranks, powers, dtype, way, seed):
    alphas = [rank * 2.0**power for rank, power in zip(ranks, powers, strict=True)]
    first = tmp_path / "first.safetensors"
    original = random_factors(ranks, alphas, dtype, seed)
    save_adapter(original, first, layout="kohya", dtype=dtype)
    last = first
    for number, layout in enumerate(way):
        step = tmp_path / f"{number}.safetensors"
        convert(last, step, layout)
        for name, delta in deltas(step).items():
            torch.testing.assert_close(delta, deltas(first)[name], rtol=1e-6, atol=0)
        last = step
    back = tmp_path / "back.safetensors"
    convert(last, back, "kohya")
    tables = load_file(first), load_file(back)
    assert tables[0].keys() == tables[1].keys()
    if way[-1] == "comfy" or "comfy" not in way:
        for key, value in tables[0].items():
            assert same_bits(tables[1][key], value), key


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(alpha=st.floats(0.1, 100), rank=st.integers(1, 5), seed=st.integers(0, 1000))
def test_other_scales_come_back_through_fp32(tmp_path, alpha, rank, seed):
    first, wide, back = (tmp_path / f"{name}.safetensors" for name in ("first", "wide", "back"))
    save_adapter(
        random_factors([rank] * 3, [alpha] * 3, torch.bfloat16, seed), first, layout="kohya"
    )
    convert(first, wide, "comfy", dtype="fp32")
    (event,) = convert(wide, back, "kohya")
    assert event["dtype"] == "bfloat16"
    for key, value in load_file(first).items():
        assert same_bits(load_file(back)[key], value), key


def test_alphas_that_cannot_come_back_exactly_are_left_folded(tmp_path):
    first, comfy, back = (tmp_path / f"{name}.safetensors" for name in ("first", "comfy", "back"))
    lora(first, rank=3, alpha=1.0, dtype=torch.bfloat16)
    convert(first, comfy, "comfy")
    convert(comfy, back, "kohya")
    for name, delta in deltas(comfy).items():
        assert torch.equal(deltas(back)[name], delta), "the update itself is the same"
    assert {update.alpha for update in load_adapter(back).values()} == {3.0}


@pytest.mark.parametrize(
    "table",
    [
        "{",
        "[]",
        '{"alpha": "x", "dtype": "bfloat16"}',
        '{"alpha": 2, "dtype": "Tensor"}',
        '{"alpha": {"blocks.0.self_attn.q": 7}, "dtype": "float32"}',
        '{"alpha": 0, "dtype": "float32"}',
    ],
)
def test_a_damaged_entry_of_the_header_changes_no_update(tmp_path, table):
    path = tmp_path / "a.safetensors"
    lora(path, layout="comfy", metadata={"menma.folded_alpha": table})
    adapter = load_adapter(path)
    for name, update in restored(adapter).items():
        torch.testing.assert_close(update.delta(), adapter[name].delta(), rtol=1e-6, atol=1e-7)


@pytest.fixture
def experts(tmp_path):
    """A LoRA for each expert, in kohya's layout."""
    files = {}
    for seed, expert in enumerate(("high_noise", "low_noise")):
        files[expert] = tmp_path / f"fish_{expert}.safetensors"
        said = {"ss_seed": "7", "ss_steps": str(seed), "menma.expert": expert}
        lora(files[expert], alpha=8.0, seed=seed, metadata=said)
    return files


@pytest.mark.parametrize("layout", ["comfy", "peft"])
def test_two_experts_in_one_file_and_back(experts, tmp_path, layout):
    both = tmp_path / "both.safetensors"
    convert(experts["low_noise"], both, layout, join=experts["high_noise"])
    for expert, file in experts.items():
        found = load_adapter(both, expert=expert)
        for name, delta in deltas(file).items():
            torch.testing.assert_close(found[name].delta().double(), delta, rtol=1e-6, atol=1e-7)
    said = header(both)
    assert said["ss_seed"] == "7"
    assert "ss_steps" not in said
    other = tmp_path / "other.safetensors"
    (event,) = convert(both, other, "peft" if layout == "comfy" else "comfy")
    assert event["num_modules"] == 60
    found = tool("convert", input=other, output=tmp_path / "fish.safetensors", layout="kohya",
                 split=True, force=True)  # fmt: skip
    assert [event["expert"] for event in found] == ["high_noise", "low_noise"]
    for event in found:
        file = tmp_path / f"fish_{event['expert']}.safetensors"
        assert str(file) == event["path"]
        assert header(file)["menma.expert"] == event["expert"]


@pytest.mark.parametrize("way", [("peft",), ("comfy",), ("comfy", "peft"), ("comfy", "comfy")])
def test_two_experts_come_back_to_the_last_bit(experts, tmp_path, way):
    both, split = tmp_path / "both.safetensors", tmp_path / "again.safetensors"
    convert(experts["high_noise"], both, way[0], join=experts["low_noise"])
    for number, layout in enumerate(way[1:]):
        following = tmp_path / f"{number}.safetensors"
        convert(both, following, layout)
        both = following
    convert(both, split, "kohya", split=True)
    for expert, file in experts.items():
        again = load_file(tmp_path / f"again_{expert}.safetensors")
        assert all(same_bits(again[key], value) for key, value in load_file(file).items())


@torch.no_grad()
def test_diffusers_loads_each_expert_of_a_joined_file(experts, tmp_path):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    both = tmp_path / "both.safetensors"
    convert(experts["high_noise"], both, "peft", join=experts["low_noise"])
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(both), return_lora_metadata=True)
    model = make_transformer()
    for prefix, expert in (("transformer", "high_noise"), ("transformer_2", "low_noise")):
        twin, wanted = make_twin(model), make_twin(model)
        own = {k: v for k, v in state.items() if k.startswith(f"{prefix}.")}
        twin.load_lora_adapter(own, prefix=prefix, metadata=metadata)
        alone = tmp_path / f"{expert}.safetensors"
        convert(experts[expert], alone, "peft")
        single, said = WanLoraLoaderMixin.lora_state_dict(str(alone), return_lora_metadata=True)
        wanted.load_lora_adapter(single, prefix="transformer", metadata=said)
        inputs = model_inputs(model)
        torch.testing.assert_close(run_twin(twin, inputs), run_twin(wanted, inputs))
        assert (run_twin(twin, inputs) - run_twin(make_twin(model), inputs)).abs().max() > 1e-2


def test_mistakes_with_experts(experts, tmp_path, capfd):
    high, low = experts["high_noise"], experts["low_noise"]
    plain, both = tmp_path / "plain.safetensors", tmp_path / "both.safetensors"
    lora(plain, seed=4)
    convert(high, both, "comfy", join=low)

    def said(source, **options):
        request = {"input": source, "output": tmp_path / "o.safetensors", **options}
        return refusal("convert", tmp_path, capfd, **request)

    assert "no names for two experts" in said(high, join=low, layout="kohya")
    assert "no names for two experts" in said(both, layout="kohya")
    other = tmp_path / "other_high_noise.safetensors"
    lora(other, seed=4)
    assert "both are for the high_noise expert" in said(high, join=other)
    third = tmp_path / "third.safetensors"
    lora(third, seed=5)
    assert "neither says" in said(plain, join=third)
    assert "holds one LoRA" in said(plain, split=True)
    assert "exclude each other" in said(both, split=True, expert="high_noise")
    assert "given twice" in said(high, join=high)
    (tmp_path / "o_low_noise.safetensors").write_bytes(b"mine")
    assert "there already" in said(both, split=True)


def test_a_pair_is_described_expert_by_expert(experts, tmp_path):
    both = tmp_path / "both.safetensors"
    convert(experts["high_noise"], both, "comfy", join=experts["low_noise"])
    found = inspect_lora(both)
    assert found["pair"].keys() == {"high_noise", "low_noise"}
    assert found["pair"]["low_noise"]["num_modules"] == 30
    assert "num_modules" not in found
    assert found["pair"]["low_noise"]["expert"] == "low_noise"
    one = inspect_lora(both, expert="low_noise")
    assert one["pair"] is None
    assert one["norm"] == pytest.approx(found["pair"]["low_noise"]["norm"])
    assert not one["programs"]["ComfyUI"]["loads"]
    json.dumps(found)
    small = tmp_path / "small.safetensors"
    tool("lora_resize", input=both, output=small, rank=2, expert="low_noise")
    assert inspect_lora(small)["expert"] == header(small)["menma.expert"] == "low_noise"
    (event,) = tool("inspect", path=both)
    assert event["lora"]["pair"]["high_noise"]["ranks"] == {"4": 30}


def test_norms_by_block(tmp_path):
    path = tmp_path / "a.safetensors"
    factors = lora(path) | make_factors(make_transformer(), names=["head.head"])
    save_adapter(factors, path, layout="kohya", dtype=torch.float32)
    found = inspect_lora(path)["norm_by_block"]
    assert list(found) == ["0", "1", "2", "other"]
    for block, norm in found.items():
        own = [d for n, d in deltas(path).items()
               if n.startswith(f"blocks.{block}." if block != "other" else "head.")]  # fmt: skip
        squares = sum(float(delta.square().sum()) for delta in own)
        assert norm == pytest.approx(squares**0.5, rel=1e-5)


ATTENTION = [f"blocks.{i}.self_attn.{n}" for i in range(3) for n in "qv"]


@pytest.mark.parametrize(
    ("layout", "names", "loads"),
    [
        ("comfy", None, {"ComfyUI", "diffusers"}),
        ("comfy", [*ATTENTION, "head.head"], {"ComfyUI", "diffusers"}),
        ("kohya", None, {"ComfyUI", "diffusers", "musubi-tuner"}),
        ("kohya", ATTENTION, {"ComfyUI", "musubi-tuner"}),
        ("kohya", ["head.head"], {"ComfyUI", "musubi-tuner"}),
        ("peft", None, {"diffusers"}),
    ],
)
def test_programs_that_load_it(tmp_path, layout, names, loads):
    """What is said of diffusers is what diffusers does."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    path = tmp_path / "a.safetensors"
    lora(path, layout=layout, names=names)
    found = inspect_lora(path)["programs"]
    assert {name for name, answer in found.items() if answer["loads"]} == loads
    assert all(answer["loads"] or answer["why"] for answer in found.values())
    try:
        state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
        WanLoraLoaderMixin.load_lora_into_transformer(
            state, make_twin(make_transformer()), adapter_name="a", metadata=metadata
        )
    except (KeyError, ValueError, IndexError):
        assert "diffusers" not in loads
    else:
        assert "diffusers" in loads
