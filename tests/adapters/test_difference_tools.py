"""The LoRA tools on files with whole differences: exact, or refused before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from trainer.adapters import load_adapter
from trainer.adapters.apply import attach
from trainer.contract.config import RunConfig
from trainer.contract.errors import ConfigError, ModelFileError
from trainer.contract.lora_use import LoRAUse, SampleLoRA
from trainer.contract.variants import get_variant
from trainer.jobs.companions import attach_companions, companion_problems
from trainer.jobs.inspect_lora import inspect_lora
from trainer.jobs.sample_lora_checks import check_compiled, check_loras, check_merge
from trainer.jobs.sample_loras import LoRASwitch
from trainer.models.wan.loading import load_transformer, save_transformer
from trainer.sampling.requests import SampleRequest

from .difference_files import by_formula, distilled, draw, exact_model, key_of, write
from .lora_tool_runs import refusal, same_bits, tool
from .test_merge_formats import E4M3, E5M2, fp8_base
from .test_merge_formats import load as load_tiny
from .tiny_models import make_transformer, model_inputs, run

T2V = get_variant("wan2.1-t2v-1.3b")
PAIR = get_variant("wan2.2-t2v-a14b")


@pytest.fixture
def model():
    return make_transformer()


@pytest.fixture
def fast(tmp_path, model):
    """A file with factors in bf16 and differences in float32, as ComfyUI's own tools write."""
    tensors = {
        key: tensor.bfloat16() if "lora_" in key else tensor
        for key, tensor in distilled(model).items()
    }
    return write(tmp_path / "fast.safetensors", tensors)


def named_in(path, *, without=()):
    return {k: t for k, t in load_file(path).items() if not any(word in k for word in without)}


def wanted_of(model, *parts):
    """Return the answer of W + Σ strength · LoRA in float64."""
    before = {name: value.double() for name, value in model.state_dict().items()}
    total = dict(before)
    for path, strength in parts:
        for name, value in by_formula(model, load_file(path), strength).items():
            total[name] = total[name] + value - before[name]
    made = exact_model(model, total)
    with torch.no_grad():
        return run(made, model_inputs(made))


@torch.no_grad()
def attached(path, strength=1.0):
    model = make_transformer()
    attach(model, load_adapter(path, differences=True), strength)
    return run(model, model_inputs(model))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_convert_goes_there_and_back_bit_for_bit(tmp_path, fast):
    modulations = tmp_path / "without.safetensors"
    write(modulations, named_in(fast, without=("modulation",)))
    kohya, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    tool("convert", input=modulations, output=kohya, layout="kohya")
    names = load_file(kohya)
    assert "lora_unet_blocks_0_norm3.diff_b" in names
    assert "lora_unet_blocks_2_self_attn_norm_q.diff" in names
    assert "lora_unet_head_head.diff" in names
    assert "lora_unet_head_head.alpha" not in names
    tool("convert", input=kohya, output=back, layout="comfy")
    before, after = load_file(modulations), load_file(back)
    renamed = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
        for key, tensor in before.items()
    }
    assert renamed.keys() == after.keys()
    assert all(same_bits(tensor, after[key]) for key, tensor in renamed.items())
    whole = tmp_path / "whole.safetensors"
    tool("convert", input=fast, output=whole, layout="comfy")
    assert "diffusion_model.blocks.0.modulation.diff" in load_file(whole)
    tool("convert", input=fast, output=whole, dtype="fp16", force=True)
    assert {tensor.dtype for tensor in load_file(whole).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("layout", "key"), [("kohya", "blocks.0.modulation.diff"), ("peft", ".diff")]
)
def test_a_layout_without_a_name_is_refused(tmp_path, fast, capfd, layout, key):
    output = tmp_path / "out.safetensors"
    words = refusal("convert", tmp_path, capfd, input=fast, output=output, layout=layout)
    assert key in words
    assert layout in words
    assert "out.safetensors" in words


def test_both_experts_in_one_file(tmp_path, model, capfd):
    paths = {}
    for seed, expert in enumerate(("high_noise", "low_noise")):
        paths[expert] = write(tmp_path / f"{expert}.safetensors", distilled(model, seed=seed))
    both = tmp_path / "both.safetensors"
    tool("convert", input=paths["high_noise"], join=paths["low_noise"], output=both)
    assert "diffusion_model.transformer_2.blocks.0.norm3.diff_b" in load_file(both)
    for expert, path in paths.items():
        part = load_adapter(both, expert=expert, differences=True)
        own = load_adapter(path, differences=True)
        assert part.differences.keys() == own.differences.keys()
        assert all(same_bits(t, part.differences[n]) for n, t in own.differences.items())
    tool("convert", input=both, output=tmp_path / "part.safetensors", split=True)
    split = load_adapter(tmp_path / "part_low_noise.safetensors", differences=True)
    low = load_adapter(paths["low_noise"], differences=True)
    assert split.differences.keys() == low.differences.keys()
    assert "head.head" in split


