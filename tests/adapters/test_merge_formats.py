"""`menma merge` into fp8 bases and pairs of experts: what is written, and what it costs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.adapters import load_adapter
from trainer.models.wan.loading import load_transformer, save_transformer

from .lora_tool_runs import effect, header, lora, refusal, same_bits, tool
from .tiny_models import make_transformer, model_inputs, run

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LINEAR = "blocks.1.ffn.0"


def fp8_base(path, *, form: str, dtype=E4M3):
    """Write the tiny model with its blocks' matrices in fp8; return their exact values."""
    state = make_transformer().state_dict()
    tensors, exact, layers = {}, {}, {}
    for name, value in state.items():
        if not (name.startswith("blocks.") and value.dim() == 2 and name.endswith(".weight")):
            tensors[name] = exact[name] = value
            continue
        module = name.removesuffix(".weight")
        rows = value.abs().amax(1, keepdim=True) if form == "rows" else value.abs().max()
        scale = torch.ones(()) if form == "plain" else (rows / torch.finfo(dtype).max).float()
        tensors[name] = (value / scale).to(dtype)
        exact[name] = tensors[name].float() * scale
        if form == "tensor":
            tensors[f"{module}.scale_weight"] = scale
            tensors[f"{module}.scale_input"] = torch.tensor(2.5)
        elif form == "rows":
            tensors[f"{module}.weight_scale"] = scale
            layers[module] = {"format": str(dtype).removeprefix("torch.")}
            table = json.dumps(layers[module]).encode()
            tensors[f"{module}.comfy_quant"] = torch.tensor(list(table), dtype=torch.uint8)
    if form == "tensor":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    said = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else {}
    save_file(tensors, path, metadata={"made_by": "us", **said})
    return exact


def load(path):
    return load_transformer(path, dtype=torch.float32, config={"num_heads": 2})


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("form", ["plain", "tensor", "rows"])
def test_an_fp8_base_stays_what_it_is(tmp_path, form, dtype):
    base, output, file = (tmp_path / f"{n}.safetensors" for n in ("base", "out", "lora"))
    exact = fp8_base(base, form=form, dtype=dtype)
    lora(file, alpha=64.0, names=[LINEAR, "blocks.2.self_attn.q", "head.head"])
    (event,) = tool("merge", base=base, loras=[{"path": file, "strength": 0.5}], output=output)
    before, after = load_file(base), load_file(output)
    changed = {f"{name}.weight" for name in load_adapter(file)}
    scales = {
        n.replace(".weight", f".{s}") for n in changed for s in ("scale_weight", "weight_scale")
    }
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    for name, value in before.items():
        assert same_bits(after[name], value) == (name not in changed | scales), name
    error = update = weights = 0.0
    stored = load(output).state_dict()
    for name in changed:
        delta = 0.5 * load_adapter(file)[name.removesuffix(".weight")].delta().double()
        wanted = exact[name].double() + delta
        error += float((stored[name].double() - wanted).square().sum())
        update += float(delta.square().sum())
        weights += float(wanted.square().sum())
        if before[name].dtype == dtype:  # half a step of the format, relative to each value
            step = torch.finfo(dtype).eps / 2 * wanted.abs() + torch.finfo(dtype).tiny
            assert ((stored[name].double() - wanted).abs() <= step * 1.01 + 1e-3).all()
    assert event["rounding"]["update_error"] == pytest.approx((error / update) ** 0.5, rel=1e-3)
    assert event["rounding"]["weight_error"] == pytest.approx((error / weights) ** 0.5, rel=1e-3)
    assert header(output)["made_by"] == "us"
    assert ("_quantization_metadata" in header(output)) == (form == "rows")


def test_scales_are_fresh(tmp_path):
    """A weight that outgrows the old scale is not cut off."""
    base, output, file = (tmp_path / f"{n}.safetensors" for n in ("base", "out", "lora"))
    exact = fp8_base(base, form="tensor")
    lora(file, alpha=4000.0, names=[LINEAR])
    tool("merge", base=base, loras=[{"path": file}], output=output)
    wanted = exact[f"{LINEAR}.weight"] + load_adapter(file)[LINEAR].delta()
    scale = load_file(output)[f"{LINEAR}.scale_weight"]
    assert float(scale) == pytest.approx(float(wanted.abs().max()) / 448, rel=1e-6)
    assert float(scale) > 2 * float(load_file(base)[f"{LINEAR}.scale_weight"])


@torch.no_grad()
def test_what_rounding_costs_is_told(tmp_path):
    base, output, file = (tmp_path / f"{n}.safetensors" for n in ("base", "out", "lora"))
    fp8_base(base, form="tensor")
    lora(file, alpha=0.2)
    (event,) = tool("merge", base=base, loras=[{"path": file}], output=output)
    assert event["rounding"]["update_error"] > 0.5
    assert "of what was added" in event["said"][-1]
    (precise,) = tool("merge", base=base, loras=[{"path": file}], output=output, dtype="fp32",
                      force=True)  # fmt: skip
    assert precise["rounding"]["update_error"] < 1e-4
    assert precise["said"] == []
    assert not any(name.endswith("scale_weight") for name in load_file(output))


