"""`menma lora resize` and `extract`: the closest LoRA of a rank, and what a LoRA cannot hold."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.adapters import load_adapter
from trainer.adapters.apply import merge_into
from trainer.models.wan.loading import load_transformer, save_transformer

from .lora_tool_runs import best_approximation, deltas, effect, header, lora, refusal, tool
from .tiny_models import make_transformer, model_inputs, run


@pytest.fixture
def big(tmp_path):
    path = tmp_path / "big.safetensors"
    lora(path, rank=6, alpha=3.0, metadata={"ss_seed": "7", "ss_loraid": "2"})
    return path


@pytest.mark.parametrize("layout", ["kohya", "comfy"])
def test_a_fixed_rank_gives_the_closest_lora(big, tmp_path, layout):
    output = tmp_path / "small.safetensors"
    (event,) = tool("lora_resize", input=big, output=output, rank=2, layout=layout)
    assert event["ranks"] == {"2": 30}
    before, after = deltas(big), deltas(output)
    for name, found in after.items():
        torch.testing.assert_close(found, best_approximation(before[name], 2), rtol=1e-4, atol=1e-6)
        share = float(found.square().sum() / before[name].square().sum())
        assert event["energy_by_module"][name] == pytest.approx(share, abs=1e-5)
    if layout == "kohya":
        assert {update.alpha for update in load_adapter(output).values()} == {1.0}
    assert {"ss_seed": "7", "ss_loraid": "2", "ss_network_dim": "2"}.items() <= header(
        output
    ).items()
    (step,) = json.loads(header(output)["menma.history"])
    assert (step["tool"], step["rank"], step["files"]) == ("resize", 2, ["big.safetensors"])


def test_the_whole_energy_keeps_the_effect(big, tmp_path):
    output = tmp_path / "same.safetensors"
    (event,) = tool("lora_resize", input=big, output=output, energy=1.0)
    assert event["energy"] == pytest.approx(1.0)
    torch.testing.assert_close(effect((output, 1.0)), effect((big, 1.0)), rtol=1e-4, atol=1e-4)


def holding(share: float):
    """Return a counter of the singular values that hold a share of the energy."""
    return lambda v: int((v.square().cumsum(0) < share * v.square().sum()).sum()) + 1


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"energy": 0.8}, holding(0.8)),
        ({"frobenius": 0.9}, holding(0.81)),
        ({"ratio": 1.5}, lambda v: int((v >= v[0] / 1.5).sum())),
        ({"ratio": 1.5, "rank": 2}, lambda v: min(2, int((v >= v[0] / 1.5).sum()))),
    ],
    ids=["energy", "frobenius", "ratio", "ratio and rank"],
)
def test_ranks_follow_the_singular_values(big, tmp_path, limits, kept):
    output = tmp_path / "small.safetensors"
    tool("lora_resize", input=big, output=output, **limits)
    after = load_adapter(output)
    for name, whole in deltas(big).items():
        assert after[name].rank == kept(torch.linalg.svdvals(whole))


def test_a_rank_that_is_small_already_is_left_alone(big, tmp_path):
    output = tmp_path / "same.safetensors"
    (event,) = tool("lora_resize", input=big, output=output, rank=8)
    assert "30 of 30 modules have rank 8 or less already" in event["said"]
    for key, value in load_file(big).items():
        assert torch.equal(load_file(output)[key], value)


def test_resize_is_told_how_far(big, tmp_path, capfd):
    output = tmp_path / "small.safetensors"
    said = refusal("lora_resize", tmp_path, capfd, input=big, output=output)
    assert "nothing says how far" in said
    said = refusal("lora_resize", tmp_path, capfd, input=big, output=output, rank=0)
    assert "rank" in said
    both = {"energy": 0.9, "frobenius": 0.9}
    assert "two ways" in refusal("lora_resize", tmp_path, capfd, input=big, output=output, **both)


@pytest.fixture
def models(tmp_path):
    """A model, and the same with a LoRA of rank 6 merged into it."""
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    model = make_transformer()
    save_file(model.state_dict(), base, metadata={"menma.variant": "wan2.1-t2v-1.3b"})
    lora(tmp_path / "truth.safetensors", rank=6, alpha=3.0, names=[
        "blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.2.ffn.0", "head.head",
    ])  # fmt: skip
    merge_into(model, load_adapter(tmp_path / "truth.safetensors"))
    save_transformer(model, tuned, metadata={"ss_steps": "9", "modelspec.title": "fish"})
    return base, tuned


def test_a_merged_lora_is_found_again(models, tmp_path):
    base, tuned = models
    output = tmp_path / "found.safetensors"
    (event,) = tool("lora_extract", base=base, tuned=tuned, output=output, rank=6, dtype="fp32")
    assert event["ranks"] == {"6": 4}
    assert event["unchanged"] == 32
    assert event["leftover"] == {}
    assert event["energy"] == pytest.approx(1, abs=1e-6)
    found, truth = deltas(output), deltas(tmp_path / "truth.safetensors")
    assert found.keys() == truth.keys()
    for name, whole in truth.items():
        torch.testing.assert_close(found[name], whole, rtol=1e-4, atol=1e-5)
    model = load_transformer(tuned)
    torch.testing.assert_close(
        effect((output, 1.0)), run(model, model_inputs(model)).detach(), rtol=1e-4, atol=1e-4
    )
    said = header(output)
    assert said["ss_steps"] == "9"
    assert said["modelspec.architecture"] == "wan/lora"
    assert said["menma.variant"] == "wan2.1-t2v-1.3b"
    assert "menma.config" not in said


def test_a_smaller_rank_is_the_closest(models, tmp_path):
    base, tuned = models
    output = tmp_path / "found.safetensors"
    (event,) = tool("lora_extract", base=base, tuned=tuned, output=output, rank=2, dtype="fp32")
    truth = deltas(tmp_path / "truth.safetensors")
    for name, found in deltas(output).items():
        torch.testing.assert_close(found, best_approximation(truth[name], 2), rtol=1e-3, atol=1e-5)
    assert 0 < event["energy"] < 1
    (event,) = tool("lora_extract", base=base, tuned=tuned, output=output, energy=0.9, force=True)
    assert min(event["energy_by_module"].values()) >= 0.9


def changed(path, output, **tensors):
    table = load_file(path)
    for name, change in tensors.items():
        key = name.replace("__", ".")
        table[key] = change(table[key])
    save_file(table, output)


def test_what_a_lora_cannot_hold_is_refused(models, tmp_path, capfd):
    base, tuned = models
    more = tmp_path / "more.safetensors"
    changed(
        tuned,
        more,
        blocks__1__norm3__weight=lambda t: t * 1.5,
        blocks__0__ffn__0__bias=lambda t: t + 0.1,
    )
    request = {"base": base, "tuned": more, "output": tmp_path / "o.safetensors", "rank": 6}
    words = refusal("lora_extract", tmp_path, capfd, **request)
    assert "blocks.1.norm3.weight (50 %)" in words
    assert "blocks.0.ffn.0.bias" in words
    assert "--allow-partial" in words
    (event,) = tool("lora_extract", **request, allow_partial=True)
    assert event["leftover"].keys() == {"blocks.1.norm3.weight", "blocks.0.ffn.0.bias"}
    assert "blocks.1.norm3.weight" in event["said"][0]
    assert len(load_adapter(request["output"])) == 4


def test_rounding_is_no_difference(models, tmp_path, capfd):
    base, tuned = models
    rounded = tmp_path / "bf16.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(base).items()}, rounded)
    request = {"base": base, "tuned": rounded, "output": tmp_path / "o.safetensors", "rank": 6}
    assert "do not differ" in refusal("lora_extract", tmp_path, capfd, **request)
    (event,) = tool("lora_extract", **(request | {"tuned": tuned, "base": rounded}))
    assert event["unchanged"] == 32


@pytest.mark.parametrize("case", ["model", "missing", "expert", "nan", "rank"])
def test_models_that_do_not_belong_together(models, tmp_path, capfd, case):
    base, tuned = models
    other, limits = tmp_path / "other.safetensors", {"rank": 4}
    if case == "model":
        save_transformer(make_transformer(dim=48), other)
        words = ["different models", "width 24", "width 48"]
    elif case == "missing":
        save_transformer(make_transformer(num_layers=2), other)
        words = ["blocks.2.", "in one of them only", "blocks 0-1"]
    elif case == "expert":
        save_transformer(make_transformer(), other, metadata={"menma.expert": "low_noise"})
        table = load_file(base)
        base = tmp_path / "high.safetensors"
        save_file(table, base, metadata={"menma.expert": "high_noise"})
        words = ["high_noise expert", "low_noise"]
    elif case == "nan":
        changed(tuned, other, blocks__0__self_attn__q__weight=lambda t: t * float("nan"))
        words = ["other.safetensors: blocks.0.self_attn.q.weight contains NaN"]
    else:
        other, limits, words = tuned, {}, ["nothing limits the rank"]
    request = {"base": base, "tuned": other, "output": tmp_path / "o.safetensors", **limits}
    said = refusal("lora_extract", tmp_path, capfd, **request)
    assert [word for word in words if word not in said] == []


def test_no_more_than_one_layer_is_in_memory(models, tmp_path, monkeypatch):
    import weakref

    import trainer.jobs.lora_extract as module

    alive, most = set(), 0
    original = module.read_tensor

    def counted(files, stored, dtype, device):
        nonlocal most
        tensor = original(files, stored, dtype, device)
        key = (str(files.path), stored.name)
        alive.add(key)
        weakref.finalize(tensor, alive.discard, key)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(module, "read_tensor", counted)
    tool("lora_extract", base=models[0], tuned=models[1], output=tmp_path / "o.safetensors", rank=1)
    assert most <= 3