def test_merging_into_a_base_in_bf16_rounds_once(tmp_path, model, fast):
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    model = model.bfloat16()
    save_transformer(model, base)
    (event,) = tool("merge", base=base, loras=[{"path": fast, "strength": 0.6}], output=output)
    exact = by_formula(model, load_file(fast), 0.6)
    merged = load_file(output)
    assert event["num_changed"] == sum(
        bool((exact[name] != value.double()).any()) for name, value in model.state_dict().items()
    )
    for name, value in merged.items():
        wanted = exact[name].to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=2**-7, atol=1e-6, msg=name)
    back = tmp_path / "back.safetensors"
    tool("lora_subtract", minuend=output, loras=[{"path": fast, "strength": 0.6}], output=back)
    for name, value in load_file(back).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0.05, atol=0.01, msg=name)


@pytest.mark.parametrize(("form", "dtype"), [("plain", E5M2), ("tensor", E4M3), ("rows", E4M3)])
def test_merging_into_an_fp8_base(tmp_path, fast, form, dtype):
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    values = fp8_base(base, form=form, dtype=dtype)
    tool("merge", base=base, loras=[{"path": fast}], output=output)
    exact = by_formula(exact_model(make_transformer(), values), load_file(fast))
    stored = load_tiny(output).state_dict()
    for name in ("blocks.1.norm3.bias", "blocks.0.modulation", "patch_embedding.weight",
                 "head.head.weight", "blocks.2.self_attn.q.bias"):  # fmt: skip
        torch.testing.assert_close(stored[name], exact[name].float(), msg=name)
    found, wanted = stored["blocks.1.ffn.0.weight"], exact["blocks.1.ffn.0.weight"].float()
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_bias_in_plain_fp8_keeps_its_shape(tmp_path, model):
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    tensors = {name: value.to(E4M3) for name, value in model.state_dict().items()}
    write(base, tensors)
    name = "blocks.0.self_attn.q.bias"
    path = write(tmp_path / "b.safetensors", {key_of(name): torch.full((24,), 0.5)})
    tool("merge", base=base, loras=[{"path": path}], output=output)
    wanted = (tensors[name].float() + 0.5).to(E4M3)
    assert same_bits(load_file(output)[name], wanted)


def test_each_expert_gets_its_own(tmp_path, model):
    outputs = {}
    paths = {}
    for seed, expert in enumerate(("high_noise", "low_noise")):
        save_transformer(model, tmp_path / f"base_{expert}.safetensors")
        paths[expert] = write(tmp_path / f"fast_{expert}.safetensors", distilled(model, seed=seed))
        outputs[expert] = tmp_path / f"out_{expert}.safetensors"
    tool(
        "merge",
        base=tmp_path / "base_low_noise.safetensors",
        base_high_noise=tmp_path / "base_high_noise.safetensors",
        loras=[{"path": path} for path in paths.values()],
        output=tmp_path / "out.safetensors",
    )
    for expert, path in paths.items():
        exact = by_formula(model, load_file(path))
        for name, value in load_file(outputs[expert]).items():
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


def test_sums_and_differences_of_files_are_exact(tmp_path, model, fast):
    other = write(tmp_path / "other.safetensors", distilled(model, seed=9))
    output, again = tmp_path / "sum.safetensors", tmp_path / "again.safetensors"
    parts = [{"path": fast, "strength": 0.5}, {"path": other, "strength": -0.25}]
    tool("lora_merge", loras=parts, output=output)
    close(attached(output), wanted_of(model, (fast, 0.5), (other, -0.25)))
    tool("lora_merge", loras=parts[::-1], output=again)
    one, two = load_file(output), load_file(again)
    assert all(same_bits(tensor, two[key]) for key, tensor in one.items())
    # Alone at strength 1 every bit stays.
    tool("lora_merge", loras=[{"path": fast}], output=again, force=True)
    alone = load_adapter(again, differences=True).differences
    for name, tensor in load_adapter(fast, differences=True).differences.items():
        assert same_bits(alone[name], tensor)
    # A whole matrix and factors are a whole matrix.
    factors = tmp_path / "factors.safetensors"
    write(factors, {
        "diffusion_model.head.head.lora_down.weight": torch.ones(2, 24),
        "diffusion_model.head.head.lora_up.weight": torch.ones(64, 2) * 0.1,
    })  # fmt: skip
    tool("lora_merge", loras=[{"path": fast}, {"path": factors}], output=output, force=True)
    assert "diffusion_model.head.head.diff" in load_file(output)
    close(attached(output), wanted_of(model, (fast, 1.0), (factors, 1.0)))
    tool("lora_subtract", minuend=output, loras=[{"path": fast}], output=again, energy=1.0,
         force=True)  # fmt: skip
    assert set(load_adapter(again)) == {"head.head"}, "what cancels is gone, differences too"
    close(attached(again), wanted_of(model, (factors, 1.0)))