@torch.no_grad()
def test_a_strong_lora_acts_in_fp8_as_it_should(tmp_path):
    base, output, file = (tmp_path / f"{n}.safetensors" for n in ("base", "out", "lora"))
    fp8_base(base, form="tensor")
    lora(file, alpha=40.0)
    tool("merge", base=base, loras=[{"path": file}], output=output)
    model, merged = (load(path) for path in (base, output))
    inputs = model_inputs(model)
    plain, found = run(model, inputs), run(merged, inputs)
    from trainer.adapters.apply import attach

    attach(model, load_adapter(file))
    wanted = run(model, inputs)
    assert (found - wanted).norm() < 0.25 * (wanted - plain).norm()


def test_one_scale_format_with_diffusers_names_is_refused(tmp_path, capfd):
    from trainer.contract.diffusers_names import to_diffusers_name

    plain, base, file = (tmp_path / f"{n}.safetensors" for n in ("plain", "base", "lora"))
    fp8_base(plain, form="tensor")
    tensors = {}
    for name, value in load_file(plain).items():
        module, _, leaf = name.rpartition(".")
        if leaf in {"scale_weight", "scale_input"}:
            renamed = to_diffusers_name(f"{module}.weight").replace("weight", leaf)
        else:
            renamed = name if name == "scaled_fp8" else to_diffusers_name(name)
        tensors[renamed] = value
    save_file(tensors, base)
    lora(file, names=[LINEAR])
    request = {"base": base, "loras": [{"path": file}], "output": tmp_path / "o.safetensors"}
    assert "--dtype bf16" in refusal("merge", tmp_path, capfd, **request)
    tool("merge", **request, dtype="bf16")


@pytest.fixture
def pair(tmp_path):
    """Two experts, and a LoRA for each and one for both."""
    bases = {}
    for seed, expert in enumerate(("high_noise", "low_noise")):
        bases[expert] = tmp_path / f"base_{expert}.safetensors"
        save_transformer(make_transformer(seed=seed), bases[expert])
        lora(tmp_path / f"fish_{expert}.safetensors", seed=seed + 10)
    lora(tmp_path / "style.safetensors", seed=20, rank=2)
    return bases


def test_both_experts_are_merged_in_one_call(pair, tmp_path):
    loras = [{"path": tmp_path / f"fish_{expert}.safetensors"} for expert in pair]
    loras.append({"path": tmp_path / "style.safetensors", "strength": 0.5})
    request = {"base": pair["low_noise"], "base_high_noise": pair["high_noise"], "loras": loras}
    found = tool("merge", **request, output=tmp_path / "out.safetensors")
    for event, expert in zip(found, ("high_noise", "low_noise"), strict=True):
        assert event["path"] == str(tmp_path / f"out_{expert}.safetensors")
        alone = tmp_path / f"alone_{expert}.safetensors"
        own = [{"path": tmp_path / f"fish_{expert}.safetensors"}, loras[-1]]
        tool("merge", base=pair[expert], loras=own, output=alone)
        for name, value in load_file(alone).items():
            assert same_bits(load_file(event["path"])[name], value)
        merged = [part["file"] for part in json.loads(header(event["path"])["menma.merged"])]
        assert merged == [f"fish_{expert}.safetensors", "style.safetensors"]
    assert not list(tmp_path.glob(".lora-*"))


def test_a_pair_is_written_whole_or_not_at_all(pair, tmp_path, capfd):
    low, high = pair["low_noise"], pair["high_noise"]
    request = {"base": low, "base_high_noise": high, "output": tmp_path / "out.safetensors"}
    only = [{"path": tmp_path / "fish_low_noise.safetensors"}]
    both = [*only, {"path": tmp_path / "fish_high_noise.safetensors"}]

    def said(**changes):
        return refusal("merge", tmp_path, capfd, **(request | {"loras": both} | changes))

    assert "no LoRA is for the high_noise expert" in said(loras=only)
    assert "given for both experts" in said(base_high_noise=low)
    foreign = tmp_path / "foreign_low_noise.safetensors"
    lora(foreign, names=["blocks.2.ffn.0"])
    small = tmp_path / "small.safetensors"
    save_transformer(make_transformer(num_layers=2), small)
    assert "another model" in said(base=small)
    # Only in the second file a value is too large for fp16.
    huge = [{**both[0], "strength": 1e8}, both[1]]
    assert "cannot hold" in said(loras=huge, dtype="fp16")
    swapped = tmp_path / "swapped.safetensors"
    save_transformer(make_transformer(), swapped, metadata={"menma.expert": "high_noise"})
    assert "given as the low_noise one" in said(base=swapped)
    (tmp_path / "out_low_noise.safetensors").write_bytes(b"mine")
    assert "there already" in said()


def test_a_lora_without_alpha_is_said_to_be_one(tmp_path):
    base, file = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_transformer(make_transformer(), base)
    lora(file, layout="comfy")
    (event,) = tool("merge", base=base, loras=[{"path": file}], output=tmp_path / "o.safetensors")
    assert "lora.safetensors: 30 modules have no alpha" in event["said"][0]
    assert torch.isfinite(effect((file, 1.0))).all()
