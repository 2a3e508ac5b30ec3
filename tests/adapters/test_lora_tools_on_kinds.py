"""The LoRA tools on kinds without two factors: LoHa, LoKr and DoRA."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from trainer.adapters import dora_linear as dora
from trainer.adapters import load_adapter
from trainer.adapters import loha_linear as loha
from trainer.adapters import lokr_linear as lokr
from trainer.adapters.formats.writer import save_adapter
from trainer.jobs.inspect_lora import inspect_lora

from .lora_tool_runs import best_approximation, effect, header, lora, refusal, same_bits, tool

NAMES = ["blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.2.self_attn.o"]


def update_of(kind: str, seed: int):
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.2 * torch.randn(*shape, generator=stream)

    if kind == "loha":
        shapes = {"w1_a": (24, 2), "w1_b": (2, 24), "w2_a": (24, 2), "w2_b": (2, 24)}
        return loha.loha_factors({name: 3 * draw(*shape) for name, shape in shapes.items()}, 1.0)
    if kind == "lokr":
        return lokr.lokr_factors({"w1": draw(4, 4), "w2_a": draw(6, 2), "w2_b": draw(2, 6)}, 1.0)
    return dora.DoRAFactors(draw(2, 24), draw(24, 2), 1 + draw(24).abs(), 1.0)


def other(path, kind, names=NAMES, **options):
    updates = {name: update_of(kind, number) for number, name in enumerate(names)}
    save_adapter(updates, path, **({"layout": "kohya", "dtype": torch.float32} | options))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_resize_makes_the_closest_plain_lora(tmp_path, kind):
    source, small, whole = (tmp_path / f"{n}.safetensors" for n in ("source", "small", "whole"))
    other(source, kind)
    (event,) = tool("lora_resize", input=source, output=small, rank=3, layout="comfy")
    assert event["ranks"] == {"3": 3}
    found, before = load_adapter(small), load_adapter(source)
    assert {update.kind for update in found.values()} == {"lora"}
    for name, update in before.items():
        wanted = best_approximation(update.delta(), 3)
        torch.testing.assert_close(found[name].delta().double(), wanted, rtol=1e-4, atol=1e-6)
    tool("lora_resize", input=source, output=whole, energy=1.0)
    torch.testing.assert_close(effect((whole, 1.0)), effect((source, 1.0)), rtol=1e-4, atol=1e-4)
    assert header(whole)["ss_network_module"] == "networks.lora_wan"


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_files_of_other_layers_are_joined_as_they_are(tmp_path, kind):
    one, two, output = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "out"))
    other(one, kind)
    lora(two, names=["blocks.0.ffn.0"])
    tool("lora_merge", loras=[{"path": one}, {"path": two}], output=output)
    for path in (one, two):
        table = load_file(path)
        assert all(same_bits(load_file(output)[key], value) for key, value in table.items())
    torch.testing.assert_close(effect((output, 1.0)), effect((one, 1.0), (two, 1.0)))


def test_layers_in_common_need_a_rank(tmp_path, capfd):
    one, two, output = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "out"))
    other(one, "loha")
    lora(two, names=NAMES)
    request = {"loras": [{"path": one, "strength": 0.5}, {"path": two}], "output": output}
    said = refusal("lora_merge", tmp_path, capfd, **request)
    assert f"one.safetensors: {NAMES[0]} is a loha update" in said
    tool("lora_merge", **request, rank=24)
    torch.testing.assert_close(
        effect((output, 1.0)), effect((one, 0.5), (two, 1.0)), rtol=1e-4, atol=1e-4
    )


def test_what_depends_on_the_base_is_refused(tmp_path, capfd):
    one, output = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    other(one, "dora")
    lora(tmp_path / "two.safetensors", names=NAMES)
    files = [{"path": one}, {"path": tmp_path / "two.safetensors"}]
    said = refusal("lora_resize", tmp_path, capfd, input=one, output=output, rank=2)
    assert f"the dora update of {NAMES[0]} depends on the weights" in said
    assert "menma lora extract" in said
    request = {"loras": files, "output": output, "rank": 2}
    assert "dora" in refusal("lora_merge", tmp_path, capfd, **request)
    blend = {"files": files, "output": tmp_path / "out", "share": 0.5}
    assert "is a dora update" in refusal("lora_blend", tmp_path, capfd, **blend)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_every_kind_is_averaged(tmp_path, kind, layout):
    one, two, output = (tmp_path / f"{n}.safetensors" for n in ("one", "two", "out"))
    other(one, kind, layout=layout)
    other(two, kind, NAMES, layout=layout)
    (event,) = tool("lora_ema", files=[one, two], output=output, beta=0.25)
    assert event["num_modules"] == 3
    for key, value in load_file(output).items():
        wanted = 0.25 * load_file(one)[key] + 0.75 * load_file(two)[key]
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_convert_and_inspect(tmp_path, kind):
    one, comfy, back = (tmp_path / f"{n}.safetensors" for n in ("one", "comfy", "back"))
    other(one, kind)
    tool("convert", input=one, output=comfy, layout="comfy")
    tool("convert", input=comfy, output=back, layout="kohya")
    torch.testing.assert_close(effect((back, 1.0)), effect((one, 1.0)), rtol=1e-5, atol=1e-5)
    found = inspect_lora(one)
    assert found["kind"] == kind
    assert found["programs"]["ComfyUI"]["loads"]
    assert not found["programs"]["diffusers"]["loads"]