def test_resize_keeps_them_and_makes_factors_of_matrices(tmp_path, model, fast):
    output = tmp_path / "small.safetensors"
    (event,) = tool("lora_resize", input=fast, output=output, rank=64, dtype="fp32")
    assert any("whole differences" in words for words in event["said"])
    assert "diffusion_model.head.head.lora_A.weight" in load_file(output)
    close(attached(output), wanted_of(model, (fast, 1.0)))


def test_ema_averages_them(tmp_path, model):
    paths = [write(tmp_path / f"step-{n}.safetensors", distilled(model, seed=n)) for n in (1, 2, 3)]
    output = tmp_path / "ema.safetensors"
    tool("lora_ema", files=paths, beta=0.5, output=output)
    one, two, three = (load_file(path) for path in paths)
    for key, tensor in load_file(output).items():
        wanted = 0.25 * one[key].double() + 0.25 * two[key].double() + 0.5 * three[key].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("job", "extra"),
    [
        ("lora_blend", {"files": ["FAST", "OTHER"], "output": "FOLDER"}),
        ("lora_ema", {"files": ["FAST", "OTHER"], "output": "OUT", "exact": True}),
    ],
)
def test_what_has_no_sum_for_them_is_refused(tmp_path, model, fast, capfd, job, extra):
    other = write(tmp_path / "other.safetensors", distilled(model, seed=9))
    named = {"FAST": fast, "OTHER": other, "OUT": tmp_path / "o.safetensors",
             "FOLDER": tmp_path / "folder"}  # fmt: skip
    if job == "lora_blend":
        extra = {"files": [{"path": str(named[f])} for f in extra["files"]],
                 "output": str(named["FOLDER"]), "share": 0.5}  # fmt: skip
    else:
        extra |= {"files": [str(named[f]) for f in extra["files"]], "output": str(named["OUT"])}
    words = refusal(job, tmp_path, capfd, **extra)
    assert "whole differences" in words
    assert "fast.safetensors" in words
    assert ".diff" in words


def test_files_of_different_models_are_refused(tmp_path, model, capfd):
    one = write(tmp_path / "one.safetensors", {key_of("blocks.0.norm3.bias"): torch.ones(24)})
    two = write(tmp_path / "two.safetensors", {key_of("blocks.1.norm3.bias"): torch.ones(48)})
    words = refusal("lora_merge", tmp_path, capfd, loras=[{"path": one}, {"path": two}],
                    output=tmp_path / "out.safetensors")  # fmt: skip
    assert "different models" in words
    assert "blocks.1.norm3.diff_b" in words
    base = tmp_path / "base.safetensors"
    save_transformer(model, base)
    words = refusal("merge", tmp_path, capfd, base=base, loras=[{"path": two}],
                    output=tmp_path / "out.safetensors")  # fmt: skip
    for word in ("two.safetensors", "blocks.1.norm3.diff_b", "(48,)", "(24,)"):
        assert word in words


def test_inspect_counts_them_and_says_who_loads_it(tmp_path, model, fast):
    found = inspect_lora(fast)
    whole = found["differences"]
    held = {k: t for k, t in load_file(fast).items() if k.endswith((".diff", ".diff_b"))}
    assert whole["num"] == len(held)
    assert whole["num_zero"] == 0
    assert whole["norm"] == pytest.approx(
        sum(float(t.double().square().sum()) for t in held.values()) ** 0.5
    )
    assert whole["names"]["norm3.diff_b"] == 3
    assert whole["names"]["head.head.diff"] == 1
    assert found["kind"] == "difference+lora"
    assert found["ranks"] == {"4": 30}
    assert found["programs"]["ComfyUI"]["loads"]
    assert "leaves out" in found["programs"]["diffusers"]["why"]
    assert "difference" in found["programs"]["musubi-tuner"]["why"]
    beside = {k: t for k, t in load_file(fast).items() if "lora_" in k or ".q.diff_b" in k}
    biases = inspect_lora(write(tmp_path / "biases.safetensors", beside))
    assert biases["programs"]["diffusers"]["loads"]
    # Norms alone tell models apart.
    shape = get_variant("wan2.1-t2v-14b").transformer
    alone = {key_of(f"blocks.{shape.num_layers - 1}.norm3.bias"): torch.ones(shape.dim)}
    fits = inspect_lora(write(tmp_path / "norm.safetensors", alone))
    assert "wan2.1-t2v-14b" in fits["variants"]
    assert "wan2.1-t2v-1.3b" not in fits["variants"]
    assert fits["num_parameters"] == shape.dim


def test_strengths_of_steps_and_experts_reach_them(tmp_path, model, fast):
    use = SampleLoRA(
        path=fast, strength=0.8, strength_high_noise=-0.5, schedule=((0.0, 1.0), (1.0, 0.25))
    )
    switch = LoRASwitch((use,), has_experts=True)
    switch.begin(SampleRequest.of("a cat", PAIR))
    models = {"high_noise": make_transformer(), "low_noise": make_transformer()}
    for done, expert, strength in (
        (0, "high_noise", -0.5),
        (1, "high_noise", -0.5 * 0.625),
        (2, "low_noise", 0.8 * 0.25),
    ):
        switch.on_step(done, 3)
        ready = switch.ready(models[expert], expert)
        with torch.no_grad():
            close(run(ready, model_inputs(ready)), wanted_of(model, (fast, strength)))


def test_merged_while_sampling_is_attached(model, fast):
    use = LoRAUse(path=fast, strength=0.7)
    check_merge((use,), [SampleRequest.of("a cat", T2V)], RunConfig.model_validate({}))
    switch = LoRASwitch((use,), has_experts=False, merges=True)
    switch.begin(SampleRequest.of("a cat", T2V))
    merged = switch.ready(make_transformer(), "low_noise")
    with torch.no_grad():
        close(run(merged, model_inputs(merged)), attached(fast, 0.7))


def test_sampling_is_refused_before_anything_is_loaded(tmp_path, model, fast):
    base = tmp_path / "base.safetensors"
    save_transformer(model, base)
    check_loras([LoRAUse(path=fast)], T2V, {"low_noise": base})
    wide = write(
        tmp_path / "wide.safetensors", {key_of("blocks.0.self_attn.norm_q.weight"): torch.ones(48)}
    )
    with pytest.raises(ModelFileError, match=r"wide.*norm_q\.diff is \(48,\)"):
        check_loras([LoRAUse(path=wide)], T2V, {"low_noise": base})
    compiled = RunConfig.model_validate({"memory": {"compile_blocks": True}})
    requests = [SampleRequest.of("a cat", T2V)]
    with pytest.raises(ConfigError, match=r"fast\.safetensors.*compiled") as caught:
        check_compiled([LoRAUse(path=fast)], requests, T2V, compiled)
    assert "--merge" in caught.value.hint
    biases = draw(model, ["blocks.0.ffn.0.bias", "head.modulation", "patch_embedding.weight"])
    small = write(tmp_path / "small.safetensors", {key_of(n): t for n, t in biases.items()})
    check_compiled([LoRAUse(path=small)], requests, T2V, compiled)


def test_frozen_companions_have_them(tmp_path, model, fast):
    def config(**memory_and_more):
        frozen = [{"path": str(fast), "strength": 0.5}]
        return RunConfig.model_validate({"adapter": {"frozen": frozen}, **memory_and_more})

    assert not list(companion_problems(config(), model.config, None))
    attach_companions(config(), model, None)
    with torch.no_grad():
        close(run(model, model_inputs(model)), wanted_of(make_transformer(), (fast, 0.5)))
    for changed, words in (
        ({"memory": {"compile_blocks": True}}, "compiled blocks"),
        ({"distributed": {"zero_stage": 3}}, "ZeRO-3"),
    ):
        (problem,) = companion_problems(config(**changed), model.config, None)
        assert words in problem.message
        assert problem.key == "adapter.frozen[0].path"
    shape = make_transformer(dim=48).config
    (problem,) = companion_problems(config(), shape, None)
    assert "another model" in problem.message
    odd = {key_of("blocks.0.norm3.weight"): torch.ones(48)}
    write(fast, odd)
    (problem,) = companion_problems(config(), model.config, None)
    assert "blocks.0.norm3.diff" in problem.message


def test_the_header_says_what_was_merged(tmp_path, model, fast):
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_transformer(model, base)
    tool("merge", base=base, loras=[{"path": fast, "strength": 0.5}], output=output)
    loaded = load_transformer(output, dtype=torch.float32, config={"num_heads": 2})
    with torch.no_grad():
        close(run(loaded, model_inputs(loaded)), wanted_of(model, (fast, 0.5)))
    table = json.loads(load_adapter_header(output)["menma.merged"])
    assert table == [{"file": "fast.safetensors", "strength": 0.5}]


def load_adapter_header(path):
    from trainer.io.mapped_load import open_weights

    return open_weights(path).metadata
